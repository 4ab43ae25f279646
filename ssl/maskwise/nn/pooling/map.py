"""MAP's tokens as a pooling: groups of tokens made of the image, each of which attends to the patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from maskwise.nn.map import MAP
from maskwise.nn.pooling.pooling import Pooling
from maskwise.nn.tokens import Pooled

WIDEST = 192  # of the Gramian matrix, unless asked for: beyond, its grouped convolution outweighs the backbone


class MAPPooling(Pooling):
    """The tokens of the last map alone, without fusion, averaged tokens or heads: the mean of all `groups` x `tokens` of them.

    reduce="max_logit" hands out the tokens themselves, too, [B, groups * tokens, dim], and a classifier takes for each class the
    largest of their logits; under the "mean" a linear classifier sums them, as the paper does.

    Attention: [B, groups * num_heads, N], a mean over a group's tokens, as the softmax gave it; with keys="tokens+pixels" a row's sum is
    below 1, as the tokens are among their own keys, with "pixels" it is 1. Arguments as those of nn.map.MAP, without dropout;
    gram_width is by default the widest that `tokens` divide, at most 192. gram=False starts from random tokens, since
    equal ones would stay equal under a mean. MAP 4.1, pooling.md 3.1.
    """

    gives_attention = True

    def __init__(
        self, dim: int, groups: int = 2, tokens: int = 4, gram: bool = True, gram_width: int | None = None, gram_groups: int | None = None,
        embed: int | None = None, num_heads: int | None = None, talking: bool = False, keys: str = "tokens+pixels", mlp_ratio: float = 4.0, mlp_groups: int = 2, reduce: str = "mean",
    ):  # fmt: skip
        super().__init__(dim)
        self.reduce = self.chosen("reduce", reduce, ("mean", "max_logit"))
        self.groups, self.tokens, self.gram, self.gram_width, self.gram_groups, self.embed = groups, tokens, gram, gram_width, gram_groups, embed
        self.num_heads, self.talking, self.keys, self.mlp_ratio, self.mlp_groups = num_heads, talking, keys, mlp_ratio, mlp_groups
        widest = next((c for c in range(min(dim, WIDEST), 0, -1) if c * (c + 1) // 2 % max(1, tokens) == 0), None)
        self.map = MAP(
            dim, groups, tokens, gram, gram_width or widest, gram_groups, embed, num_heads, talking, keys, None, mlp_ratio, mlp_groups, dropout=0.0
        )  # fmt: skip
        for group in () if gram else self.map.groups:
            nn.init.normal_(group.source.token, std=0.02)

    def pool(self, x: Tensor, grid) -> Pooled:
        """What the tokens gather."""
        tokens, _, attention = self.in_type(x.dtype, x.transpose(1, 2).unsqueeze(2))  # where a patch lies makes no difference
        vectors = tokens.flatten(1, 2)
        return Pooled(vectors.mean(dim=1), attention.mean(dim=3).flatten(1, 2), vectors if self.reduce == "max_logit" else None)

    def in_type(self, dtype: torch.dtype, image: Tensor) -> tuple[Tensor, None, Tensor]:
        """MAP of a map [B, D, H, W] with weights of that type, whatever they are kept in."""
        if next(self.map.parameters()).dtype == dtype:
            return self.map(image)
        held = {**dict(self.map.named_parameters()), **dict(self.map.named_buffers())}
        return functional_call(self.map, {name: value.to(dtype) if value.is_floating_point() else value for name, value in held.items()}, (image,))
