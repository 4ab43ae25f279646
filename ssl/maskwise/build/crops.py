"""Square crops of given images, as an encoder takes them, and the masking that is drawn on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from maskwise.errors import UserError
from maskwise.methods.masking import MASKINGS, NoMasking


def masking_rule(encoder, masking: str, ratio: float):
    """Return the masking of `look`; raises UserError for one that the encoder's attention does not allow."""
    from maskwise.nn.encoder import pooling_name

    pooling = getattr(encoder, "pooling", None)
    attends = getattr(pooling, "gives_attention", False)
    if not attends and (masking == "none" or MASKINGS[masking].needs_attention):
        subject = "this model" if pooling is None else f"pooling {pooling_name(pooling)}"
        raise UserError(
            f"look: {subject} gives no attention to draw or to mask by; masking=random or masking=block draws masks "
            "alone"
        )
    return NoMasking() if masking == "none" else MASKINGS[masking](ratio=ratio, var=0.0, prob=1.0)


def uint8_crops(encoder, images: Sequence, value_range, size: int | None) -> torch.Tensor:
    """Return the encoder's crops of images, uint8 or uint16 [n, C, S, S]; raises UserError for none."""
    crops = [uint8_crop(encoder, image, value_range, size) for image in images]
    if not crops:
        raise UserError("look: no images; give at least one")
    return torch.stack(crops)


def uint8_crop(encoder, image, value_range=None, size: int | None = None) -> torch.Tensor:
    """Return the encoder's crop of a file, or of what `encoder.transform` takes, as uint8.

    value_range: with which a file is read. size: of the crop, by default the encoder's. Raises UserError for a file
    that is missing or cannot be read.
    """
    from maskwise.data.decoding.multichannel import CorruptImage, decode

    if isinstance(image, (str, os.PathLike)):
        path = os.path.expanduser(image)
        if not Path(path).is_file():
            raise UserError(f"{path} is not a file; give image files")
        try:
            image = decode(path, str(path), len(encoder.mean), value_range=value_range)
        except CorruptImage as error:
            raise UserError(f"cannot read the image {path}: {error.reason}") from None
    if size is None:
        crop = encoder.uint8_crop(image)
    else:
        crop = replace(encoder.transform, size=(size, size)).crop(image)
    if crop.dtype == torch.uint8:
        return crop
    scale = 255 if crop.is_floating_point() else 1 / 257
    return (crop.float() * scale).round().to(torch.uint8)
