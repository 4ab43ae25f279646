"""Augment whole batches on the device: color, blur, solarization and normalization, with Pillow's arithmetic.

Images are float32 with whole values 0..255, rounded after each operation as in Pillow. Each operation runs on its own
rows of the batch; there is no loop over samples and no device synchronization.
"""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from maskwise.data.batch import JITTER_OPS, ColorParams

MAX_VALUE = {torch.uint8: 255, torch.uint16: 65535}
NEEDS_RGB = ("saturation", "hue", "gray")
GRAY_WEIGHTS = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # Pillow's fixed-point luma, exact in float32


def augment(crops: torch.Tensor, params: ColorParams, mean, std) -> torch.Tensor:
    """Augment and normalize uint8 or uint16 crops [n, C, H, W] -> float32 on the same device.

    Order: jitter in each crop's own order, gray, blur, solarize, then (value / max - mean) / std. 8-bit RGB follows
    Pillow's arithmetic exactly, the rest `recolor_multichannel`. mean, std: one number per channel, for values in 0..1.
    """
    exact = crops.shape[1] == 3 and crops.dtype == torch.uint8
    images = recolor(crops, params) if exact else recolor_multichannel(crops, params)
    top = MAX_VALUE[crops.dtype]
    scale = torch.tensor([1 / (top * s) for s in std]).to(crops.device, non_blocking=True).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std)]).to(crops.device, non_blocking=True).view(-1, 1, 1)
    return images.mul_(scale).add_(shift)


def skipped_operations(channels: int) -> str | None:
    """Describe the color operations skipped for images of so many channels; None for RGB."""
    if channels == 3:
        return None
    return (
        f"images of {channels} channel{'s' * (channels != 1)}: {', '.join(NEEDS_RGB[:-1])} and {NEEDS_RGB[-1]} "
        "need RGB and are left out; brightness, contrast, blur and solarize stay"
    )


def recolor(crops: torch.Tensor, params: ColorParams) -> torch.Tensor:
    """Apply the color operations to uint8 RGB -> float32 [n, 3, H, W] of whole gray levels 0..255."""
    images = crops.to(torch.float32, memory_format=torch.contiguous_format)
    if images.data_ptr() == crops.data_ptr():
        images = images.clone()
    plan = params.with_plan().plan
    for op, first, last in plan.steps:
        rows = plan.rows[first:last]
        chosen = images.index_select(0, rows)
        if op == "gray":
            chosen = gray(chosen).expand_as(chosen)
        elif op == "blur":
            chosen = blur(chosen, params.sigma[rows], plan.reach)
        elif op == "solarize":
            chosen = solarize(chosen)
        else:
            chosen = JITTER[op](chosen, params.factors[rows, JITTER_OPS.index(op)].view(-1, 1, 1, 1))
        images.index_copy_(0, rows, chosen)
    return images


def recolor_multichannel(crops: torch.Tensor, params: ColorParams) -> torch.Tensor:
    """Apply the color operations in plain float arithmetic: any channels, uint8 or uint16 -> float32 [n, C, H, W].

    Saturation, hue and gray apply to three channels only; contrast blends with the mean over all channels.
    """
    top = MAX_VALUE[crops.dtype]
    images = crops.to(torch.float32)
    plan = params.with_plan().plan
    for op, first, last in plan.steps:
        if op in NEEDS_RGB and crops.shape[1] != 3:
            continue
        rows = plan.rows[first:last]
        chosen = images.index_select(0, rows)
        factor = params.factors[rows].view(-1, 4, 1, 1, 1)
        if op == "brightness":
            chosen = (chosen * factor[:, 0]).clamp(0, top)
        elif op == "contrast":
            middle = chosen.mean((1, 2, 3), keepdim=True)
            chosen = (middle + factor[:, 1] * (chosen - middle)).clamp(0, top)
        elif op == "blur":
            chosen = blur(chosen, params.sigma[rows], plan.reach)
        elif op == "solarize":
            chosen = torch.where(chosen <= top // 2, chosen, top - chosen)
        else:  # 16-bit RGB, with the 8-bit arithmetic
            chosen = chosen.mul(255 / top)
            if op == "gray":
                chosen = gray(chosen).expand_as(chosen)
            else:
                chosen = JITTER[op](chosen.floor(), factor[:, 2 if op == "saturation" else 3])
            chosen = chosen * (top / 255)
        images.index_copy_(0, rows, chosen)
    return images


def gray(images: torch.Tensor) -> torch.Tensor:
    """Compute the luma [n, 1, H, W] of [n, 3, H, W], rounded as in Pillow's conversion to mode L."""
    red, green, blue = images.unbind(1)
    luma = red * GRAY_WEIGHTS[0]
    luma.add_(green, alpha=GRAY_WEIGHTS[1]).add_(blue, alpha=GRAY_WEIGHTS[2]).add_(0.5)
    return luma.floor_().unsqueeze(1)


def brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with black in place, as ImageEnhance.Brightness; factor [n, 1, 1, 1]."""
    return images.mul_(factor).clamp_(max=255).floor_()


def contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the rounded mean luma in place, as ImageEnhance.Contrast; factor [n, 1, 1, 1]."""
    return blend_(images, gray(images).mean((1, 2, 3), keepdim=True).add_(0.5).floor_(), factor)


def saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the luma in place, as ImageEnhance.Color; factor [n, 1, 1, 1]."""
    return blend_(images, gray(images), factor)


def blend_(images: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Compute other + factor * (images - other) in place, clipped and truncated as in Pillow's blend."""
    return images.sub_(other).mul_(factor).add_(other).clamp_(0, 255).floor_()


def hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Shift the hue by `turns` [n, 1, 1, 1] on Pillow's 8-bit HSV; the shift is truncated to 255ths of a turn."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    position = torch.where(
        value == red, green - blue, torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    )
    position += (position < 0) * (6 * chroma)
    angle = hue_table(images.device)[position.add_(chroma, alpha=1536).long()].to(torch.float32)
    angle += (turns.flatten() * 255).trunc_().view(-1, 1, 1)
    angle.remainder_(256).mul_(6 / 255)
    amount = (chroma / value.clamp(min=1)).mul_(255).floor_().mul_(value).div_(255)
    shifted = torch.empty_like(images)
    for channel, (center, sign, base) in enumerate(((3, -1, 2), (2, 1, -1), (4, 1, -1))):
        fall = (angle - center).abs_().mul_(sign).add_(base).clamp_(0, 1)
        torch.sub(value, fall.mul_(amount), out=shifted[:, channel])
    return shifted.add_(0.5).floor_()


@lru_cache(maxsize=8)
def hue_table(device: torch.device) -> torch.Tensor:
    """Tabulate Pillow's 8-bit hue: uint8 [256 * 1536], indexed by chroma * 1536 + place on 6 * chroma steps.

    Computed with Pillow itself: no short formula reproduces its rounding of ties, and one hue step changes a pixel by
    up to six gray levels.
    """
    chroma = np.arange(256)[:, None]
    place = np.arange(1536)[None, :]
    corner = np.stack(
        [
            np.abs(place - 3 * chroma) - chroma,
            2 * chroma - np.abs(place - 2 * chroma),
            2 * chroma - np.abs(place - 4 * chroma),
        ],
        -1,
    )
    pixels = np.clip(corner, 0, chroma[..., None]).astype(np.uint8)
    table = np.asarray(Image.fromarray(pixels).convert("HSV"))[..., 0]
    return torch.from_numpy(table.flatten()).to(device)


def blur(images: torch.Tensor, sigma: torch.Tensor, reach: int) -> torch.Tensor:
    """Blur each image with its own sigma [n] in pixels, as ImageFilter.GaussianBlur(radius=sigma).

    Pillow makes three passes of a box with fractional ends over rows, then over columns, and repeats the border in each
    pass; here one matrix per image and direction. reach: `batch.box_reach` of the largest sigma.
    """
    count, channels, height, width = images.shape
    across = blur_matrix(sigma, width, reach)
    down = across if height == width else blur_matrix(sigma, height, reach)
    rows = banded(images.reshape(count, channels * height, width), across, 3 * reach).add_(0.5).floor_()
    columns = rows.view(images.shape).transpose(2, 3).reshape(count, channels * width, height)
    columns = banded(columns, down, 3 * reach).add_(0.5).floor_()
    return columns.view(count, channels, width, height).transpose(2, 3)


def banded(values: torch.Tensor, matrix: torch.Tensor, band: int, tile: int = 32) -> torch.Tensor:
    """Multiply values [n, R, S] by a band matrix [n, S, S], zero farther than `band` from its diagonal, in tiles."""
    size = matrix.shape[1]
    if size <= 2 * (tile + band):
        return torch.bmm(values, matrix)
    product = torch.empty_like(values)
    for first in range(0, size, tile):
        last, low, high = min(first + tile, size), max(first - band, 0), min(first + tile + band, size)
        product[..., first:last] = torch.bmm(values[..., low:high], matrix[:, low:high, first:last])
    return product


def blur_matrix(sigma: torch.Tensor, size: int, reach: int) -> torch.Tensor:
    """Build the blur matrices, float32 [n, size, size]; column i holds the source weights of blurred pixel i."""
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
    # Not one product: its rounding would depend on the number of rows.
    for k, offset in enumerate(range(-reach, reach + 1)):
        source = (place[:, None] + offset).clamp_(0, size - 1)
        box.addcmul_(weights[:, k, None, None], (source == place).float().T)
    return banded(banded(box, box, reach), box, reach)


def solarize(images: torch.Tensor) -> torch.Tensor:
    """Invert the levels from 128 on, as ImageOps.solarize(threshold=128)."""
    return torch.where(images < 128, images, 255 - images)


JITTER = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
