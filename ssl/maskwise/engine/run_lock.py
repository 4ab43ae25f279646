"""`RunLock`: one process at a time writes into a run folder."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from maskwise.engine.atomic_file import write_error
from maskwise.errors import UserError

FILE = ".lock"
BEAT = 15.0  # seconds between two heartbeats
TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}  # other errors: a file system without locks
_held: set["RunLock"] = set()


class RunLock:
    """Lock a run folder from `acquire` to the end of the block, or of the process, however it ends.

    The file `.lock` holds process id and host of the holder, and is removed at the end; its modification time is the
    heartbeat. The lock is flock's: between
    machines it holds where their shared file system passes locks on (NFS with its lock service, Lustre with `flock`).
    option: of the command line, with which the user chooses another folder.
    """

    def __init__(self, folder, option: str = "--out"):
        self.folder, self.path, self.option = Path(folder), Path(folder) / FILE, option
        self.handle: int | None = None
        self.beaten = -BEAT

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def acquire(self) -> str:
        """Lock the folder, which exists; returns a line to print where the lock may not tell everything, else "".

        Raises UserError where another process holds the lock, with its process id and host.
        """
        unsure = ""
        try:
            while True:
                self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                _held.add(self)
                try:
                    _lock(self.handle, fcntl.LOCK_EX, self.folder, self.option)
                except OSError as error:
                    unsure = (
                        f"cannot tell whether another maskwise writes into {self.folder} (its file system has no "
                        f"locks: {error.strerror}): make sure that none does"
                    )
                if self.is_ours():  # the last holder may have removed the file after it was opened here
                    return self._sign() or unsure
                self.forget()
        except OSError as error:
            raise UserError(write_error(self.path, error)) from None
        except UserError:
            self.forget()
            raise

    def is_ours(self) -> bool:
        """Return whether the folder still holds the file that is locked."""
        if self.handle is None:
            return False
        try:
            found, locked = os.stat(self.path), os.fstat(self.handle)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (locked.st_dev, locked.st_ino)

    def check(self) -> None:
        """Raise UserError if the folder was removed or replaced: another run may write there now."""
        if self.handle is not None and not self.is_ours():
            raise UserError(
                f"the run folder {self.folder} was removed or replaced while this run was writing into it: put it back"
            )

    def beat(self) -> None:
        """Renew the heartbeat, at most every BEAT seconds; a disk that refuses is no error."""
        now = time.monotonic()
        if self.handle is not None and now - self.beaten >= BEAT:
            self.beaten = now
            with contextlib.suppress(OSError):
                os.utime(self.handle)

    def release(self) -> None:
        """Unlock the folder."""
        if self.handle is None:
            return
        if self.is_ours():
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self.forget()

    def forget(self) -> None:
        """Close the file; a forked process does not hold its parent's lock."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None
            _held.discard(self)

    def _sign(self) -> str:
        """Write process id and host; returns a line if the last holder was killed on another host."""
        with contextlib.suppress(OSError):  # a full disk: the holder is then unknown to others
            last = _holder(self.handle)
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            if last and last.partition(" on ")[2] != socket.gethostname():
                return (
                    f"{self.folder} was last written by maskwise ({last}), which was killed: if that machine shares "
                    "this disk, make sure that it has ended"
                )
        return ""


@dataclass(frozen=True)
class Holder:
    """The process that signed the lock of a run folder: "pid N on HOST", and the seconds since its heartbeat.

    alive: whether it holds the lock; None where that cannot be told, because another machine's locks may not be seen.
    """

    text: str
    alive: bool | None
    silent: float


def holder(folder) -> Holder | None:
    """Return the holder of a run folder's lock, None where the folder has no lock; nothing is written."""
    try:
        handle = os.open(Path(folder) / FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        text, silent = _holder(handle), time.time() - os.fstat(handle).st_mtime
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            alive = False if text.partition(" on ")[2] == socket.gethostname() else None
        except OSError as error:
            alive = True if error.errno in TAKEN else None
        return Holder(text, alive, silent)
    finally:
        os.close(handle)


def check_free(folder) -> None:
    """Raise UserError if another process is writing into a run folder; creates nothing."""
    with contextlib.suppress(OSError):
        handle = os.open(Path(folder) / FILE, os.O_RDONLY)
        try:
            _lock(handle, fcntl.LOCK_SH, folder)
        finally:
            os.close(handle)


def _lock(handle: int, kind: int, folder, option: str = "--out") -> None:
    """Lock an open file without waiting; raises UserError if it is taken, OSError where locks are not supported."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        holder = _holder(handle)
        raise UserError(
            f"another maskwise{f' ({holder})' if holder else ''} is writing into {folder}: wait for its end, stop it, "
            f"or give another {option}"
        ) from None


def _holder(handle: int) -> str:
    """Return "pid N on HOST" as the last holder wrote it; "" if that cannot be read."""
    try:
        return os.pread(handle, 300, 0).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)
