"""The attention picture of a card, drawn on the embedded images, which belong to nobody."""

from __future__ import annotations

import numpy as np
import torch

from maskwise.data.shapes import Shapes
from maskwise.functional import draw
from maskwise.functional.attention import mean_heads
from maskwise.nn.encoder import Encoder

SHOWN, TILE = 4, 160


@torch.no_grad()
def attention_picture(encoder: Encoder) -> np.ndarray | None:
    """Embedded images and the encoder's attention in them -> uint8 [H, W, 3]; None for an encoder without attention, or of other images than RGB."""
    if len(encoder.mean) != 3:
        return None
    shapes = Shapes(count=SHOWN, size=max(32, *encoder.image_size), split="test")
    rows = []
    for i in range(SHOWN):
        image = encoder.uncoloured(shapes.image(i))
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (encoder.mean, encoder.std))
        seen = encoder(((image.float() / 255 - mean) / std)[None])
        if seen.attention is None:
            return None
        plain = image.permute(1, 2, 0).numpy()
        rows.append([plain, draw.overlay_heat(plain, mean_heads(seen.attention)[0].reshape(seen.grid).numpy(), 0.75)])
    return draw.sheet(rows, ["image", "attention"], tile=TILE)
