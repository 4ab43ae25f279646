"""Dropout: draws that belong to a sample for a classifier, torch's own inside a transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwise.functional import draws
from maskwise.functional.errors import UserError


class KeyedDropout(nn.Module):
    """x [B, ...] with a share `rate` of its entries 0 and the others divided by 1 - rate; nothing outside train mode.

    With `key` int64 [B] an image's draws are a function of its key and `place`, a number of the caller's that tells its
    uses apart; without it torch draws.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, key: Tensor | None = None, place: int = 0) -> Tensor:
        """[B, ...] -> [B, ...]."""
        if not self.training or not self.rate:
            return x
        if key is None:
            return torch.nn.functional.dropout(x, self.rate)
        drawn = draws.uniform(draws.mix(key.to(x.device), place), x[0].numel()).view_as(x)
        return x * (drawn >= self.rate).to(x.dtype) / (1 - self.rate)


def drop_tokens_(backbone: nn.Module, rate: float) -> None:
    """Let a Vision Transformer drop entries where timm's `drop_rate` did: of the tokens at the start, after every projection and twice in every MLP.

    The draws are torch's: one for each of T * D entries in 37 places would, by key, cost as much as the blocks. Raises UserError for another backbone.
    """
    if getattr(backbone, "kind", "") != "VisionTransformer":
        raise UserError(f"method.dropout={rate} is for Vision Transformers and {getattr(backbone, 'name', 'this backbone')} is none: give 0, or classifier.dropout")
    places = [backbone.token_drop]
    for block in backbone.blocks:
        places += [block.attn.proj_drop, *(part for part in block.mlp.modules() if isinstance(part, nn.Dropout))]
    for place in places:
        place.p = rate
