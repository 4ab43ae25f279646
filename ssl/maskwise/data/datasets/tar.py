"""Images in uncompressed tar files, read in place: one index of offsets, then one read per image.

The files lie on a disk, or in storage that `maskwise.storage` reads by ranges.
"""

import glob
import hashlib
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from maskwise.bounds import Count
from maskwise.data.datasets.contents import FIRST_BYTES, OPENED, digest, names_digest, numbers_digest, sampled
from maskwise.data.datasets.files import check_options, local_path
from maskwise.data.datasets.left_out import image_endings, key_of, left_out, remedies_of
from maskwise.data.datasets.remote_tars import names_of, open_remote
from maskwise.data.datasets.tar_members import members
from maskwise.data.decoding import multichannel
from maskwise.data.decoding.image import MAX_PIXELS, CorruptImage, PixelLimit
from maskwise.data.decoding.multichannel import ValueRange
from maskwise.errors import UserError
from maskwise.imaging.formats import common_endings
from maskwise.storage.address import is_remote
from maskwise.storage.options import RemoteOptions
from maskwise.storage.range_reader import RangeReader

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Tar:
    """Images of uncompressed tar files, in the order of the files and of their members.

    Labels come from members `KEY.cls` next to `KEY.jpg` (a whole number as text) where there are any, else from the
    first folder below the common prefix of all names; without either there are no labels.

    path: a tar file, a folder of them, or a pattern (`train-{0000..0146}.tar`, `train-*.tar`), also at s3://, gs://,
    http://, https:// or file://; split: a subfolder of path; per_class: keep the first n images of each class;
    max_pixels: larger images count as unreadable; value_range: the stored values that become black and white; remote:
    how storage is read.
    `.labels` int64 [n] or None, `.classes` names or None. Raises UserError for a file that is missing, compressed or
    damaged, and for images without their .cls member.
    """

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        per_class: Count | None = None,
        max_pixels: PixelLimit = MAX_PIXELS,
        value_range: ValueRange | None = None,
        remote: RemoteOptions | None = None,
    ):
        check_options(per_class, 8, value_range)
        self.max_pixels, self.value_range = max_pixels, value_range
        self.remote: RangeReader | None = None
        if is_remote(path):
            self.remote, indices = open_remote(str(path), split, numbered, remote or RemoteOptions())
            self.shards = names_of(self.remote.addresses)
            listed, texts = [index.members for index in indices], [index.texts for index in indices]
        else:
            self.shards = find_shards(str(local_path(path)), split)
            listed, texts = map(members, self.shards), []
        names, places, classes, others, accepted = [], [], {}, Counter(), set(image_endings())
        for number, entries in enumerate(listed):
            for name, offset, size in entries:
                stem, extension = os.path.splitext(name)
                if extension.lower() in accepted:
                    names.append(name)
                    places.append((number, offset, size))
                elif extension == ".cls":
                    classes[number, stem] = texts[number][name] if texts else (offset, size)
                else:
                    others[key_of(os.path.basename(name))] += 1
        if not names:
            place = self.shards[0].name
            if len(self.shards) > 1:
                place = f"{len(self.shards)} tar files ({place}, ...)"
            remedies = "".join(f"; {text}" for text in remedies_of(others))
            raise UserError(f"data.path: no images in {place}{remedies}; images are {common_endings()}")
        self.notes = left_out(path, len(names), others)
        self.names, self.places = names, np.array(places, dtype=np.int64)
        self._open: dict[int, int] = {}
        labels, self.classes = self._read_labels(classes) if classes else labels_from_folders(names)
        if per_class is not None:
            if labels is None:
                raise UserError(
                    "data.per_class needs classes, and these tar files have neither .cls members nor folders; "
                    "leave it out"
                )
            rows = first_of_each(labels, per_class)
            self.names, self.places = [names[row] for row in rows], self.places[rows]
            labels = [labels[row] for row in rows]
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
        unlabeled = f"{path} has neither .cls members nor class folders; pack one folder per class"
        self.no_labels = unlabeled if labels is None else None

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> torch.Tensor:
        """Decode one image to uint8 [3, H, W]. Raises CorruptImage."""
        return multichannel.decode(
            self.source(index), self.name(index), max_pixels=self.max_pixels, value_range=self.value_range
        )

    def stored_range(self, index: int) -> tuple[str, float, float] | None:
        """Return kind and range of the stored values of one image, None for 8-bit values."""
        return multichannel.stored_range(self.source(index))

    def source(self, index: int) -> bytes:
        """Read the encoded bytes of one image. Raises CorruptImage where the tar file is truncated."""
        number, offset, size = self.places[index].tolist()
        try:
            data = self._read(number, offset, size)
        except OSError as error:
            raise CorruptImage(self.name(index), error.strerror or "cannot be read") from None
        if len(data) < size:
            raise CorruptImage(self.name(index), f"{self.shards[number].name} ends within it")
        return data

    def expect(self, indices) -> None:
        """Start reading images that are wanted next, in this order, where the files are remote."""
        if self.remote is not None:
            self.remote.expect(list(map(tuple, self.places[list(indices)].tolist())))

    def name(self, index: int) -> str:
        """Return the name of one image: tar file and member."""
        return f"{self.shards[self.places[index, 0]].name}/{self.names[index]}"

    def fingerprint(self) -> str:
        """Return a hex digest of the names and sizes of all images."""
        digest = hashlib.sha256()
        for name, (number, _, size) in zip(self.names, self.places.tolist()):
            digest.update(f"{self.shards[number].name}/{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def contents(self) -> dict[str, str]:
        """Return digests of the names and sizes of all images, and of the beginning of a few."""
        names = (f"{self.shards[number].name}/{name}" for name, number in zip(self.names, self.places[:, 0].tolist()))
        places = (self.places[row].tolist() for row in sampled(len(self), OPENED))
        return {
            "names": names_digest(names),
            "sizes": numbers_digest(self.places[:, 2].tolist()),
            "bytes": digest(*(self._read(shard, start, min(size, FIRST_BYTES)) for shard, start, size in places)),
        }

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}  # file descriptors are not shared between processes

    def _read(self, number: int, offset: int, size: int) -> bytes:
        if self.remote is not None:
            return self.remote.read(number, offset, size)
        if number not in self._open:
            self._open[number] = os.open(self.shards[number], os.O_RDONLY)
        # Unlike read, pread keeps no position: forked workers may share the descriptor.
        return os.pread(self._open[number], size, offset)

    def _read_labels(self, classes: dict) -> tuple[list[int], list[str]]:
        labels = []
        for name, number in zip(self.names, self.places[:, 0].tolist()):
            stem = os.path.splitext(name)[0]
            if (number, stem) not in classes:
                raise UserError(
                    f"data.path: {self.shards[number].name} has {name} without {stem}.cls; "
                    "give every image its class, or none"
                )
            entry = classes[number, stem]
            text = (
                (entry if isinstance(entry, bytes) else self._read(number, *entry)).decode("utf-8", "replace").strip()
            )
            if not text.isascii() or not text.isdigit():
                raise UserError(
                    f"data.path: {self.shards[number].name}: {stem}.cls has {text[:20]!r}; "
                    "it must be a class number from 0"
                )
            labels.append(int(text))
        return labels, [str(k) for k in range(max(labels) + 1)]


def find_shards(path: str, split: str | None) -> list[Path]:
    """List the tar files of a path, sorted. Raises UserError where there are none."""
    if os.path.isdir(path):
        folder = Path(path) / split if split else Path(path)
        if not folder.is_dir():
            raise UserError(f"data.split: no folder {split!r} in {path}")
        shards = sorted(folder.glob("*.tar"))
        if not shards:
            packed = sorted(entry.name for entry in folder.iterdir() if ".tar." in entry.name or entry.suffix == ".tgz")
            remedy = f"; unpack {packed[0]} to .tar first, compressed ones cannot be read in place" if packed else ""
            raise UserError(f"data.path: no .tar files in {folder}{remedy}")
        return shards
    if split:
        raise UserError(f"data.split needs a folder of tar files, and data.path is {path}; leave data.split out")
    shards = [Path(name) for name in expand(path)]
    missing = next((shard for shard in shards if not shard.is_file()), None)
    if not shards or missing is not None:
        raise UserError(
            f"data.path: {missing or path} does not exist; "
            "give a tar file, a folder of them or a pattern such as train-{0000..0146}.tar"
        )
    return shards


def expand(path: str) -> list[str]:
    """Expand a pattern: {000..146} counts, * and ? match existing files."""
    return [
        name
        for one in numbered(path)
        for name in (sorted(glob.glob(one)) if any(letter in one for letter in "*?[") else [one])
    ]


def numbered(path: str) -> list[str]:
    """Expand {000..146} in a path to all its numbers."""
    match = RANGE.search(path)
    if not match:
        return [path]
    first, last = match.groups()
    before, after = path[: match.start()], path[match.end() :]
    paths = (f"{before}{k:0{len(first)}d}{after}" for k in range(int(first), int(last) + 1))
    return [name for one in paths for name in numbered(one)]


def labels_from_folders(names: list[str]) -> tuple[list[int] | None, list[str] | None]:
    """Derive labels and class names from the first folder below the common prefix; (None, None) where one lacks it."""
    folders = [name.removeprefix("./").split("/")[:-1] for name in names]
    depth = len(os.path.commonprefix(folders))
    if any(len(parts) <= depth for parts in folders):
        return None, None
    tops = [parts[depth] for parts in folders]
    classes = sorted(set(tops))
    index = {name: k for k, name in enumerate(classes)}
    return [index[top] for top in tops], classes


def first_of_each(labels: list[int], count: int) -> list[int]:
    """List the rows of the first `count` images of each label. Raises UserError for a count below 1."""
    if count < 1:
        raise UserError(f"data.per_class is {count}; it must be at least 1")
    seen: Counter = Counter()
    rows = []
    for row, label in enumerate(labels):
        seen[label] += 1
        if seen[label] <= count:
            rows.append(row)
    return rows
