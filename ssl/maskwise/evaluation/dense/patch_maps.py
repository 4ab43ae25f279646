"""Maps of patch features of chosen blocks, for any backbone, and sliding windows over large images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.data.augmentation.segmentation_crop import aspect_size
from maskwise.errors import UserError
from maskwise.evaluation.features.views import patch_of
from maskwise.imaging.resize import resize_bilinear, resize_image, short_side

BLOCKS = (4, 6, 8, 12)  # of 12, counted from 1 (iBOT's and SimPool's segmentation of ViT-S)


def layers_of(encoder, blocks: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the layers to request, from 0: the given blocks (from 1), or blocks 4, 6, 8, 12 in proportion.

    All stages after the stem for feature maps; none for a model that has only its last patches. Raises UserError for
    blocks that the encoder does not have.
    """
    backbone = getattr(encoder, "backbone", None)
    stages = getattr(backbone, "stage_dims", None)
    count = 0 if backbone is None else backbone.depth if stages is None else len(stages) - 1
    if not count:
        if blocks is not None:
            raise UserError("blocks: this model gives its last patches only; leave blocks out")
        return ()
    if blocks is None:
        if stages is not None:
            return tuple(range(1, len(stages)))
        return tuple(sorted({max(0, count * block // 12 - 1) for block in BLOCKS}))
    if wrong := [block for block in blocks if not 1 <= block <= count]:
        raise UserError(f"blocks: {backbone.name} has blocks 1 to {count}, not {wrong[0]}")
    return tuple(block - 1 if stages is None else block for block in blocks)


def patch_map(encoder, images: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Return the concatenated features of `layers` on the patch grid: [B, C, H, W] -> float32 [B, F, h, w].

    Blocks of a transformer pass the final norm; stages of feature maps are raw and resized to the grid of the last but
    one.
    """
    if not layers:
        features = encoder(images, attention=False)
        return features.patches.float().transpose(1, 2).unflatten(2, features.grid)
    features = encoder(images, attention=False, layers=layers)
    if features.layers[0].ndim == 4:
        size = features.layers[max(0, len(layers) - 2)].shape[-2:]
        maps = [
            F.interpolate(stage.float(), size=size, mode="bilinear", align_corners=False) for stage in features.layers
        ]
    else:
        prefix = features.layers[0].shape[1] - features.grid[0] * features.grid[1]
        maps = [stage[:, prefix:].float().transpose(1, 2).unflatten(2, features.grid) for stage in features.layers]
    return torch.cat(maps, dim=1)


@dataclasses.dataclass(frozen=True)
class Whole:
    """Resize an image to a short side of `size`, both sides to multiples of the patch (bicubic, antialiased)."""

    size: int
    patch: tuple[int, int]

    def __call__(self, image: Tensor, index: int) -> Tensor:
        sides = short_side(tuple(image.shape[-2:]), self.size)
        height, width = (max(1, round(side / patch)) * patch for side, patch in zip(sides, self.patch))
        return resize_image(image, (height, width))

    def fingerprint(self) -> str:
        """Return the settings as text for cache keys."""
        return repr(self)


@dataclasses.dataclass(frozen=True)
class ShortSide:
    """Resize an image to a short side of `size`, the long one at most four times that (bilinear)."""

    size: int

    def __call__(self, image: Tensor, index: int) -> Tensor:
        return resize_bilinear(image, aspect_size(tuple(image.shape[-2:]), self.size))


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return the first pixels of windows over a side; the last window ends with the side."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(0, min(i * stride, length - window)) for i in range(count)]


def sliding_logits(predict: Callable[[Tensor], Tensor], image: Tensor, window: int, stride: int) -> Tensor:
    """Average the predictions of overlapping windows: [1, C, H, W] -> [1, K, H, W].

    predict: [1, C, h, w] -> [1, K, h, w] of the same size.
    """
    height, width = image.shape[-2:]
    total, count = None, torch.zeros(1, 1, height, width, device=image.device)
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            place = (..., slice(top, top + window), slice(left, left + window))
            logits = predict(image[place])
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], height, width)
            total[place] += logits
            count[place] += 1
    return total / count


def padded(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Pad normalized images [B, C, H, W] with zeros on the right and below to whole patches."""
    height, width = (-side % unit for side, unit in zip(images.shape[-2:], patch))
    return F.pad(images, (0, width, 0, height)) if height or width else images


def patch_classes(labels: Tensor, grid: tuple[int, int], patch: tuple[int, int], classes: int, ignored: int) -> Tensor:
    """Return the most frequent class of each patch, int64 [N]: labels [H, W] resized to the grid's pixels by nearest.

    `ignored` where at least half of a patch is unlabeled; of equally frequent classes the lowest.
    """
    size = tuple(side * pixels for side, pixels in zip(grid, patch))
    large = F.interpolate(labels[None, None].float(), size=size, mode="nearest")[0, 0].long()
    blocks = large.reshape(grid[0], patch[0], grid[1], patch[1]).transpose(1, 2).flatten(2).flatten(0, 1)
    cells = torch.where(blocks == ignored, classes, blocks) + (classes + 1) * torch.arange(len(blocks))[:, None]
    counts = torch.bincount(cells.flatten(), minlength=len(blocks) * (classes + 1)).reshape(-1, classes + 1)
    unlabeled = 2 * counts[:, classes] >= blocks.shape[1]
    return torch.where(unlabeled, ignored, counts[:, :classes].argmax(dim=1))


def window_of(encoder, size: int) -> int:
    """Return the largest window of at most `size` pixels that whole patches fill. Raises UserError below one patch."""
    patch = max(patch_of(encoder))
    if size < patch:
        raise UserError(f"size={size} is less than a patch of {patch} pixels; give more")
    return size // patch * patch
