"""CLS token pooling."""

from __future__ import annotations

from torch import Tensor

from maskwise.errors import UserError
from maskwise.nn.pooling.base import Pooling
from maskwise.nn.tokens import Pooled, Tokens


class CLS(Pooling):
    """Return the CLS token [B, D] and its attention in the last block, [B, H, N].

    The attention sums to less than 1 over patches, since prefix tokens are among the keys.
    Raises UserError for tokens without a CLS token.
    """

    needs = frozenset({"cls_attention"})
    reads_patches = False
    gives_attention = True

    def forward(self, tokens: Tokens | Tensor) -> Pooled:
        """Return the first prefix token and its attention."""
        if isinstance(tokens, Tokens) and tokens.prefix.shape[1] > 0:
            return Pooled(tokens.prefix[:, 0], tokens.cls_attention)
        return super().forward(tokens)

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Raise UserError: patches alone hold no class token."""
        raise UserError(
            "pooling cls requires the tokens of a backbone with a class token: "
            "choose another pooling for bare patches or maps, such as simpool"
        )
