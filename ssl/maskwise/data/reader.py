"""Images by index as the loader reads them: through one decoder, shrunk where that loses nothing, from memory where they fit."""

from functools import partial

import torch

from maskwise.data.decode import MAX_PIXELS, CorruptImage, decode, orientation_of, read
from maskwise.data.decoders import header
from maskwise.data.multicrop import Shrunk, channels_last
from maskwise.functional.errors import UserError

CACHE_BYTES = 1 << 30
ROW_OF_FAILURES = 100


class Decoded:
    """A dataset read through a decoder of ours, where it says what is to be decoded (`source(index)`: a path or bytes).

    decoder: one that `decoders.resolved` returned. Evaluations read `dataset.image` instead, which is Pillow's everywhere.
    """

    def __init__(self, dataset, decoder: str = "pil"):
        self.dataset, self.decoder = dataset, decoder
        self.labels = getattr(dataset, "labels", None)
        self.encoded = hasattr(dataset, "source")
        self.max_pixels = getattr(dataset, "max_pixels", MAX_PIXELS)

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> torch.Tensor:
        """uint8 [3, H, W]. Raises decode.CorruptImage."""
        if not self.encoded:
            return self.dataset.image(index)
        return decode(self.dataset.source(index), self.dataset.name(index), self.decoder, max_pixels=self.max_pixels)

    def shrunk(self, index: int, shrink) -> "torch.Tensor | Shrunk":
        """The image at 1 / shrink(height, width) of its size where it is a JPEG; whole otherwise. Raises decode.CorruptImage."""
        if not self.encoded:
            return self.dataset.image(index)
        source, name = self.dataset.source(index), self.dataset.name(index)
        try:
            data = read(source)
            found = header(data)
            turn = orientation_of(data, found)
        except Exception as error:  # as in `decode`
            raise CorruptImage.because(name, error) from None
        size = None if found is None else (found.width, found.height) if turn >= 5 else (found.height, found.width)
        by = 1 if size is None else shrink(*size)
        pixels = decode(data, name, self.decoder, by, max_pixels=self.max_pixels)
        return pixels if by == 1 else Shrunk(pixels, size)


class NoneReadable(UserError):
    """So many images in a row that cannot be read; `.corrupt` has their names and reasons."""

    def __init__(self, corrupt: dict[str, str]):
        name, reason = next(iter(corrupt.items()))
        super().__init__(f"{ROW_OF_FAILURES} images in a row could not be read (first {name}: {reason}); remove the damaged files or repair the data")
        self.corrupt = corrupt

    def __reduce__(self):
        return NoneReadable, (self.corrupt,)


class Reader:
    """Images by place in the batch and index; one that cannot be read gives way to the next that can.

    shrink: (place, height, width) -> the factor by which a JPEG of that size may be shrunk while decoded; None: by none.
    """

    def __init__(self, dataset, shrink=None):
        self.dataset, self.shrink = dataset, shrink
        self.read: list[int] = []
        self.corrupt: dict[str, str] = {}
        self.replaced = 0

    def __call__(self, place: int, index: int) -> "torch.Tensor | Shrunk":
        for tried in range(ROW_OF_FAILURES):
            candidate = (index + tried) % len(self.dataset)
            try:
                image = self.dataset.shrunk(candidate, partial(self.shrink, place)) if self.shrink else self.dataset.image(candidate)
            except CorruptImage as error:
                self.corrupt[error.name] = error.reason
                continue
            self.read.append(candidate)
            self.replaced += tried > 0
            return image
        raise NoneReadable(self.corrupt)


class Remembered:
    """A dataset that decodes each image once and keeps it."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.labels = getattr(dataset, "labels", None)
        self._images: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> torch.Tensor:
        """uint8 [3, H, W]. Raises decode.CorruptImage."""
        image = self._images.get(index)
        if image is None:
            image = self._images[index] = channels_last(self.dataset.image(index))[0]
        return image


def remembered(dataset, processes: int):
    """The dataset with a memory where `processes` copies of all its images fit into 1 GiB, judged by eight images."""
    sizes = []
    for k in range(min(8, len(dataset))):
        try:
            sizes.append(dataset.image(k * len(dataset) // min(8, len(dataset))).numel())
        except CorruptImage:
            continue
    if not sizes or processes * len(dataset) * sum(sizes) / len(sizes) > CACHE_BYTES:
        return dataset
    return Remembered(dataset)
