"""Images in tar files, read where they lie: an index of offsets, then one read per image; nothing is unpacked."""

import glob
import hashlib
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import torch

from maskwise.data.decode import MAX_PIXELS, CorruptImage, decode
from maskwise.functional.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Tar:
    """Images of uncompressed tar files, in the order of the files and of the members within.

    Labels come from members `KEY.cls` beside `KEY.jpg` (a whole number as text) where there are any, else from the folder
    part of the names: what all have in common is left out and the next folder is the class. Without either there are no labels.

    path: a tar file, a folder of them, or a pattern (`train-{0000..0146}.tar`, `train-*.tar`); split: a subfolder of a folder;
    per_class: keep the first n images of each class; max_pixels: an image of more is unreadable. `.labels` int64 [n] or None, `.classes` names or None.
    Raises UserError for what is missing, compressed or no tar file, and for images without their .cls member.
    """

    def __init__(self, path, split: str | None = None, per_class: int | None = None, max_pixels: int = MAX_PIXELS):
        self.max_pixels = max_pixels
        self.shards = shards(str(Path(path).expanduser()), split)
        names, places, classes = [], [], {}
        for number, shard in enumerate(self.shards):
            for name, offset, size in members(shard):
                stem, extension = os.path.splitext(name)
                if extension.lower() in EXTENSIONS:
                    names.append(name)
                    places.append((number, offset, size))
                elif extension == ".cls":
                    classes[number, stem] = (offset, size)
        if not names:
            raise UserError(f"data.path: no images in {len(self.shards)} tar files ({self.shards[0].name}, ...); images are {' '.join(EXTENSIONS)}")
        self.names, self.places = names, np.array(places, dtype=np.int64)
        self._open: dict[int, int] = {}
        labels, self.classes = self._numbered(classes) if classes else foldered(names)
        if per_class is not None:
            if labels is None:
                raise UserError("data.per_class needs classes, and these tar files have neither .cls members nor folders; leave it out")
            kept = first_of_each(labels, per_class)
            labels, self.places, self.names = [labels[k] for k in kept], self.places[kept], [names[k] for k in kept]
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> torch.Tensor:
        """uint8 [3, H, W] of one image. Raises decode.CorruptImage."""
        return decode(self.source(index), self.name(index), max_pixels=self.max_pixels)

    def source(self, index: int) -> bytes:
        """The bytes of one image's file. Raises decode.CorruptImage where the tar file ends before."""
        number, offset, size = self.places[index].tolist()
        try:
            data = self._read(number, offset, size)
        except OSError as error:
            raise CorruptImage(self.name(index), error.strerror or "cannot be read") from None
        if len(data) < size:
            raise CorruptImage(self.name(index), f"{self.shards[number].name} ends within it")
        return data

    def name(self, index: int) -> str:
        """The name of one image: its tar file's and the member's."""
        return f"{self.shards[self.places[index, 0]].name}/{self.names[index]}"

    def fingerprint(self) -> str:
        """Hex digest of the names and sizes of all images."""
        digest = hashlib.sha256()
        for name, (number, _, size) in zip(self.names, self.places.tolist()):
            digest.update(f"{self.shards[number].name}/{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}  # file descriptors stay in their process

    def _read(self, number: int, offset: int, size: int) -> bytes:
        if number not in self._open:
            self._open[number] = os.open(self.shards[number], os.O_RDONLY)
        return os.pread(self._open[number], size, offset)  # leaves no position behind: forked workers may share the descriptor

    def _numbered(self, classes: dict) -> tuple[list[int], list[str]]:
        labels = []
        for name, number in zip(self.names, self.places[:, 0].tolist()):
            stem = os.path.splitext(name)[0]
            if (number, stem) not in classes:
                raise UserError(f"data.path: {self.shards[number].name} has {name} without {stem}.cls; give every image its class, or none")
            text = self._read(number, *classes[number, stem]).decode("utf-8", "replace").strip()
            if not text.isascii() or not text.isdigit():
                raise UserError(f"data.path: {self.shards[number].name}: {stem}.cls holds {text[:20]!r}; it must be a class number from 0")
            labels.append(int(text))
        return labels, [str(k) for k in range(max(labels) + 1)]


def shards(path: str, split: str | None) -> list[Path]:
    """The tar files that a path names, sorted. Raises UserError where there are none."""
    if os.path.isdir(path):
        folder = Path(path) / split if split else Path(path)
        if not folder.is_dir():
            raise UserError(f"data.split: no folder {split!r} in {path}")
        found = sorted(folder.glob("*.tar"))
        if not found:
            packed = sorted(each.name for each in folder.iterdir() if ".tar." in each.name or each.suffix == ".tgz")
            raise UserError(f"data.path: no .tar files in {folder}" + (f"; unpack {packed[0]} to .tar first, compressed ones cannot be read in place" if packed else ""))
        return found
    if split:
        raise UserError(f"data.split needs a folder of tar files, and data.path is {path}; leave data.split out")
    found = [Path(each) for each in expanded(path)]
    missing = next((each for each in found if not each.is_file()), None)
    if not found or missing is not None:
        raise UserError(f"data.path: {missing or path} does not exist; give a tar file, a folder of them or a pattern such as train-{{0000..0146}}.tar")
    return found


def expanded(path: str) -> list[str]:
    """The files of a pattern: {000..146} counts, * and ? match what is there."""
    inside = RANGE.search(path)
    if inside:
        first, last = inside.groups()
        numbers = range(int(first), int(last) + 1)
        return [each for k in numbers for each in expanded(f"{path[:inside.start()]}{k:0{len(first)}d}{path[inside.end():]}")]
    return sorted(glob.glob(path)) if any(letter in path for letter in "*?[") else [path]


def members(shard: Path) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of the ordinary files in a tar file, those left out whose name begins with a dot.

    Raises UserError for one that is compressed or damaged, and for members that a data set has no use for: links, devices, names that lead out of it.
    """
    found = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for each in tar:
                if why := unwanted(each):
                    raise UserError(f"data.path: {shard} has {each.name[:80]!r}, {why}; make it of plain files with relative names")
                if each.isreg() and not os.path.basename(each.name).startswith("."):
                    found.append((each.name, each.offset_data, each.size))
        return found
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"data.path: cannot read {shard}: {error.strerror or error}; give tar files that can be read") from None
    except Exception as error:  # headers may hold anything
        with open(shard, "rb") as file:
            packed = file.read(4)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")
        why = "is compressed, and cannot be read in place; unpack it to .tar" if packed else f"is not a sound tar file ({error})"
        raise UserError(f"data.path: {shard} {why}") from None


def unwanted(member: tarfile.TarInfo) -> str | None:
    """Why a member has no place in a data set, None where it has."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "a name that leads out of it"
    if member.issym() or member.islnk():
        return f"a link to {member.linkname[:80]!r}"
    if member.isreg() and not member.issparse() or member.isdir():
        return None
    return "which is no ordinary file"


def foldered(names: list[str]) -> tuple[list[int] | None, list[str] | None]:
    """Labels and class names from the first folder in which names differ; (None, None) where an image lies in none."""
    folders = [name.removeprefix("./").split("/")[:-1] for name in names]
    depth = len(os.path.commonprefix(folders))
    if any(len(each) <= depth for each in folders):
        return None, None
    tops = [each[depth] for each in folders]
    classes = sorted(set(tops))
    index = {name: k for k, name in enumerate(classes)}
    return [index[top] for top in tops], classes


def first_of_each(labels: list[int], count: int) -> list[int]:
    """Places of the first `count` images of each label. Raises UserError for less than one."""
    if count < 1:
        raise UserError(f"data.per_class is {count}; it must be at least 1")
    taken: dict[int, int] = {}
    kept = []
    for place, label in enumerate(labels):
        taken[label] = taken.get(label, 0) + 1
        if taken[label] <= count:
            kept.append(place)
    return kept
