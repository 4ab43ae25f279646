"""Addresses such as s3://bucket/train-0000.tar: which are remote, and which may stand in a recipe."""

import re
from urllib.parse import unquote, urlsplit

from maskwise.errors import UserError

# protocol -> package that serves it beside fsspec; None: fsspec alone
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
PROTOCOL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.I)
LEADING = ("s3:/", "gs:/", "http:/", "https:/")  # what pathlib makes of an address


def is_remote(path) -> bool:
    """Return whether a path is an address in object storage or on a web server."""
    match = PROTOCOL.match(str(path))
    return bool(match) and match[1].lower() != "file"


def was_remote(path) -> bool:
    """Return whether a path is a remote address, or was one before pathlib removed a slash."""
    return is_remote(path) or str(path).startswith(LEADING)


def local(path: str) -> str:
    """Return a file:// address as a path; other texts unchanged."""
    if not str(path).lower().startswith("file://"):
        return str(path)
    return unquote(urlsplit(str(path)).path)


def protocol_of(address: str) -> str:
    """Return the protocol of an address in lower case, `file` without one."""
    match = PROTOCOL.match(address)
    return match[1].lower() if match else "file"


def check(address: str, key: str) -> None:
    """Raise UserError for an unknown protocol, and for credentials in an address: run folders would record them.

    key: the recipe's key that holds the address. The text does not repeat the address where it holds a secret.
    """
    protocol = protocol_of(address)
    if protocol not in PACKAGES:
        raise UserError(f"{key}: unknown protocol {protocol}://; give {'://, '.join(PACKAGES)}:// or file://")
    parts = urlsplit(address)
    if "@" in parts.netloc:
        raise UserError(
            f"{key}: the address holds a user name or key before @, which the run folder would record; leave it out "
            "and give credentials by the environment (AWS_ACCESS_KEY_ID ..., ~/.netrc)"
        )
    if protocol in ("http", "https") and parts.query:
        raise UserError(
            f"{key}: the address has a query (after ?), which may hold a signature and which the run folder would "
            "record; give an address without one"
        )
    if protocol in ("s3", "gs") and not parts.netloc:
        raise UserError(f"{key}: {address} names no bucket; give {protocol}://BUCKET/PATH")


def bucket_of(address: str) -> str:
    """Return bucket or host of an address, with its protocol."""
    return f"{protocol_of(address)}://{urlsplit(address).netloc}"


def without_queries(text: str) -> str:
    """Return a text with the queries of its addresses replaced: they hold signatures."""
    return re.sub(r"(://[^\s?]*)\?[^\s'\")>]*", r"\1?...", text)
