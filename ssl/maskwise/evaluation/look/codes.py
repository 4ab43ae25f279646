"""Patch tokens in a few bytes: cosines to any patch, and colors of their principal components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ANCHORS = 32  # patches from which the error of the cosines is measured


@dataclass
class Codes:
    """Tokens of length 1 in their leading directions.

    values int8 [N, r]; scale: of one step; basis float32 [r, D], orthonormal; error: largest of the measured cosines.
    """

    values: Tensor
    scale: float
    basis: Tensor
    error: float = 0.0

    def cosines(self, patch: int) -> Tensor:
        """Return the cosines of one patch to all, float64 [N], computed as the page does."""
        return (self.values.long() @ self.values[patch].long()).double().mul(self.scale**2).clamp(-1, 1)

    def decoded(self) -> Tensor:
        """Return the tokens, float32 [N, D]."""
        return self.values.float() * self.scale @ self.basis


def encode(tokens: Tensor, most: int) -> Codes:
    """Encode tokens of length 1, [N, D], in at most `most` directions, those of largest second moment."""
    tokens = tokens.double()
    _, vectors = torch.linalg.eigh(tokens.T @ tokens)
    basis = vectors.flip(1)[:, : min(most, *tokens.shape)].T
    coefficients = tokens @ basis.T
    scale = float(coefficients.abs().max()) / 127 or 1.0
    codes = Codes((coefficients / scale).round().to(torch.int8), scale, basis.float())
    anchors = torch.linspace(0, len(tokens) - 1, min(ANCHORS, len(tokens))).round().long().tolist()
    errors = [(codes.cosines(i) - tokens @ tokens[i]).abs().max() for i in dict.fromkeys(anchors)]
    codes.error = float(torch.stack(errors).max())
    return codes


def colors(images: Sequence[Codes]) -> list[Tensor]:
    """Color the patches of all images by their three leading principal components -> uint8 [N, 3] each.

    One PCA is fitted to all patches, so that a color means the same in every image; each component is stretched from
    its 1st to its 99th percentile, its sign such that its largest weight is positive.
    """
    count = sum(len(codes.values) for codes in images)
    mean = sum(codes.decoded().sum(dim=0, dtype=torch.float64) for codes in images) / count
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for codes in images:  # one image is decoded at a time
        centered = codes.decoded().double() - mean
        covariance += centered.T @ centered
    axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :3]
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    projected = [F.pad((codes.decoded().double() - mean) @ axes, (0, 3 - axes.shape[1])) for codes in images]
    together = torch.cat(projected)
    shares = torch.tensor([0.01, 0.99], dtype=torch.float64)
    low, high = torch.quantile(sampled(together), shares, dim=0)
    span = torch.where(high > low, high - low, 1)
    return [((part - low) / span * 255).clamp(0, 255).round().to(torch.uint8) for part in projected]


def sampled(rows: Tensor, most: int = 1 << 20) -> Tensor:
    """Return at most `most` rows, evenly spread: torch sorts no more for a quantile."""
    return rows[:: max(1, -(-len(rows) // most))]
