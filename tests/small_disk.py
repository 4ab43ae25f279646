"""A file system of a few pages, to be filled."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def mounted(place, size: str):
    """A tmpfs of that size at `place` (made here); the test is skipped where none may be mounted."""
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def close(place) -> None:
    """Make a folder a read-only file system of its own."""
    subprocess.run(["mount", "--bind", str(place), str(place)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)


def reopen(place) -> None:
    """What `close` did, undone."""
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place) -> None:
    """Leave nothing free."""
    with contextlib.suppress(OSError), open(place / "ballast", "ab", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"0" * size)


def free(place) -> None:
    """Give back what `fill` took."""
    (place / "ballast").unlink(missing_ok=True)
