"""Options of multi-token attention pooling, grouped by the part that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from maskwise.bounds import Count

Keys = Literal["tokens+pixels", "pixels"]
Resample = Literal["released", "area"]
Average = Literal["mean", "sum"]
HeadKind = Literal["joint", "split"]
KEYS, RESAMPLES, AVERAGES = get_args(Keys), get_args(Resample), get_args(Average)


@dataclass(frozen=True)
class FusionOptions:
    """Fusion of stages into one map; see MultiScale."""

    dim: Count = 384
    level: int = 3
    resample: Resample = "released"


@dataclass(frozen=True)
class TokenOptions:
    """Number and source of the tokens: the image's Gramian matrix (see GramianTokens) or, with gram=False, learned."""

    groups: Count = 2
    tokens: Count = 4
    gram: bool = True
    gram_width: Count | None = None
    gram_groups: Count | None = None


@dataclass(frozen=True)
class AttentionOptions:
    """Attention of the tokens and the MLP after it; embed None: the width of the map. See ClassAttentionBlock."""

    embed: Count | None = None
    talking: bool = False
    keys: Keys = "tokens+pixels"
    mlp_ratio: float = 4.0
    mlp_groups: Count = 2


@dataclass(frozen=True)
class TokenHeadOptions:
    """Classifier head of each group; see token_heads. token_dropout applies to the tokens before it."""

    head: HeadKind = "joint"
    norm: bool = True
    token_dropout: float = 0.0


@dataclass(frozen=True)
class DistillationOptions:
    """Arguments of functional.map_losses.map_loss."""

    intra: float = 1.0
    inter: float = -0.8
    reduction: str = "mean_elements"
    teacher: str = "tokens"
    center: str = "logits"
    total: str = "per_group"
