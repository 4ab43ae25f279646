"""Read images by index for the loader: choose the decoder, shrink while decoding, cache, replace unreadable images."""

from collections.abc import Callable
from functools import partial

import torch

from maskwise.data.decoding.image import MAX_PIXELS, CorruptImage, decode, orientation_of, read
from maskwise.data.decoding.jpeg import read_header
from maskwise.data.multicrop import ScaledImage, channels_last
from maskwise.errors import UserError

CACHE_BYTES = 1 << 30
MAX_FAILURES_IN_A_ROW = 100


class DecodedDataset:
    """Wrap a dataset to decode its encoded images (`dataset.source(index)`: a path or bytes) with a chosen decoder.

    Datasets without `source`, not of 8-bit RGB, or with a range of values are read through `dataset.image`, which uses
    Pillow.
    decoder: a name that `jpeg.resolve_decoder` returned.
    """

    def __init__(self, dataset, decoder: str = "pil"):
        self.dataset, self.decoder = dataset, decoder
        self.labels = getattr(dataset, "labels", None)
        self.channels, self.bits = getattr(dataset, "channels", 3), getattr(dataset, "bits", 8)
        plain = (self.channels, self.bits, getattr(dataset, "value_range", None)) == (3, 8, None)
        self.encoded = hasattr(dataset, "source") and plain
        self.max_pixels = getattr(dataset, "max_pixels", MAX_PIXELS)
        self.bytes_per_pixel = self.channels * self.bits // 8

    def __len__(self) -> int:
        return len(self.dataset)

    def expect(self, indices: list[int]) -> None:
        """Announce the images that are read next, to a dataset that reads ahead."""
        if hasattr(self.dataset, "expect"):
            self.dataset.expect(indices)

    def image(self, index: int) -> torch.Tensor:
        """Decode one image to uint8 [3, H, W]. Raises CorruptImage."""
        if not self.encoded:
            return self.dataset.image(index)
        return decode(self.dataset.source(index), self.dataset.name(index), self.decoder, max_pixels=self.max_pixels)

    def scaled_image(self, index: int, shrink_factor: Callable[[int, int], int]) -> torch.Tensor | ScaledImage:
        """Decode a JPEG at 1 / shrink_factor(height, width) of its size, other files in full. Raises CorruptImage."""
        if not self.encoded:
            return self.dataset.image(index)
        source, name = self.dataset.source(index), self.dataset.name(index)
        try:
            data = read(source)
            header = read_header(data)
            orientation = orientation_of(data, header)
        except Exception as error:  # as in `decode`
            raise CorruptImage.because(name, error) from None
        if header is None:
            return decode(data, name, self.decoder, max_pixels=self.max_pixels)
        transposed = orientation >= 5
        size = (header.width, header.height) if transposed else (header.height, header.width)
        factor = shrink_factor(*size)
        pixels = decode(data, name, self.decoder, factor, max_pixels=self.max_pixels)
        return pixels if factor == 1 else ScaledImage(pixels, size)


class NoReadableImages(UserError):
    """Report too many unreadable images in a row; `.corrupt` maps their names to reasons."""

    def __init__(self, corrupt: dict[str, str]):
        name, reason = next(iter(corrupt.items()))
        super().__init__(
            f"{MAX_FAILURES_IN_A_ROW} images in a row could not be read (first {name}: {reason}); "
            "remove the damaged files or repair the data; a run then continues with --accept-changed-data"
        )
        self.corrupt = corrupt

    def __reduce__(self):
        return NoReadableImages, (self.corrupt,)


class Reader:
    """Read images by place in the batch and index, replacing an unreadable image by the next readable one.

    shrink_factor: (place, height, width) -> factor by which a JPEG may be shrunk while decoded; None: never.
    `.read` lists the indices read, `.corrupt` maps unreadable files to reasons, `.replaced` counts replacements.
    """

    def __init__(self, dataset, shrink_factor: Callable[[int, int, int], int] | None = None):
        self.dataset, self.shrink_factor = dataset, shrink_factor
        self.read: list[int] = []
        self.corrupt: dict[str, str] = {}
        self.replaced = 0

    def __call__(self, place: int, index: int) -> torch.Tensor | ScaledImage:
        for failures in range(MAX_FAILURES_IN_A_ROW):
            candidate = (index + failures) % len(self.dataset)
            try:
                if self.shrink_factor is None:
                    image = self.dataset.image(candidate)
                else:
                    image = self.dataset.scaled_image(candidate, partial(self.shrink_factor, place))
            except CorruptImage as error:
                self.corrupt[error.name] = error.reason
                continue
            self.read.append(candidate)
            self.replaced += failures > 0
            return image
        raise NoReadableImages(self.corrupt)


class CachedDataset:
    """Wrap a decoded dataset to decode each image once and keep it in memory."""

    def __init__(self, dataset: DecodedDataset):
        self.dataset = dataset
        self.labels, self.bytes_per_pixel = dataset.labels, dataset.bytes_per_pixel
        self._images: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def expect(self, indices: list[int]) -> None:
        """Announce the images that are read next, those in memory aside."""
        self.dataset.expect([index for index in indices if index not in self._images])

    def image(self, index: int) -> torch.Tensor:
        """Return one image, uint8 [3, H, W]. Raises CorruptImage."""
        image = self._images.get(index)
        if image is None:
            image = self._images[index] = channels_last(self.dataset.image(index))[0]
        return image


def cached_if_small(dataset: DecodedDataset, processes: int) -> DecodedDataset | CachedDataset:
    """Cache the dataset where `processes` copies of it fit into 1 GiB, estimated from eight images."""
    sizes = []
    for k in range(min(8, len(dataset))):
        try:
            sizes.append(dataset.image(k * len(dataset) // min(8, len(dataset))).numel())
        except CorruptImage:
            continue
    if not sizes or processes * len(dataset) * sum(sizes) / len(sizes) > CACHE_BYTES:
        return dataset
    return CachedDataset(dataset)
