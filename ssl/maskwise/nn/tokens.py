"""Values between the parts of an encoder: Tokens, Pooled, Features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Tokens:
    """Output of a backbone, before the final norm.

    patches [B, N, D], row-major over grid (h, w), or [B, 0, D] where the call said that nothing reads them; prefix
    [B, P, D], the class token first if there is one, then registers; cls_attention [B, H, N], the class token's softmax
    row of the last block, patch columns only (its sum is below 1); keys [B, N, D] of the last block, heads
    concatenated; stages, one [B, P + N, D] per requested block, or for feature maps one [B, C_s, H_s, W_s] per
    requested stage.
    """

    patches: Tensor
    prefix: Tensor
    grid: tuple[int, int]
    cls_attention: Tensor | None = None
    keys: Tensor | None = None
    stages: tuple[Tensor, ...] | None = None


@dataclass
class Pooled:
    """Output of a pooling: vector [B, D] and its attention [B, H, N] (with k vectors [B, k, N]) or None.

    vectors [B, k, D] or None: with reduce=max_logit a classifier takes the largest of their k logits per class.
    """

    vector: Tensor
    attention: Tensor | None
    vectors: Tensor | None = None


@dataclass
class Features:
    """Output of an encoder.

    pooled [B, D]; patches [B, N, D] after the final norm, or [B, 0, D] (see Tokens); attention [B, H, N] of the
    pooling, neither averaged nor renormalized, or None; grid (h, w); keys [B, N, D] and layers (one [B, P + N, D] each,
    after the final norm; of feature maps one raw [B, C_s, H_s, W_s] each) if requested; vectors [B, k, D] of a pooling
    with reduce=max_logit, or None.
    """

    pooled: Tensor
    patches: Tensor
    attention: Tensor | None
    grid: tuple[int, int]
    keys: Tensor | None = None
    layers: tuple[Tensor, ...] | None = None
    vectors: Tensor | None = None
