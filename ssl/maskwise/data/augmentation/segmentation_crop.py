"""Augment images with label maps: random size, crop, flip and color, as mmsegmentation 0.30 does for ADE20K."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from maskwise.functional import keyed_random
from maskwise.imaging.resize import resize_bilinear

STREAM = 46  # of keyed random numbers, distinct from those of functional.keyed_random
IGNORED = 255
LONGEST = 4  # the long side, in short sides, beyond which an image is resized by its long side
TRIES = 10


def aspect_size(size: tuple[int, int], short: float, longest: float = LONGEST) -> tuple[int, int]:
    """Return the size (h, w) of the same aspect with that short side, or a long side of `longest` times it."""
    scale = min(short * longest / max(size), short / min(size))
    height, width = (int(side * scale + 0.5) for side in size)
    return height, width


class SegmentationCrop:
    """Resize by a ratio of .5 to 2, crop a square, flip, and distort colors, keyed by (seed, epoch, index).

    A crop of which one class covers 75 % or more of the labeled pixels is drawn again, at most ten times.
    augment: False takes the center of the image at ratio 1 and changes nothing else.
    """

    def __init__(self, size: int, *, seed: int = 0, epoch: int = 0, augment: bool = True, most: float = 0.75):
        self.size, self.seed, self.epoch, self.augment, self.most = size, seed, epoch, augment, most

    def __call__(self, image: Tensor, labels: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Map uint8 [C, H, W] and labels int64 [H, W] to crops of at most `size` on each side."""
        u = keyed_random.uniform(keyed_random.make_key(STREAM, self.seed, self.epoch, index), 16 + 2 * (TRIES + 1))
        u = u.tolist()
        ratio = 0.5 + 1.5 * u[0] if self.augment else 1.0
        target = aspect_size(tuple(image.shape[-2:]), self.size * ratio)
        image = resize_bilinear(image, target)
        labels = F.interpolate(labels[None, None].float(), size=target, mode="nearest")[0, 0].long()
        room = [max(0, side - self.size) for side in target]
        top, left = (gap // 2 for gap in room)
        for attempt in range(TRIES + 1 if self.augment else 0):
            top, left = (int(v * (gap + 1)) for v, gap in zip(u[16 + 2 * attempt :], room))
            if self.varied(labels[top : top + self.size, left : left + self.size]):
                break
        image = image[:, top : top + self.size, left : left + self.size]
        labels = labels[top : top + self.size, left : left + self.size]
        if self.augment and u[1] < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        return (distort(image, u[2:16]) if self.augment and len(image) == 3 else image), labels

    def varied(self, labels: Tensor) -> bool:
        """Return whether a crop has several classes of which none covers `most` of the labeled pixels."""
        counts = torch.bincount(labels[labels != IGNORED])
        return int((counts > 0).sum()) > 1 and float(counts.max() / counts.sum()) < self.most


def distort(image: Tensor, u) -> Tensor:
    """Change brightness, contrast, saturation and hue, each with probability 1/2: uint8 [3, H, W], 9 uniforms.

    Brightness by -32..32, contrast and saturation by factors .5..1.5, hue by -36..36 degrees; contrast comes first or
    last with equal probability.
    """
    pixels = image.float()
    contrast = (0.5 + u[3]) if u[2] < 0.5 else None
    if u[0] < 0.5:
        pixels = (pixels + (64 * u[1] - 32)).clamp(0, 255)
    if contrast is not None and u[4] < 0.5:
        pixels = (pixels * contrast).clamp(0, 255)
    if u[5] < 0.5 or u[7] < 0.5:
        picture = Image.fromarray(np.ascontiguousarray(pixels.round().to(torch.uint8).permute(1, 2, 0).numpy()))
        hsv = np.array(picture.convert("HSV")).astype(np.int64)
        if u[5] < 0.5:
            hsv[..., 1] = (hsv[..., 1] * (0.5 + u[6])).clip(0, 255)
        if u[7] < 0.5:
            hsv[..., 0] = (hsv[..., 0] + round((2 * u[8] - 1) * 25.6)) % 256
        colored = Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")
        pixels = torch.from_numpy(np.array(colored)).permute(2, 0, 1).float()
    if contrast is not None and u[4] >= 0.5:
        pixels = (pixels * contrast).clamp(0, 255)
    return pixels.round().to(torch.uint8)
