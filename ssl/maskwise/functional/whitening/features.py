"""PCA whitening: the directions of largest variance, each scaled to variance 1."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskwise.errors import UserError

FLOOR = 1e-6  # directions with less than this share of the largest variance hold rounding, not data
_ROWS = 1024  # rows, or columns, in float64 at a time


class Whitening(NamedTuple):
    """A fitted PCA: mean [D], components [D, d] orthonormal, variances [d] in descending order, all float64."""

    mean: Tensor
    components: Tensor
    variances: Tensor

    @property
    def projection(self) -> Tensor:
        """The matrix [D, d] that maps centered rows to unit variances."""
        return self.components / self.variances.sqrt()

    def __call__(self, rows: Tensor) -> Tensor:
        """Whiten rows [n, D] to float32 [n, d] on the device of the fit."""
        mean, projection = self.mean.float(), self.projection.float()
        parts = [(part.to(mean.device).float() - mean) @ projection for part in rows.split(_ROWS)]
        return torch.cat(parts) if parts else projection.new_zeros(0, projection.shape[1])


@torch.no_grad()
def pca_whitening(rows: Tensor, dims: int = 256, floor: float = FLOOR, device=None) -> Whitening:
    """Fit PCA whitening to rows [n, D], in float64.

    At most `dims` directions are kept, fewer where n - 1 or the rank of the data is smaller: variances up to `floor`
    times the largest are dropped. The eigenproblem is that of the covariance, or with n < D of the Gram matrix, which
    has the same variances. Each component's largest entry is positive. Raises UserError if all rows are equal.
    """
    device = torch.device(device) if device is not None else rows.device
    count, width = rows.shape
    if width <= count:
        mean, covariance = mean_and_covariance(rows, device)
        variances, vectors = torch.linalg.eigh(covariance)
    else:
        mean, gram = mean_and_gram(rows, device)
        variances, vectors = torch.linalg.eigh(gram)
    variances, vectors = variances.flip(0), vectors.flip(1)
    kept = min(dims, count - 1, int((variances > floor * variances[:1]).sum()))
    if kept < 1 or not variances[0] > 0:
        raise UserError(f"PCA whitening needs at least two different images (got {count} that are equal)")
    variances, vectors = variances[:kept], vectors[:, :kept]
    if width > count:
        parts = [(part.to(device).double() - m).T @ vectors for part, m in column_parts(rows, mean)]
        vectors = torch.cat(parts) / (count * variances).sqrt()
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return Whitening(mean, vectors * largest.sign(), variances)


def mean_and_covariance(rows: Tensor, device) -> tuple[Tensor, Tensor]:
    """Return mean [D] and covariance [D, D] of rows [n, D] in float64, in one pass over chunks of rows."""
    shift = rows[:_ROWS].to(device).double().mean(dim=0)  # products about a near mean lose no digits
    width = rows.shape[1]
    total, products = shift.new_zeros(width), shift.new_zeros(width, width)
    for part in rows.split(_ROWS):
        part = part.to(device).double() - shift
        total += part.sum(dim=0)
        products.addmm_(part.T, part)
    offset = total / len(rows)
    return shift + offset, products / len(rows) - torch.outer(offset, offset)


def mean_and_gram(rows: Tensor, device) -> tuple[Tensor, Tensor]:
    """Return mean [D] and the Gram matrix [n, n] of centered rows [n, D] over n, in float64."""
    mean = torch.cat([part.to(device).double().mean(dim=0) for part in rows.split(_ROWS, dim=1)])
    gram = mean.new_zeros(len(rows), len(rows))
    for part, m in column_parts(rows, mean):
        part = part.to(device).double() - m
        gram.addmm_(part, part.T)
    return mean, gram / len(rows)


def column_parts(rows: Tensor, mean: Tensor):
    """Return pairs of columns of rows [n, D] and their mean, some columns at a time."""
    return zip(rows.split(_ROWS, dim=1), mean.split(_ROWS))
