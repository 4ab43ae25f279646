"""Images to look at: files, folders, videos, arrays and tensors, read one after another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from maskwise.data.datasets.folder import Folder
from maskwise.data.decoding.image import CorruptImage
from maskwise.data.decoding.multichannel import decode
from maskwise.data.decoding.video import frame_count, is_video, read_frames, spread
from maskwise.errors import UserError
from maskwise.nn.transform import to_tensor
from maskwise.process.streams import print_notice


@dataclass
class Pictures:
    """Named images of one or several sources, of which `count` are read in order.

    sources: (names, function that yields (name, uint8, uint16 or float [C, H, W])). notes: lines for the user.
    """

    sources: list[tuple[int, Callable[[], Iterator[tuple[str, Tensor]]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The number of images."""
        return sum(count for count, _ in self.sources)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for _, read in self.sources:
            yield from read()


def opened_pictures(images: Sequence, channels: int, value_range=None, limit: int | None = None) -> Pictures:
    """Open image files, folders, video files, and what `Transform` takes.

    limit: of a folder or a video at most so many images are taken, evenly spread. channels, value_range: with which
    files are read. Raises UserError for a path where nothing is, and without any image.
    """
    pictures = Pictures()
    for number, image in enumerate(images):
        if not isinstance(image, (str, os.PathLike)):
            pictures.sources.append((1, given(image, f"image {number + 1}", channels)))
            continue
        path = Path(image).expanduser()
        if path.is_dir():
            add_folder(pictures, path, channels, value_range, limit)
        elif not path.is_file():
            raise UserError(f"{path} is not a file; give image files")
        elif channels == 3 and is_video(path):
            add_video(pictures, path, limit)
        else:
            pictures.sources.append((1, file(path, channels, value_range)))
    if not pictures.count:
        raise UserError("look: no images; give at least one")
    return pictures


def given(image, name: str, channels: int) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    """Return a reader of one PIL image, array or tensor."""
    return lambda: iter([(name, to_tensor(image, channels))])


def file(path: Path, channels: int, value_range) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    """Return a reader of one image file; it raises UserError for one that cannot be decoded."""

    def read() -> Iterator[tuple[str, Tensor]]:
        try:
            yield path.name, decode(path, str(path), channels, value_range=value_range)
        except CorruptImage as error:
            raise UserError(f"cannot read the image {path}: {error.reason}") from None

    return read


def add_folder(pictures: Pictures, path: Path, channels: int, value_range, limit: int | None) -> None:
    """Add the images of a folder, in sorted order; those that cannot be decoded are left out and named."""
    folder = Folder(path, channels=channels, value_range=value_range)
    numbers = spread(len(folder), limit)
    add_note(pictures, path, len(numbers), len(folder), "images")

    def read() -> Iterator[tuple[str, Tensor]]:
        for number in numbers:
            try:
                yield folder.name(number), folder.image(number)
            except CorruptImage as error:
                print_notice(f"look: {error.name} cannot be read and is left out: {error.reason}")

    pictures.sources.append((len(numbers), read))


def add_video(pictures: Pictures, path: Path, limit: int | None) -> None:
    """Add frames of a video file, named by their numbers."""
    total = frame_count(path)
    numbers = spread(total, limit)
    add_note(pictures, path, len(numbers), total, "frames")

    def read() -> Iterator[tuple[str, Tensor]]:
        for number, frame in read_frames(path, numbers):
            yield f"{path.stem} {number:05d}", frame

    pictures.sources.append((len(numbers), read))


def add_note(pictures: Pictures, path: Path, taken: int, total: int, noun: str) -> None:
    """Add the line that says how many images of a source are taken."""
    if taken < total:
        pictures.notes.append(f"{path}: {taken} of {total} {noun}, evenly spread; limit={total} takes all")
