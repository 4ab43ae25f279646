"""Small file systems that can be filled."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def mounted(place, size: str):
    """Mount a tmpfs of a given size at `place`; skips the test where mounting is not permitted."""
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True
    ).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def close(place) -> None:
    """Remount a folder read-only."""
    subprocess.run(["mount", "--bind", str(place), str(place)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)


def reopen(place) -> None:
    """Undo `close`."""
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place) -> None:
    """Fill all free space."""
    with contextlib.suppress(OSError), open(place / "ballast", "ab", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"0" * size)


def free(place) -> None:
    """Undo `fill`."""
    (place / "ballast").unlink(missing_ok=True)
