"""Requests to storage: each is repeated with growing pauses until it succeeds or the time is over."""

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from maskwise.errors import UserError
from maskwise.storage import faults
from maskwise.storage.address import bucket_of, check, local, protocol_of

REQUEST = 60.0  # seconds after which one request counts as failed
DATES = ("ETag", "etag", "Last-Modified", "LastModified", "mtime")  # the first that a server gives identifies a version


@dataclass(frozen=True)
class Patience:
    """Set how long a failed request is repeated: seconds in all, first and longest pause; the clock is replaceable."""

    seconds: float = 300.0
    first: float = 0.1
    longest: float = 10.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = field(default_factory=lambda: random.Random().random)

    def pause(self, failures: int) -> float:
        """Return the seconds to wait after so many failures: doubling, and drawn from the upper half."""
        return min(self.longest, self.first * 2 ** (failures - 1)) * (0.5 + 0.5 * self.draw())


class Version(NamedTuple):
    """Size in bytes and ETag (or date) of a file in storage."""

    size: int
    tag: str


class Store:
    """Read and write files by their addresses, also in a forked process and in several threads at once.

    key: the recipe's key that errors begin with. Raises `faults.StorageError` in one line, `Missing` for what does not
    exist, `Lost` where storage has not answered for `patience.seconds`.
    """

    def __init__(self, key: str, patience: Patience = Patience()):
        self.key, self.patience = key, patience

    def version(self, address: str) -> Version:
        """Return size and ETag of a file."""

        def ask(files):
            about = files.info(path_of(address), timeout=REQUEST)
            if about.get("type") == "directory":
                raise FileNotFoundError(address)
            return Version(int(about["size"]), next((str(about[key]) for key in DATES if about.get(key)), ""))

        return self.repeat(address, ask)

    def read(self, address: str, start: int, size: int) -> bytes:
        """Read `size` bytes from `start`; a body of another length is read again."""

        def ask(files) -> bytes:
            data = files.cat_file(path_of(address), start=start, end=start + size, timeout=REQUEST) if size else b""
            if len(data) > size:
                raise UserError(
                    f"{self.key}: {bucket_of(address)} does not serve ranges of files; copy them to a server that does"
                )
            if len(data) < size:
                raise faults.ShortRead(f"{len(data)} of {size} bytes arrived")
            return data

        return self.repeat(address, ask)

    def listing(self, address: str, pattern: str | None = None) -> list[str]:
        """List the addresses below a folder, or those that match a pattern; [] where there are none."""
        protocol = protocol_of(address)

        def ask(files) -> list[str]:
            place = path_of(address).rstrip("/")
            found = files.glob(path_of(pattern)) if pattern else files.find(place)
            return sorted(name if protocol == "file" else f"{protocol}://{name}" for name in found)

        try:
            return self.repeat(address, ask)
        except faults.Missing as missing:
            if "bucket" in str(missing):
                raise
            return []

    def contents(self, address: str) -> bytes:
        """Read a whole small file."""
        return self.repeat(address, lambda files: files.cat_file(path_of(address), timeout=REQUEST))

    def upload(self, file, address: str) -> None:
        """Copy a local file into storage."""

        def ask(files) -> None:
            if protocol_of(address) == "file":
                os.makedirs(os.path.dirname(path_of(address)), exist_ok=True)
            files.put_file(str(file), path_of(address))

        self.repeat(address, ask, "write")

    def download(self, address: str, file) -> None:
        """Copy a file from storage; a half one stays under its name if this fails."""
        self.repeat(address, lambda files: files.get_file(path_of(address), str(file)))

    def remove(self, address: str) -> None:
        """Remove a file; one that does not exist is no error."""
        try:
            self.repeat(address, lambda files: files.rm_file(path_of(address)), "write")
            if protocol_of(address) == "file":
                with contextlib.suppress(OSError):  # not empty yet
                    os.rmdir(os.path.dirname(path_of(address)))
        except faults.Missing:
            pass

    def repeat(self, address: str, ask: Callable[[Any], Any], action: str = "read") -> Any:
        """Return ask(filesystem), repeated while the error may pass and the time is not over."""
        patience, failures = self.patience, 0
        files = filesystem(address, self.key)
        end = patience.clock() + patience.seconds
        while True:
            try:
                return ask(files)
            except UserError:
                raise
            except Exception as error:  # libraries raise dozens of types
                error = faults.original(error)
                if not faults.passes(error):
                    if not (isinstance(error, OSError) or faults.is_of_library(error)):
                        raise
                    raise faults.final(error, address, self.key, action) from None
                failures += 1
                pause = patience.pause(failures)
                if patience.clock() + pause >= end:
                    raise faults.lost(error, address, self.key, patience.seconds) from None
                patience.sleep(pause)


# Filesystems of this process by protocol: their event loops do not survive a fork.
_filesystems: dict[str, Any] = {}
# Those of the parent are kept in a forked process: closing one there takes the parent's connections out of the epoll
# instance that both share, and the parent's next read would wait in vain.
_inherited: list[Any] = []
_lock = threading.Lock()


def filesystem(address: str, key: str):
    """Return the fsspec filesystem of an address in this process. Raises StorageError where its package is missing."""
    protocol = protocol_of(address)
    if protocol != "file":
        check(address, key)
    with _lock:
        if protocol not in _filesystems:
            try:
                _filesystems[protocol] = opened(protocol)
            except ImportError:
                raise faults.no_package(address, key) from None
        return _filesystems[protocol]


def opened(protocol: str):
    """Open a filesystem without caches of listings; the retries of `Store` replace the library's own."""
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol == "s3":
        limits = {"retries": {"max_attempts": 0}, "connect_timeout": 10, "read_timeout": 30, "max_pool_connections": 64}
        files = fsspec.filesystem("s3", config_kwargs=limits, **options)
        files.retries = 1
        return files
    if protocol in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)
        return fsspec.filesystem(protocol, client_kwargs={"trust_env": True, "timeout": limits}, **options)
    return fsspec.filesystem(protocol, **options)


def path_of(address: str) -> str:
    """Return what a filesystem takes: the path of a file:// address, else the address."""
    return local(address)


def _forget() -> None:
    global _lock
    _inherited.extend(_filesystems.values())
    _filesystems.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)
