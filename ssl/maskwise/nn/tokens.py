"""The three values that pass through an encoder: tokens, what a pooling makes of them, features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Tokens:
    """What a backbone gives, before the final norm.

    patches [B, N, D] row-major over grid (h, w); prefix [B, P, D], the class token first where there is one, then
    registers; cls_attention [B, H, N], the class token's softmax row of the last block, patch columns only (its sum is
    below 1); keys [B, N, D] of the last block, heads side by side; stages, one [B, P + N, D] for each block asked
    for, or of a map backbone one [B, C_s, H_s, W_s] for each stage.
    """

    patches: Tensor
    prefix: Tensor
    grid: tuple[int, int]
    cls_attention: Tensor | None = None
    keys: Tensor | None = None
    stages: tuple[Tensor, ...] | None = None


@dataclass
class Pooled:
    """What a pooling gives: vector [B, D], the attention [B, H, N] that made it (of k vectors [B, k, N]) or None.

    vectors [B, k, D] or None: with reduce=max_logit a classifier takes for each class the largest of their k logits.
    """

    vector: Tensor
    attention: Tensor | None
    vectors: Tensor | None = None


@dataclass
class Features:
    """What an encoder gives.

    pooled [B, D]; patches [B, N, D] after the final norm; attention [B, H, N] of the pooling, neither averaged nor
    renormalised, or None; grid (h, w); keys [B, N, D] and layers (one [B, P + N, D] each, after the final norm; of a map backbone
    one [B, C_s, H_s, W_s] each, as the stage gave it) if asked for; vectors [B, k, D] of a pooling whose k logits a classifier
    is to take the largest of, class by class, or None.
    """

    pooled: Tensor
    patches: Tensor
    attention: Tensor | None
    grid: tuple[int, int]
    keys: Tensor | None = None
    layers: tuple[Tensor, ...] | None = None
    vectors: Tensor | None = None
