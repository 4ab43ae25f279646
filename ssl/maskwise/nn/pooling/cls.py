"""The class token as a pooling."""

from __future__ import annotations

from torch import nn

from maskwise.functional.errors import UserError
from maskwise.nn.tokens import Pooled, Tokens


class CLS(nn.Module):
    """The class token and its attention in the last block: Tokens -> Pooled(vector [B, D], attention [B, H, N]).

    The attention's sum over patches is below 1: the rest went to the prefix tokens.
    Raises UserError for tokens without a class token.
    """

    needs = frozenset({"cls_attention"})
    gives_attention = True

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, tokens: Tokens) -> Pooled:
        """Tokens -> Pooled."""
        if not isinstance(tokens, Tokens) or tokens.prefix.shape[1] == 0:
            raise UserError("pooling cls takes a backbone's tokens, class token included; pool bare patches or maps with simpool")
        return Pooled(tokens.prefix[:, 0], tokens.cls_attention)
