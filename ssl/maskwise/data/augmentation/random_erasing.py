"""Random erasing (Zhong et al. 2020): rectangles are sampled in the worker and overwritten on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskwise.data.batch import Erased
from maskwise.functional import keyed_random
from maskwise.imaging.resize import pair

STREAM = 48  # distinct from the streams of functional.keyed_random
AREA, ASPECT, TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10
MODES = ("pixel", "rand", "const")
CHUNK = 32  # rows whose noise is generated together


def sample(
    samples: Tensor, epoch: int, views: int, size: int | tuple[int, int], prob: float, *, skip: int = 0, seed: int = 0
) -> Erased | None:
    """Sample the erased rectangles of the `views` crops of n samples; None where there are none.

    size: side of a crop, or (h, w). Each crop with probability `prob`, except the first `skip` views; 2 to 33 % of the
    area, height over width log-uniform in 0.3 .. 3.3 (timm's ranges), the first of ten tries that fits. Keyed by (seed,
    epoch, sample, view).
    """
    if prob == 0:
        return None
    key = keyed_random.make_key(STREAM, seed, epoch, samples, torch.arange(views)[:, None])  # [V, n]: crop-major
    u = keyed_random.uniform(key, 3 + 2 * TRIES)
    area = math.prod(pair(size)) * (AREA[0] + (AREA[1] - AREA[0]) * u[..., 3::2])
    aspect = torch.exp(math.log(ASPECT[0]) + math.log(ASPECT[1] / ASPECT[0]) * u[..., 4::2])
    sides = torch.stack([(area * aspect).sqrt().round(), (area / aspect).sqrt().round()], dim=-1)  # [V, n, tries, 2]
    limit = torch.tensor(pair(size))
    fits = (sides < limit).all(dim=-1)
    first = fits.long().argmax(dim=-1)
    sides = sides.gather(2, first[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
    corner = (u[..., 1:3] * (limit - sides + 1)).floor()
    chosen = (u[..., 0] < prob) & fits.any(dim=-1)
    chosen[:skip] = False
    rows = chosen.flatten().nonzero().flatten()
    if not len(rows):
        return None
    return Erased(rows, torch.cat([corner, sides], dim=-1).long().flatten(0, 1)[rows], key.flatten()[rows])


def erase(images: Tensor, erased: Erased | None, mode: str = "pixel") -> Tensor:
    """Overwrite the rectangles in normalized floats [B, C, H, W], in place.

    mode: "pixel" fills with normal noise, "rand" with one normal value per channel, "const" with 0.
    """
    if erased is None:
        return images
    channels, height, width = images.shape[1:]
    down, across = torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)
    for rows, boxes, keys in zip(*(part.split(CHUNK) for part in (erased.rows, erased.boxes, erased.keys))):
        top, left, box_height, box_width = boxes[:, :, None, None].unbind(1)
        inside = (down >= top) & (down < top + box_height) & (across >= left) & (across < left + box_width)
        fill = torch.zeros(len(rows), 1, 1, 1, dtype=images.dtype, device=images.device)
        if mode != "const":
            shape = (channels, height, width) if mode == "pixel" else (channels, 1, 1)
            fill = normal(keys, math.prod(shape)).to(images.dtype).view(-1, *shape)
        images.index_copy_(0, rows, torch.where(inside[:, None], fill, images.index_select(0, rows)))
    return images


def normal(key: Tensor, n: int) -> Tensor:
    """Draw n standard normal numbers per key int64 [m] -> float64 [m, n] (Box and Muller)."""
    u = keyed_random.uniform(keyed_random.make_key(STREAM, key), 2 * (-(-n // 2)))
    radius, angle = torch.sqrt(-2 * torch.log1p(-u[:, 0::2])), 2 * math.pi * u[:, 1::2]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :n]
