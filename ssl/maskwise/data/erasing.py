"""Random erasing: a rectangle of a normalised crop is overwritten; drawn in the worker, done on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskwise.data.batch import Erased
from maskwise.functional import draws

STREAM = 48  # beside the streams of functional.draws
AREA, ASPECT, TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10
MODES = ("pixel", "rand", "const")
AT_ONCE = 32  # rows for which noise is made together


def draw(samples: Tensor, epoch: int, views: int, size: int, prob: float, *, spared: int = 0, seed: int = 0) -> Erased | None:
    """What is erased of the `views` crops of each of n samples, size pixels square; None where nothing is.

    Each crop with probability `prob`, but the first `spared` views; a share of the area in 2 .. 33 %, height over width log-uniform in .3 .. 3.3,
    the first of ten tries that fits, anywhere. Keyed by (seed, epoch, sample, view). Zhong et al. 2020, with timm's ranges.
    """
    if prob == 0:
        return None
    key = draws.mix(STREAM, seed, epoch, samples, torch.arange(views)[:, None])  # [V, n]: crop-major
    u = draws.uniform(key, 3 + 2 * TRIES)
    area = size * size * (AREA[0] + (AREA[1] - AREA[0]) * u[..., 3::2])
    aspect = torch.exp(math.log(ASPECT[0]) + math.log(ASPECT[1] / ASPECT[0]) * u[..., 4::2])
    sides = torch.stack([(area * aspect).sqrt().round(), (area / aspect).sqrt().round()], dim=-1)  # [V, n, tries, 2]
    fits = (sides < size).all(dim=-1)
    first = fits.long().argmax(dim=-1)
    sides = sides.gather(2, first[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
    corner = (u[..., 1:3] * (size - sides + 1)).floor()
    chosen = (u[..., 0] < prob) & fits.any(dim=-1)
    chosen[:spared] = False
    rows = chosen.flatten().nonzero().flatten()
    if not len(rows):
        return None
    return Erased(rows, torch.cat([corner, sides], dim=-1).long().flatten(0, 1)[rows], key.flatten()[rows])


def erase(images: Tensor, erased: Erased | None, mode: str = "pixel") -> Tensor:
    """Overwrite the rectangles in normalised floats [B, C, H, W], in place: normal noise for each "pixel", one value a channel ("rand"), or 0 ("const")."""
    if erased is None:
        return images
    channels, height, width = images.shape[1:]
    down, across = torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)
    for rows, boxes, keys in zip(*(each.split(AT_ONCE) for each in (erased.rows, erased.boxes, erased.keys))):
        top, left, tall, wide = boxes[:, :, None, None].unbind(1)
        inside = (down >= top) & (down < top + tall) & (across >= left) & (across < left + wide)
        fill = torch.zeros(len(rows), 1, 1, 1, dtype=images.dtype, device=images.device)
        if mode != "const":
            shape = (channels, height, width) if mode == "pixel" else (channels, 1, 1)
            fill = normal(keys, math.prod(shape)).to(images.dtype).view(-1, *shape)
        images.index_copy_(0, rows, torch.where(inside[:, None], fill, images.index_select(0, rows)))
    return images


def normal(key: Tensor, n: int) -> Tensor:
    """n numbers from the standard normal for each key int64 [m] -> float64 [m, n], by Box and Muller."""
    u = draws.uniform(draws.mix(STREAM, key), 2 * (-(-n // 2)))
    radius, turn = torch.sqrt(-2 * torch.log1p(-u[:, 0::2])), 2 * math.pi * u[:, 1::2]
    return torch.cat([radius * torch.cos(turn), radius * torch.sin(turn)], dim=1)[:, :n]
