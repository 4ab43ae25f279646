"""Errors of storage libraries: which pass, and one line with the remedy for those that do not."""

import asyncio
import errno

from maskwise.errors import UserError
from maskwise.storage.address import PACKAGES, bucket_of, protocol_of, without_queries

RETRIED = {408, 425, 429}  # below 500
RETRIED_CODES = {"IncompleteBody", "BadDigest", "RequestTimeout", "SlowDown", "XAmzContentSHA256Mismatch"}
LIBRARIES = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "fsspec", "s3fs", "urllib3")
FINAL = {errno.EINVAL, errno.EPERM, errno.ENAMETOOLONG, errno.ENOSYS, errno.EISDIR, errno.ENOTDIR, errno.ENOSPC}
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the role of the machine; "
    "FSSPEC_S3_ANON=true for a public bucket",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
}


class StorageError(UserError):
    """A file in storage that cannot be reached; the text gives the cause and the remedy."""


class Missing(StorageError):
    """A file or bucket that does not exist."""


class Lost(StorageError):
    """Storage that has not answered for as long as the recipe allows."""


class ShortRead(OSError):
    """A body that ended before its announced length."""


def original(error: BaseException) -> BaseException:
    """Return the error that a library has hidden behind FileNotFoundError, else the error itself."""
    cause = error.__cause__
    hidden = isinstance(error, FileNotFoundError) and cause is not None and status_of(cause) != 404
    return cause if hidden and not isinstance(cause, FileNotFoundError) and not code_of(cause) else error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error, or of its cause; None without one."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        found = getattr(one, "status", None)
        if found is None and one is error:  # gcsfs; in the cause it is aiohttp's number for a body that ends early
            found = getattr(one, "code", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if str(found).isdigit():
            return int(str(found))
    return None


def code_of(error: BaseException | None) -> str:
    """Return the S3 code of an error, or of its cause, such as NoSuchBucket; "" without one."""
    for one in (error, getattr(error, "__cause__", None)):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def passes(error: BaseException) -> bool:
    """Return whether the same request may succeed later."""
    status = status_of(error)
    if lacks_credentials(error) or isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError)):
        return False
    if code_of(error) in RETRIED_CODES:
        return True
    if status is not None and status >= 400:
        return status >= 500 or status in RETRIED
    if isinstance(error, OSError):
        return error.errno not in FINAL
    return isinstance(error, (asyncio.TimeoutError, TimeoutError)) or is_of_library(error)


def lacks_credentials(error: BaseException) -> bool:
    """Return whether a library found no credentials, or only a part of them."""
    names = {cls.__name__ for one in (error, error.__cause__) if one is not None for cls in type(one).__mro__}
    return bool(names & {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})


def is_of_library(error: BaseException) -> bool:
    """Return whether the class of an error belongs to a storage library."""
    return type(error).__module__.partition(".")[0] in LIBRARIES


def final(error: BaseException, address: str, key: str, action: str) -> StorageError:
    """Return the line for an error that repeating does not mend. action: read or write."""
    place, protocol = f"{key}: {address}", protocol_of(address)
    status, code = status_of(error), code_of(error)
    if lacks_credentials(error):
        remedy = CREDENTIALS.get(protocol, "give them by ~/.netrc")
        return StorageError(f"{place}: no credentials for {bucket_of(address)}; {remedy}")
    if code == "NoSuchBucket" or "bucket does not exist" in str(error):
        return Missing(f"{place}: there is no bucket {bucket_of(address)}; correct the name, or create it")
    if isinstance(error, FileNotFoundError) or status == 404:
        return Missing(f"{place} does not exist; correct the address")
    if isinstance(error, PermissionError) or status in (401, 403):
        reason = f" ({code})" if code and not code.isdigit() else ""
        return StorageError(
            f"{place}: no permission to {action} it{reason}; give credentials that may, and check that they have not "
            "expired"
        )
    return StorageError(f"{place} cannot be {'read' if action == 'read' else 'written'} ({brief(error)})")


def lost(error: BaseException, address: str, key: str, seconds: float) -> Lost:
    """Return the line for storage that has not answered for so many seconds."""
    return Lost(
        f"{key}: {address} could not be reached for {seconds:g} s ({brief(error)}); check the network and the bucket, "
        "speed.remote_timeout sets how long to wait"
    )


def no_package(address: str, key: str) -> StorageError:
    """Return the line for a missing package."""
    protocol = protocol_of(address)
    package = PACKAGES.get(protocol) or "fsspec"
    return StorageError(f"{key}: {protocol}:// needs the package {package}; pip install {package}")


def brief(error: BaseException) -> str:
    """Return the text of an error in one line of at most 160 characters, without queries of addresses."""
    text = " ".join(without_queries(str(error)).split())
    return f"{type(error).__name__}: {text}"[:160] if text else type(error).__name__
