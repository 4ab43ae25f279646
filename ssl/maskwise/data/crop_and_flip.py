"""The augmentation of linear probes: one random resized crop and a flip, keyed by sample and epoch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.data.multicrop import TRIES, MultiCrop
from maskwise.functional import draws

STREAM = 40  # beside the streams of functional.draws


class CropAndFlip:
    """View of an image of an epoch: uint8 or uint16 [C, H, W], its index in the dataset -> the same, [C, *size].

    A box of `scale` of the area and `ratio` width over height, as torchvision's RandomResizedCrop draws it, resized by antialiased
    bilinear interpolation, flipped with probability `flip`; a pure function of (seed, epoch, index). attmask.md 5.3.
    """

    def __init__(self, size: tuple[int, int], *, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip: float = 0.5, seed: int = 0, epoch: int = 0):
        self.size, self.seed, self.epoch = tuple(size), seed, epoch
        self.scale, self.ratio, self.flip = tuple(scale), tuple(ratio), flip
        self.rule = MultiCrop(global_scale=scale, local_number=0, ratio=ratio, flip=flip)

    def box(self, height: int, width: int, index: int) -> tuple[tuple[int, int, int, int], bool]:
        """(top, left, height, width) in an image of that size, and whether it is flipped."""
        uniforms = draws.uniform(draws.mix(STREAM, self.seed, self.epoch, index), 2 * TRIES + 3).view(1, 1, -1).numpy()
        boxes, flips = self.rule.boxes(uniforms, [(height, width)])
        return tuple(boxes[0, 0].tolist()), bool(flips[0, 0])

    def __call__(self, image: Tensor, index: int) -> Tensor:
        """uint8 or uint16 [C, H, W], index -> the same, [C, *size]."""
        (top, left, height, width), flipped = self.box(*image.shape[-2:], index)
        view = image[None, :, top : top + height, left : left + width]
        wide = image.dtype == torch.uint16  # torch neither resizes nor flips it
        view = F.interpolate(view.float() if wide else view, size=self.size, mode="bilinear", antialias=True)[0]
        view = view.flip(-1) if flipped else view
        return view.round().to(torch.uint16) if wide else view

    def fingerprint(self) -> str:
        """What it does, in words."""
        return f"crop and flip {self.size} {self.scale} {self.ratio} {self.flip} seed {self.seed} epoch {self.epoch}"
