"""Multi-token attention pooling and its classifier heads (MAP, Kang and Ryu 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maskwise.bounds import Count, Rate
from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.nn.dropout import KeyedDropout
from maskwise.nn.multi_token.class_attention import ClassAttentionBlock
from maskwise.nn.multi_token.gramian_tokens import GramianTokens, LearnedTokens
from maskwise.nn.multi_token.options import (
    AVERAGES,
    AttentionOptions,
    Average,
    FusionOptions,
    TokenHeadOptions,
    TokenOptions,
)
from maskwise.nn.multi_token.stage_fusion import MultiScale
from maskwise.nn.multi_token.token_heads import JointHead, SplitHead
from maskwise.nn.option_groups import option_groups

HEADS = {"joint": JointHead, "split": SplitHead}
TOKEN_DROPOUT = 3  # KeyedDropout's `place`, after those of class_attention


class Attended(NamedTuple):
    """Tokens [B, G, T, D], averaged tokens [B, G, D] or None, attention [B, G, heads, T, N]."""

    tokens: Tensor
    averaged: Tensor | None
    attention: Tensor


class TokenGroup(nn.Module):
    """One group: tokens from a map or learned, their average, and the block in which they attend to the map.

    average: "mean" (the released code) or "sum" (MAP, algorithm 1) of the tokens; None for no averaged token.
    """

    def __init__(self, source: nn.Module, block: ClassAttentionBlock, average: Average | None):
        super().__init__()
        self.source, self.block, self.average = source, block, average

    def forward(self, x: Tensor, drop_key: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Attend to a map [B, D, H, W].

        Returns tokens [B, T, D], the averaged token [B, D] or None, and attention [B, heads, T, N].
        """
        tokens = self.source(x)
        count = tokens.shape[1]
        if self.average is not None:
            averaged = tokens.mean(dim=1, keepdim=True) if self.average == "mean" else tokens.sum(dim=1, keepdim=True)
            tokens = torch.cat([tokens, averaged], dim=1)
        tokens, attention = self.block(tokens, x.flatten(2).transpose(1, 2), drop_key)
        return tokens[:, :count], None if self.average is None else tokens[:, count], attention[:, :, :count]


class MAP(nn.Module):
    """Multi-token attention pooling: independent groups of tokens attend to a map [B, dim, H, W] (MAP, sec. 4.1).

    heads: of the attention, by default the largest divisor of its width that leaves 32 channels per head or more.
    dropout: on the attention, its output and the MLP. The fields of TokenOptions and AttentionOptions are keywords.
    Raises UserError for sizes that do not divide.
    """

    @option_groups
    def __init__(
        self,
        dim: int,
        *,
        heads: Count | None = None,
        average: Average | None = "mean",
        dropout: Rate = 0.05,
        token_options: TokenOptions = TokenOptions(),
        attention_options: AttentionOptions = AttentionOptions(),
    ):
        super().__init__()
        groups, tokens = token_options.groups, token_options.tokens
        if groups < 1 or tokens < 1:
            raise UserError(f"map: groups={groups} and tokens={tokens} must both be at least 1")
        if average not in (None, *AVERAGES):
            raise UserError(f"map: average={average!r} is unknown: choose mean, sum, or null for no averaged token")
        embed = attention_options.embed or dim
        heads = heads or max(count for count in range(1, max(1, embed // 32) + 1) if embed % count == 0)
        self.dim, self.tokens, self.heads = dim, tokens, heads
        self.groups = nn.ModuleList(
            TokenGroup(
                token_source(dim, token_options),
                ClassAttentionBlock(dim, heads, options=attention_options, dropout=dropout),
                average,
            )
            for _ in range(groups)
        )
        initialize(self)

    def forward(self, x: Tensor, drop_key: Tensor | None = None) -> Attended:
        """Attend to a map [B, dim, H, W]; drop_key: int64 [B], see KeyedDropout."""
        keys = [None if drop_key is None else keyed_random.make_key(drop_key, g) for g in range(len(self.groups))]
        tokens, averaged, attention = zip(*(group(x, key) for group, key in zip(self.groups, keys)))
        return Attended(
            torch.stack(tokens, 1), None if averaged[0] is None else torch.stack(averaged, 1), torch.stack(attention, 1)
        )


class GroupLogits(NamedTuple):
    """Logits of each group's tokens and of its averaged token, [B, G, C] each; either may be None."""

    tokens: Tensor | None
    averaged: Tensor | None


class MAPHead(nn.Module):
    """Fuse the maps of several stages, pool by MAP and classify each group's tokens and averaged token (MAP, fig. 6).

    light: without the token heads, for inference only (MAP-light). Other arguments as in MAP; the fields of
    FusionOptions and TokenHeadOptions are keywords, too. Raises UserError for sizes or options that do not fit.
    """

    @option_groups
    def __init__(
        self,
        dims: Sequence[int],
        classes: int,
        *,
        heads: Count | None = None,
        average: Average | None = "mean",
        dropout: Rate = 0.05,
        light: bool = False,
        fusion_options: FusionOptions = FusionOptions(),
        token_options: TokenOptions = TokenOptions(),
        attention_options: AttentionOptions = AttentionOptions(),
        head_options: TokenHeadOptions = TokenHeadOptions(),
    ):
        super().__init__()
        if head_options.head not in HEADS:
            raise UserError(f"map: head={head_options.head!r} is unknown: choose {' or '.join(HEADS)}")
        dim, groups, tokens = fusion_options.dim, token_options.groups, token_options.tokens
        self.fuse = MultiScale(dims, dim, fusion_options.level, fusion_options.resample)
        self.map = MAP(
            dim,
            heads=heads,
            average=average,
            dropout=dropout,
            token_options=token_options,
            attention_options=attention_options,
        )
        token_head = HEADS[head_options.head]
        self.heads = nn.ModuleList(token_head(dim, tokens, classes, head_options.norm) for _ in range(groups))
        self.averaged_heads = None
        if average is not None:
            self.averaged_heads = nn.ModuleList(JointHead(dim, 1, classes) for _ in range(groups))
        self.token_drop = KeyedDropout(head_options.token_dropout)
        for part in (self.fuse, self.heads, self.averaged_heads):
            initialize(part)
        if light:
            self.drop_token_heads()

    def drop_token_heads(self) -> None:
        """Remove the token heads, leaving the averaged heads (MAP-light).

        Saves G (T D C + C + 2 T D) weights. Raises UserError without averaged tokens.
        """
        if self.averaged_heads is None:
            raise UserError("map: light uses the averaged tokens only, and this network has none; leave light out")
        self.heads = None

    def forward(self, maps: Sequence[Tensor], drop_key: Tensor | None = None) -> GroupLogits:
        """Return the logits of all groups for maps [B, dims[s], H_s, W_s]; in eval mode, of one kind only."""
        return self.group_logits(self.map(self.fuse(maps), drop_key), drop_key)

    def group_logits(self, attended: Attended, drop_key: Tensor | None = None) -> GroupLogits:
        """Classify attended tokens; averaged tokens in train mode or without token heads only."""
        of_tokens = of_averaged = None
        if self.heads is not None:
            tokens = self.token_drop(attended.tokens, drop_key, TOKEN_DROPOUT)
            of_tokens = torch.stack([head(group) for head, group in zip(self.heads, tokens.unbind(1))], dim=1)
        if self.averaged_heads is not None and (self.training or self.heads is None):
            pairs = zip(self.averaged_heads, attended.averaged.unbind(1))
            of_averaged = torch.stack([head(group[:, None]) for head, group in pairs], dim=1)
        return GroupLogits(of_tokens, of_averaged)

    def logits(self, groups: GroupLogits) -> Tensor:
        """Return the mean over groups, [B, C]; the paper's sum has the same argmax."""
        return (groups.averaged if groups.tokens is None else groups.tokens).mean(dim=1)


def token_source(dim: int, options: TokenOptions) -> nn.Module:
    """Build the module that turns a map [B, dim, H, W] into tokens [B, T, dim]."""
    if options.gram:
        return GramianTokens(dim, options.tokens, options.gram_width, options.gram_groups)
    return LearnedTokens(dim, options.tokens)


@torch.no_grad()
def initialize(part: nn.Module | None) -> None:
    """Initialize linear layers and convolutions as the released code: normal with std 0.02, biases 0."""
    for module in () if part is None else part.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
