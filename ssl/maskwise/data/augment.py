"""Colour, blur, solarisation and normalisation of whole batches of uint8 crops, with Pillow's arithmetic.

Images are held as float32 with whole values 0..255, rounded after each operation as Pillow does. An operation is
applied to the rows that drew it and to no others; there is no loop over samples and no question to the device.
"""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from maskwise.data import bands
from maskwise.data.batch import Colours

GREY_WEIGHTS = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # Pillow's fixed-point luma, exact in float32


def augment(crops: torch.Tensor, params: Colours, mean, std) -> torch.Tensor:
    """uint8 crops [n, 3, H, W] (other channels, uint16: `bands.augment`) and their colour parameters to normalised float32 on the same device.

    Order: jitter in each crop's own order, grey, blur, solarise, then (value / 255 - mean) / std (attmask.md 3).
    mean, std: three numbers each for values in 0..1.
    """
    if crops.shape[1] != 3 or crops.dtype != torch.uint8:
        return bands.augment(crops, params, mean, std)
    images = recolour(crops, params)
    scale = torch.tensor([1 / (255 * s) for s in std]).to(crops.device, non_blocking=True).view(3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std)]).to(crops.device, non_blocking=True).view(3, 1, 1)
    return images.mul_(scale).add_(shift)


def recolour(crops: torch.Tensor, params: Colours) -> torch.Tensor:
    """The colour operations alone: float32 [n, 3, H, W] of whole grey levels 0..255."""
    images = crops.to(torch.float32, memory_format=torch.contiguous_format)
    if images.data_ptr() == crops.data_ptr():
        images = images.clone()
    plan = params.planned().plan
    for op, first, last in plan.steps:
        rows = plan.rows[first:last]
        chosen = images.index_select(0, rows)
        if op == "grey":
            chosen = grey(chosen).expand_as(chosen)
        elif op == "blur":
            chosen = blur(chosen, params.sigma[rows], plan.reach)
        elif op == "solarize":
            chosen = solarize(chosen)
        else:
            place = ("brightness", "contrast", "saturation", "hue").index(op)
            chosen = JITTER[op](chosen, params.factors[rows, place].view(-1, 1, 1, 1))
        images.index_copy_(0, rows, chosen)
    return images


def grey(images: torch.Tensor) -> torch.Tensor:
    """Luma [n, 1, H, W] of [n, 3, H, W], rounded as Pillow's conversion to mode L."""
    red, green, blue = images.unbind(1)
    luma = red * GREY_WEIGHTS[0]
    luma.add_(green, alpha=GREY_WEIGHTS[1]).add_(blue, alpha=GREY_WEIGHTS[2]).add_(0.5)
    return luma.floor_().unsqueeze(1)


def brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with black: ImageEnhance.Brightness, in place. factor [n, 1, 1, 1]."""
    return images.mul_(factor).clamp_(max=255).floor_()


def contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the rounded mean luma: ImageEnhance.Contrast, in place. factor [n, 1, 1, 1]."""
    return blend_(images, grey(images).mean((1, 2, 3), keepdim=True).add_(0.5).floor_(), factor)


def saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the luma: ImageEnhance.Color, in place. factor [n, 1, 1, 1]."""
    return blend_(images, grey(images), factor)


def blend_(images: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """other + factor * (images - other), clipped and truncated as Pillow's blend."""
    return images.sub_(other).mul_(factor).add_(other).clamp_(0, 255).floor_()


def hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Shift the hue by `turns` [n, 1, 1, 1] of a circle on Pillow's 8-bit HSV; the shift is whole 255ths of a turn."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    position = torch.where(value == red, green - blue,
                           torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma))
    position += (position < 0) * (6 * chroma)
    angle = hue_table(images.device)[position.add_(chroma, alpha=1536).long()].to(torch.float32)
    angle += (turns.flatten() * 255).trunc_().view(-1, 1, 1)
    angle.remainder_(256).mul_(6 / 255)
    amount = (chroma / value.clamp(min=1)).mul_(255).floor_().mul_(value).div_(255)
    shifted = torch.empty_like(images)
    for channel, (centre, sign, base) in enumerate(((3, -1, 2), (2, 1, -1), (4, 1, -1))):
        fall = (angle - centre).abs_().mul_(sign).add_(base).clamp_(0, 1)
        torch.sub(value, fall.mul_(amount), out=shifted[:, channel])
    return shifted.add_(0.5).floor_()


@lru_cache(maxsize=8)
def hue_table(device: torch.device) -> torch.Tensor:
    """Pillow's 8-bit hue as uint8 [256 * 1536], indexed by chroma * 1536 + place on the circle of 6 * chroma steps.

    Asked of Pillow itself: its float rounding decides ties that no short formula repeats, and one step of hue is
    up to six grey levels.
    """
    chroma = np.arange(256)[:, None]
    place = np.arange(1536)[None, :]
    corner = np.stack([np.abs(place - 3 * chroma) - chroma, 2 * chroma - np.abs(place - 2 * chroma),
                       2 * chroma - np.abs(place - 4 * chroma)], -1)
    pixels = np.clip(corner, 0, chroma[..., None]).astype(np.uint8)
    table = np.asarray(Image.fromarray(pixels).convert("HSV"))[..., 0]
    return torch.from_numpy(table.flatten()).to(device)


def blur(images: torch.Tensor, sigma: torch.Tensor, reach: int) -> torch.Tensor:
    """Gaussian blur of each image with its own sigma [n] in pixels: ImageFilter.GaussianBlur(radius=sigma).

    Pillow's is three passes of a box with fractional ends over rows, then over columns, the border repeated in
    each pass; here one matrix per image and direction. reach: `batch.box_reach` of the largest sigma.
    """
    count, channels, height, width = images.shape
    across = blur_matrix(sigma, width, reach)
    down = across if height == width else blur_matrix(sigma, height, reach)
    rows = banded(images.reshape(count, channels * height, width), across, 3 * reach).add_(0.5).floor_()
    columns = rows.view(images.shape).transpose(2, 3).reshape(count, channels * width, height)
    columns = banded(columns, down, 3 * reach).add_(0.5).floor_()
    return columns.view(count, channels, width, height).transpose(2, 3)


def banded(values: torch.Tensor, matrix: torch.Tensor, band: int, tile: int = 32) -> torch.Tensor:
    """values [n, R, S] @ matrix [n, S, S] that is zero farther than `band` from its diagonal, most zeros left out."""
    size = matrix.shape[1]
    if size <= 2 * (tile + band):
        return torch.bmm(values, matrix)
    product = torch.empty_like(values)
    for first in range(0, size, tile):
        last, low, high = min(first + tile, size), max(first - band, 0), min(first + tile + band, size)
        product[..., first:last] = torch.bmm(values[..., low:high], matrix[:, low:high, first:last])
    return product


def blur_matrix(sigma: torch.Tensor, size: int, reach: int) -> torch.Tensor:
    """float32 [n, size, size]: column i holds the weights of the pixels that make up blurred pixel i."""
    variance = sigma.square() / 3
    whole = ((12 * variance + 1).sqrt() - 1).div(2).floor()
    ends = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1).square()))
    offsets = torch.arange(-reach, reach + 1, device=sigma.device)
    distance = offsets.abs()[None]
    whole, ends = whole[:, None], ends[:, None]
    weights = (distance <= whole) + (distance == whole + 1) * ends
    weights = weights / (2 * (whole + ends) + 1)
    place = torch.arange(size, device=sigma.device)
    box = torch.zeros(len(sigma), size, size, device=sigma.device)
    for k, offset in enumerate(range(-reach, reach + 1)):  # not one product: its rounding would depend on the number of rows
        source = (place[:, None] + offset).clamp_(0, size - 1)
        box.addcmul_(weights[:, k, None, None], (source == place).float().T)
    return banded(banded(box, box, reach), box, reach)


def solarize(images: torch.Tensor) -> torch.Tensor:
    """Invert the levels from 128 on: ImageOps.solarize(threshold=128)."""
    return torch.where(images < 128, images, 255 - images)


JITTER = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
