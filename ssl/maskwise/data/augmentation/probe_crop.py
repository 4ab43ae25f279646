"""Augment images for linear probes: a random resized crop and a flip, keyed by (seed, epoch, index)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.data.multicrop import TRIES, MultiCrop
from maskwise.functional import keyed_random

STREAM = 40  # distinct from the streams of functional.keyed_random


class CropAndFlip:
    """Crop, resize and flip an image: uint8 or uint16 [C, H, W] and its dataset index -> the same dtype, [C, *size].

    The box covers `scale` of the area with `ratio` width over height, as in torchvision's RandomResizedCrop; resizing
    is antialiased bilinear, flipping has probability `flip` (linear evaluation of DINO, iBOT and AttMask).
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        flip: float = 0.5,
        seed: int = 0,
        epoch: int = 0,
    ):
        self.size, self.seed, self.epoch = tuple(size), seed, epoch
        self.scale, self.ratio, self.flip = tuple(scale), tuple(ratio), flip
        self.sampler = MultiCrop(global_scale=scale, local_number=0, ratio=ratio, flip=flip)

    def box(self, height: int, width: int, index: int) -> tuple[tuple[int, int, int, int], bool]:
        """Return the box (top, left, height, width) in an image of that size, and whether the crop is flipped."""
        key = keyed_random.make_key(STREAM, self.seed, self.epoch, index)
        uniforms = keyed_random.uniform(key, 2 * TRIES + 3).view(1, 1, -1).numpy()
        boxes, flips = self.sampler.boxes(uniforms, [(height, width)])
        return tuple(boxes[0, 0].tolist()), bool(flips[0, 0])

    def __call__(self, image: Tensor, index: int) -> Tensor:
        """Crop one image [C, H, W] of the given index -> [C, *size] of the same dtype."""
        (top, left, height, width), flipped = self.box(*image.shape[-2:], index)
        view = image[None, :, top : top + height, left : left + width]
        is_uint16 = image.dtype == torch.uint16  # torch can neither resize nor flip it
        view = F.interpolate(view.float() if is_uint16 else view, size=self.size, mode="bilinear", antialias=True)[0]
        view = view.flip(-1) if flipped else view
        return view.round().to(torch.uint16) if is_uint16 else view

    def fingerprint(self) -> str:
        """Describe the crop and its settings in one line."""
        return f"crop and flip {self.size} {self.scale} {self.ratio} {self.flip} seed {self.seed} epoch {self.epoch}"
