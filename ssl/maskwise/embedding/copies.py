"""Altered copies of images, and the threshold above which this model takes two images for copies."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskwise.data.decoding.image import CorruptImage
from maskwise.embedding.neighbors import row_products, unit
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.imaging.resize import resize_image

SAMPLE = 200  # images of which copies are made, evenly spread
FALSE_WEIGHT = 2.0  # an image wrongly taken for a copy counts as that many missed copies
LEAST = 0.5  # lowest threshold that is chosen


def resized(image: Tensor) -> Tensor:
    """Resize to half the size."""
    return resize_image(image, tuple(max(1, side // 2) for side in image.shape[-2:]))


def reencoded(image: Tensor) -> Tensor:
    """Encode as a JPEG of quality 60 and decode; other than 8-bit gray or RGB images lose their lowest bits instead."""
    if image.dtype != torch.uint8 or len(image) not in (1, 3):
        step = 16 if image.dtype == torch.uint8 else 4096
        return (image.to(torch.int64) // step * step).to(image.dtype)
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, "JPEG", quality=60)
    decoded = np.array(Image.open(file))
    return torch.from_numpy(decoded).reshape(*decoded.shape[:2], -1).permute(2, 0, 1).contiguous()


def cropped(image: Tensor) -> Tensor:
    """Cut 10 % of height and width off, unevenly on both sides."""
    height, width = image.shape[-2:]
    top, left = height * 3 // 100, width * 7 // 100
    return image[..., top : top + height - height // 10, left : left + width - width // 10].contiguous()


def flipped(image: Tensor) -> Tensor:
    """Mirror left and right."""
    return image.flip(-1)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "resized": resized,
    "re-encoded": reencoded,
    "cropped": cropped,
    "flipped": flipped,
}
MIRROR: tuple[Callable[[Tensor], Tensor], ...] = (flipped,)  # views of an image that are compared with the others


class Copies:
    """A dataset of altered copies: image k is row rows[k] of `pictures`, changed."""

    labels = None

    def __init__(self, picture: Callable[[int], Tensor | None], rows: list[int], change: Callable[[Tensor], Tensor]):
        self.picture, self.rows, self.change = picture, rows, change

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Tensor:
        """Return one copy. Raises CorruptImage where its image cannot be read."""
        image = self.picture(self.rows[index])
        if image is None:
            raise CorruptImage(self.name(index), "its image cannot be read")
        return self.change(image)

    def name(self, index: int) -> str:
        """Return a name of one copy."""
        return f"copy of row {self.rows[index]}"


@dataclass(frozen=True)
class Calibration:
    """A threshold, the share of copies above it by change, and that of images with another one above it."""

    threshold: float
    found: dict[str, float]
    others: float
    images: int

    def line(self) -> str:
        """Return one line for the console."""
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in self.found.items())
        return (
            f"threshold {self.threshold:.4f}, from copies of {self.images} of these images: above it lie {shares}; "
            f"{100 * self.others:.0f} % of these images have another image above it"
        )


def calibrate(encoder, vectors: Tensor, picture: Callable, feature: str, views: Sequence[Callable], **options):
    """Choose the cosine that separates altered copies of these images best from other images -> Calibration.

    vectors [n, D]; picture(row) -> image or None; views: of an image, beside the image itself, that are compared;
    options: batch_size and precision of the extraction. The threshold maximizes the share of copies above it minus
    FALSE_WEIGHT times the share of images whose nearest other image is above it; copies that the set holds already
    raise the latter for all thresholds alike. Raises UserError where no image can be read.
    """
    count = min(SAMPLE, len(vectors))
    rows = [k * len(vectors) // count for k in range(count)]

    def embedded(change: Callable) -> tuple[Tensor, Tensor]:
        dataset = Copies(picture, rows, change)
        found, index, _ = extract.extract_rows(encoder, dataset, [feature], torch.arange(count), **options)
        if not len(index):
            raise UserError("the threshold cannot be measured, since no image can be read; give threshold=0.95")
        return unit(found[feature]), index

    bank = unit(vectors)
    seen = [(bank[torch.tensor(rows)], torch.arange(count)), *map(embedded, views)]
    others = torch.stack([nearest_others(bank, rows, *view) for view in seen]).amax(dim=0)
    similar = {}
    for name, change in CHANGES.items():
        copies, index = embedded(change)
        best = torch.full((count,), -1.0, dtype=torch.float64)
        for originals, of_view in seen:
            both = [k for k in of_view.tolist() if k in set(index.tolist())]
            i, j = (torch.searchsorted(known, torch.tensor(both)) for known in (index, of_view))
            best[both] = torch.maximum(best[both], row_products(copies, i, originals, j))
        similar[name] = best[index]
    threshold = separating(torch.cat(list(similar.values())), others)
    found = {name: float((values >= threshold).double().mean()) for name, values in similar.items()}
    return Calibration(threshold, found, float((others >= threshold).double().mean()), count)


def nearest_others(bank: Tensor, rows: list[int], queries: Tensor, index: Tensor, block: int = 65536) -> Tensor:
    """Return the largest product of a view of some rows with another row of unit vectors [n, D] -> float64 [m].

    queries [q, D]: the view of rows[k] for k in `index`; -1 for others.
    """
    best = torch.full((len(rows),), -1.0)
    for start in range(0, len(bank), block):
        products = queries @ bank[start : start + block].T
        for place, k in enumerate(index.tolist()):
            if start <= rows[k] < start + products.shape[1]:
                products[place, rows[k] - start] = -1.0
        best[index] = torch.maximum(best[index], products.amax(dim=1))
    return best.double()


def separating(copies: Tensor, others: Tensor) -> float:
    """Return the threshold between similarities of copies [c] and of other images [m], rounded down to 4 decimals."""
    candidates = torch.unique(copies)
    missed = torch.searchsorted(candidates.new_tensor(sorted(copies.tolist())), candidates) / len(copies)
    false = 1 - torch.searchsorted(torch.sort(others).values, candidates) / len(others)
    score = (1 - missed) - FALSE_WEIGHT * false
    best = float(candidates[score == score.max()].max())
    below = others[others < best]
    gap = best - float(below.max()) if len(below) else 0.0
    return max(LEAST, math.floor((best - gap / 2) * 1e4) / 1e4)
