"""Whitening of image patches: moments of the patches, and the filters that decorrelate them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 5e-4  # added to the eigenvalues, in squared units of the normalized pixels


class PatchMoments:
    """Sums over all k x k patches of images, float64; patch entries are ordered (channel, row, column).

    count: patches; total [P] and products [P, P] with P = C * k * k.
    """

    def __init__(self, channels: int, kernel: int):
        self.kernel, self.count = kernel, 0
        size = channels * kernel * kernel
        self.total = torch.zeros(size, dtype=torch.float64)
        self.products = torch.zeros(size, size, dtype=torch.float64)

    def add(self, images: Tensor) -> None:
        """Add the patches of images [B, C, H, W] that lie inside."""
        patches = F.unfold(images.double(), self.kernel).movedim(1, 0).flatten(1)  # [P, B * L]
        self.count += patches.shape[1]
        self.total += patches.sum(1)
        self.products += patches @ patches.T

    def covariance(self) -> Tensor:
        """Return the covariance of the patches, [P, P]."""
        mean = self.total / self.count
        return self.products / self.count - torch.outer(mean, mean)


def whitening_filters(covariance: Tensor, eps: float = EPS) -> Tensor:
    """Return filters [P, P], one per row, whose responses to the patches are uncorrelated.

    Rows are eigenvectors of the covariance [P, P] by falling eigenvalue, divided by sqrt(eigenvalue + eps)
    (Jordan 2024, sec. 3.2); the largest entry of each is positive.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    filters = (vectors / (values.clamp_min(0) + eps).sqrt()).T.flip(0)
    largest = filters.gather(1, filters.abs().argmax(1, keepdim=True))
    return filters * largest.sign()
