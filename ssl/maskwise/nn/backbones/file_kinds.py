"""Recognition of files that are not weights, by their first bytes: what a file is, and what to do with it."""

from __future__ import annotations

import zipfile
from pathlib import Path

HEAD = 1024  # bytes looked at
FROM_LIBRARY = "read it with the library that wrote it, and save a PyTorch state dict by torch.save"
UNPACK = "unpack it and give the weights file in it"
ONNX = ("an ONNX program", "give the weights that it was exported from")
BEGINNINGS = (  # first bytes, what the file is, what to do
    (b"version https://git-lfs", "a git-lfs pointer, not the file", "run git lfs pull"),
    (b"\x1f\x8b", "a gzip archive", UNPACK),
    (b"BZh", "a bzip2 archive", UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!", "a rar archive", UNPACK),
    (b"\x93NUMPY", "a NumPy array (.npy)", FROM_LIBRARY),
    (b"\x89HDF\r\n", "an HDF5 file, as Keras writes it", FROM_LIBRARY),
    (b"GGUF", "a GGUF file", FROM_LIBRARY),
    (b"\x89PNG", "a picture", "give the weights file"),
    (b"\xff\xd8\xff", "a picture", "give the weights file"),
    (b"%PDF", "a PDF document", "give the weights file"),
)
PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")
ONNX_FIELDS = (0x12, 0x1A, 0x22, 0x2A, 0x32, 0x3A, 0x42)  # protobuf tags that may follow ir_version (field 1)
MAX_IR_VERSION = 32


def foreign(path: Path) -> tuple[str, str] | None:
    """Return what a file is and what to do with it; None for a file that may hold weights.

    Raises OSError for a file that cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head:
        return "an empty file", "copy or download it again"
    if is_safetensors(head):
        return None
    for beginning, what, remedy in BEGINNINGS:
        if head.startswith(beginning):
            return what, remedy
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(PAGES):
        return "a web page, not the file", "download the file itself (on the Hub /resolve/ in place of /blob/)"
    if head.startswith(b"PK"):
        return zip_archive(path)
    if head[257:262] == b"ustar":
        return "a tar archive", UNPACK
    if head[0] == 0x08 and len(head) > 2 and head[1] <= MAX_IR_VERSION and head[2] in ONNX_FIELDS:
        return ONNX
    if is_text(head):
        return f"a text file ({' '.join(head.decode().split())[:40]})", "give the weights file"
    return None


def is_safetensors(head: bytes) -> bool:
    """Return whether a file with these first bytes is in the safetensors format: a length, then JSON."""
    return len(head) > 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 1 << 30


def is_text(head: bytes) -> bool:
    """Return whether the bytes are printable UTF-8."""
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def zip_archive(path: Path) -> tuple[str, str] | None:
    """Return what a zip archive is and what to do with it; None for a file of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError):
        return "an incomplete file", "copy or download it again"
    parts = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in parts:
        return "a TorchScript program", "save its weights: torch.save(torch.jit.load(FILE).state_dict(), NEW)"
    if any(part.startswith(("archive_format", "models/", "serialized_exported_program")) for part in parts):
        return "a program of torch.export", "give the weights that it was exported from"
    if "data.pkl" in parts:
        return None
    if any(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz), as JAX code writes it", FROM_LIBRARY
    return "a zip archive", UNPACK
