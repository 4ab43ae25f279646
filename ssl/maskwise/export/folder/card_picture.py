"""The attention picture of a model card, drawn on embedded public-domain images."""

from __future__ import annotations

import numpy as np
import torch

from maskwise.data.datasets.shapes import Shapes
from maskwise.functional.attention import patch_attention
from maskwise.imaging import drawing
from maskwise.nn.encoder import Encoder

NUM_IMAGES, TILE = 4, 160


@torch.no_grad()
def attention_picture(encoder: Encoder) -> np.ndarray | None:
    """Draw the attention of an encoder over embedded images: uint8 [H, W, 3].

    None for an encoder without attention, or for images other than RGB.
    """
    if len(encoder.mean) != 3:
        return None
    shapes = Shapes(count=NUM_IMAGES, size=max(32, *encoder.image_size), split="test")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (encoder.mean, encoder.std))
    rows = []
    for i in range(NUM_IMAGES):
        image = encoder.uint8_crop(shapes.image(i))
        features = encoder(((image.float() / 255 - mean) / std)[None])
        if features.attention is None:
            return None
        pixels = image.permute(1, 2, 0).numpy()
        heat = patch_attention(features.attention, encoder.pooling.k)[0].reshape(features.grid).numpy()
        rows.append([pixels, drawing.overlay_heat(pixels, heat, 0.75)])
    return drawing.sheet(rows, ["image", "attention"], tile=TILE)
