"""MAP's tokens as a pooling: groups of tokens that attend to the patches (MAP, sec. 4.1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from maskwise.bounds import Count
from maskwise.nn.multi_token.head import MAP, Attended
from maskwise.nn.multi_token.options import AttentionOptions, TokenOptions
from maskwise.nn.option_groups import option_groups
from maskwise.nn.pooling.base import Pooling, check_choice
from maskwise.nn.tokens import Pooled

MAX_GRAM_WIDTH = 192  # by default; above it the grouped convolution of GramianTokens outweighs the backbone


class MAPPooling(Pooling):
    """Mean of MAP's groups x tokens on the last map, without fusion, averaged tokens or dropout.

    reduce="max_logit" also returns the tokens in `Pooled.vectors`, and a classifier takes the largest of their logits
    for each class; with "mean" a linear classifier sums them, as in the paper.
    Attention: [B, groups * num_heads, N], the mean over a group's tokens; it sums to less than 1 with
    keys="tokens+pixels" and to 1 with "pixels". gram_width: by default the largest up to 192 whose triangle `tokens`
    divide. gram=False starts from random tokens, since equal ones would stay equal under the mean.
    Other arguments as in MAP.
    """

    gives_attention = True

    @option_groups
    def __init__(
        self,
        dim: int,
        *,
        token_options: TokenOptions = TokenOptions(),
        num_heads: Count | None = None,
        attention_options: AttentionOptions = AttentionOptions(),
        reduce: Literal["mean", "max_logit"] = "mean",
    ):
        super().__init__(dim)
        self.reduce = check_choice("reduce", reduce, ("mean", "max_logit"))
        self.token_options, self.attention_options, self.num_heads = token_options, attention_options, num_heads
        width = token_options.gram_width or largest_gram_width(dim, token_options.tokens)
        self.map = MAP(
            dim,
            heads=num_heads,
            average=None,
            dropout=0.0,
            token_options=replace(token_options, gram_width=width),
            attention_options=attention_options,
        )
        for group in () if token_options.gram else self.map.groups:
            nn.init.normal_(group.source.token, std=0.02)

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Mean of the attended tokens."""
        # Positions of the patches make no difference, so any grid will do.
        tokens, _, attention = self._attend(x.dtype, x.transpose(1, 2).unsqueeze(2))
        vectors = tokens.flatten(1, 2)
        return Pooled(
            vectors.mean(dim=1), attention.mean(dim=3).flatten(1, 2), vectors if self.reduce == "max_logit" else None
        )

    def _attend(self, dtype: torch.dtype, x: Tensor) -> Attended:
        """Apply MAP to a map [B, D, H, W] with weights cast to the dtype."""
        if next(self.map.parameters()).dtype == dtype:
            return self.map(x)
        state = {**dict(self.map.named_parameters()), **dict(self.map.named_buffers())}
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        return functional_call(self.map, cast, (x,))


def largest_gram_width(dim: int, tokens: int) -> int | None:
    """Return the largest width up to dim and 192 whose Gramian triangle `tokens` divide; None if there is none."""
    for width in range(min(dim, MAX_GRAM_WIDTH), 0, -1):
        if width * (width + 1) // 2 % max(1, tokens) == 0:
            return width
    return None
