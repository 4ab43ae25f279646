"""The class token as a pooling."""

from __future__ import annotations

from maskwise.functional.errors import UserError
from maskwise.nn.pooling.pooling import Pooling
from maskwise.nn.tokens import Pooled, Tokens


class CLS(Pooling):
    """The class token and its attention in the last block: Tokens -> Pooled(vector [B, D], attention [B, H, N]).

    The attention's sum over patches is below 1: the rest went to the prefix tokens.
    Raises UserError for tokens without a class token.
    """

    needs = frozenset({"cls_attention"})
    gives_attention = True

    def forward(self, tokens: Tokens) -> Pooled:
        """Tokens -> Pooled."""
        if not isinstance(tokens, Tokens) or tokens.prefix.shape[1] == 0:
            raise UserError("pooling cls takes a backbone's tokens, class token included; pool bare patches or maps with another, such as simpool")
        return Pooled(tokens.prefix[:, 0], tokens.cls_attention)
