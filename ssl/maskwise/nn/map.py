"""MAP: groups of tokens that each attend to a map, and the classifiers that are taught by one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maskwise.functional import draws
from maskwise.functional.errors import UserError
from maskwise.nn.class_attention import ClassAttentionBlock
from maskwise.nn.dropout import KeyedDropout
from maskwise.nn.fusion import MultiScale
from maskwise.nn.gramian import GramianTokens, LearnedTokens
from maskwise.nn.token_heads import JointHead, SplitHead

HEADS = {"joint": JointHead, "split": SplitHead}


class Attended(NamedTuple):
    """Tokens [B, G, T, D] after attention, the averaged ones [B, G, D] or None, the tokens' attention on pixels [B, G, heads, T, N]."""

    tokens: Tensor
    averaged: Tensor | None
    attention: Tensor


class TokenGroup(nn.Module):
    """One group: tokens made of a map [B, D, H, W], or learned, their average beside them, and the block in which they attend to it.

    average: "mean" (the reference) or "sum" (MAP algorithm 1) of the tokens, or None for none.
    """

    def __init__(self, source: nn.Module, block: ClassAttentionBlock, average: str | None):
        super().__init__()
        self.source, self.block, self.average = source, block, average

    def forward(self, image: Tensor, drop_key: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """[B, D, H, W] -> tokens [B, T, D], averaged [B, D] or None, attention [B, heads, T, N]."""
        tokens = self.source(image)
        count = tokens.shape[1]
        if self.average is not None:
            tokens = torch.cat([tokens, getattr(tokens, self.average)(dim=1, keepdim=True)], dim=1)
        tokens, attention = self.block(tokens, image.flatten(2).transpose(1, 2), drop_key)
        return tokens[:, :count], None if self.average is None else tokens[:, count], attention[:, :, :count]


class MAP(nn.Module):
    """Multi-token attention pooling: a map [B, dim, H, W] -> Attended, by `groups` independent groups of `tokens` tokens.

    gram: tokens are made of the image's Gramian matrix (see GramianTokens for gram_width and gram_groups), else learned.
    embed and heads are those of the attention: by default dim, and about one head for each 32 of it. dropout on the attention, its output and the
    MLP. The paper's default is groups=2, tokens=4. Raises UserError for sizes that do not divide. MAP 4.1, pooling.md 3.1.
    """

    def __init__(
        self, dim: int, groups: int = 2, tokens: int = 4, gram: bool = True, gram_width: int | None = None, gram_groups: int | None = None,
        embed: int | None = None, heads: int | None = None, talking: bool = False, keys: str = "tokens+pixels", average: str | None = "mean",
        mlp_ratio: float = 4.0, mlp_groups: int = 2, dropout: float = 0.05,
    ):  # fmt: skip
        super().__init__()
        if groups < 1 or tokens < 1:
            raise UserError(f"map: groups={groups} of tokens={tokens} are none; give at least 1 of each")
        if average not in (None, "mean", "sum"):
            raise UserError(f"map: average={average!r} is unknown: choose mean, sum, or null for no averaged token")
        embed = embed or dim
        heads = heads or max(count for count in range(1, max(1, embed // 32) + 1) if embed % count == 0)
        self.dim, self.tokens, self.heads = dim, tokens, heads
        options = {"talking": talking, "keys": keys, "mlp_ratio": mlp_ratio, "mlp_groups": mlp_groups, "dropout": dropout}
        self.groups = nn.ModuleList(
            TokenGroup(
                GramianTokens(dim, tokens, gram_width, gram_groups) if gram else LearnedTokens(dim, tokens),
                ClassAttentionBlock(dim, embed, heads, **options), average,
            ) for _ in range(groups)
        )  # fmt: skip
        initialise(self)

    def forward(self, image: Tensor, drop_key: Tensor | None = None) -> Attended:
        """[B, dim, H, W] -> Attended; drop_key int64 [B] makes dropout a function of an image's key."""
        keys = [None if drop_key is None else draws.mix(drop_key, g) for g in range(len(self.groups))]
        tokens, averaged, attention = zip(*(group(image, key) for group, key in zip(self.groups, keys)))
        return Attended(torch.stack(tokens, 1), None if averaged[0] is None else torch.stack(averaged, 1), torch.stack(attention, 1))


class Said(NamedTuple):
    """What the groups say: of their tokens [B, G, C] or None, of their averaged tokens [B, G, C] or None."""

    tokens: Tensor | None
    averaged: Tensor | None


class MAPHead(nn.Module):
    """Maps of several stages -> Said: MultiScale, MAP, and for every group a head on its tokens and one on its averaged token.

    head "joint" or "split", see token_heads; norm=False leaves their LayerNorms out (the released MobileNet). token_dropout
    falls on the tokens before their heads. light: built without the tokens' heads, for inference only (MAP-light).
    Further arguments as MAP and MultiScale. MAP fig. 6, pooling.md 3.1, 3.3.
    """

    def __init__(
        self, dims: Sequence[int], classes: int, *, dim: int = 384, level: int = 3, resample: str = "released", head: str = "joint", norm: bool = True,
        token_dropout: float = 0.0, light: bool = False, **options,
    ):  # fmt: skip
        super().__init__()
        if head not in HEADS:
            raise UserError(f"map: head={head!r} is unknown: choose {' or '.join(HEADS)}")
        self.fuse = MultiScale(dims, dim, level, resample)
        self.map = MAP(dim, **options)
        groups, tokens = len(self.map.groups), self.map.tokens
        self.heads = nn.ModuleList(HEADS[head](dim, tokens, classes, norm) for _ in range(groups))
        averages = self.map.groups[0].average is not None
        self.averaged_heads = nn.ModuleList(JointHead(dim, 1, classes) for _ in range(groups)) if averages else None
        self.token_drop = KeyedDropout(token_dropout)
        for part in (self.fuse, self.heads, self.averaged_heads):
            initialise(part)
        if light:
            self.lighten()

    def lighten(self) -> None:
        """Drop the tokens' heads and their G (T D C + C + 2 T D) weights: from here on the averaged tokens speak. Raises UserError without them."""
        if self.averaged_heads is None:
            raise UserError("map: light keeps the averaged tokens only, and this network has none; leave light out")
        self.heads = None

    def forward(self, maps: Sequence[Tensor], drop_key: Tensor | None = None) -> Said:
        """Maps [B, dims[s], H_s, W_s] -> Said; what nobody reads is not computed: outside train mode the averaged tokens speak only when light."""
        return self.speak(self.map(self.fuse(maps), drop_key), drop_key)

    def speak(self, attended: Attended, drop_key: Tensor | None = None) -> Said:
        """Attended -> Said."""
        said = averaged = None
        if self.heads is not None:
            tokens = self.token_drop(attended.tokens, drop_key, 3)
            said = torch.stack([head(group) for head, group in zip(self.heads, tokens.unbind(1))], dim=1)
        if self.averaged_heads is not None and (self.training or self.heads is None):
            averaged = torch.stack([head(group[:, None]) for head, group in zip(self.averaged_heads, attended.averaged.unbind(1))], dim=1)
        return Said(said, averaged)

    def logits(self, said: Said) -> Tensor:
        """What all groups say together: the mean over groups, [B, C]; the paper's sum has the same largest class."""
        return (said.averaged if said.tokens is None else said.tokens).mean(dim=1)


@torch.no_grad()
def initialise(part: nn.Module | None) -> None:
    """Linear layers and 1x1 convolutions normal .02 with biases 0, as the reference's ConvNeXt starts."""
    for module in () if part is None else part.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
