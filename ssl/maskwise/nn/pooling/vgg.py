"""Fully connected layers on the flattened map, as in VGG."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.bounds import Count
from maskwise.nn.pooling.base import Pooling, as_map, check_count, linear
from maskwise.nn.tokens import Pooled


class VGG(Pooling):
    """Two hidden layers on the concatenated patches (VGG; MAP, table 1).

    A map of another size than `size` x `size` is first averaged to it. Weights: dim^2 (size^2 + 1) + 2 dim; with
    ResNet-50, 7 x 7 and 1000 classes the network has the 235.3 M of MAP's table. Without dropout, which a linear
    classifier has. Raises UserError for a size below 1.
    """

    def __init__(self, dim: int, size: Count = 7):
        super().__init__(dim)
        self.size = check_count("size", size)
        self.fc1, self.fc2 = nn.Linear(dim * size**2, dim), nn.Linear(dim, dim)

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Two hidden layers with ReLU."""
        flat = F.adaptive_avg_pool2d(as_map(x, grid), self.size).flatten(1)
        return Pooled(F.relu(linear(self.fc2, F.relu(linear(self.fc1, flat)))), None)
