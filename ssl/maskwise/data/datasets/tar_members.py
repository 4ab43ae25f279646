"""Members of tar files: names, offsets and sizes, and the members that are refused."""

import tarfile
from pathlib import Path

from maskwise.data.datasets.left_out import is_system
from maskwise.errors import UserError

PACKED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")  # first bytes of gzip, bzip2, xz and Zstandard


def members(shard: Path) -> list[tuple[str, int, int]]:
    """List (name, offset, bytes) of the regular files in a tar file, except hidden ones and those of system folders.

    Raises UserError for a compressed or damaged file, and for links, devices and names that lead out of it.
    """
    try:
        with open(shard, "rb") as file:
            return members_of(file, shard)
    except OSError as error:
        raise UserError(
            f"data.path: cannot read {shard}: {error.strerror or error}; give tar files that can be read"
        ) from None


def members_of(file, place) -> list[tuple[str, int, int]]:
    """List the members of an open tar file, as `members`; place: its name in errors. Raises OSError of reading."""
    entries = []
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                if reason := refusal(member):
                    raise UserError(f"data.path: {place} contains {reason}")
                if member.isreg() and not is_system(member.name):
                    entries.append((member.name, member.offset_data, member.size))
        return entries
    except (UserError, OSError):
        raise
    except Exception as error:  # damaged headers raise many types
        file.seek(0)
        packed = file.read(4)[:2] in PACKED
        reason = "is compressed, and cannot be read in place; unpack it to .tar"
        if not packed:
            reason = f"is not a valid tar file ({error})"
        raise UserError(f"data.path: {place} {reason}") from None


def refusal(member: tarfile.TarInfo) -> str | None:
    """Return what kind of member is refused and the remedy, None where it is accepted."""
    name = member.name[:80]
    if name.startswith("/"):
        return f"an absolute path ({name}); create it without -P"
    if ".." in member.name.split("/"):
        return f"a path outside its folder ({name}); create it from relative paths without `..`"
    if member.issym() or member.islnk():
        return f"a link ({name} -> {member.linkname[:80]}); create it with --dereference"
    if member.isreg() and not member.issparse() or member.isdir():
        return None
    return f"a special file ({name}); create it from regular files"
