"""KoLeo: a regularizer that spreads the features of a batch over the sphere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.errors import UserError
from maskwise.functional.precision import at_least_float32, autocast_off

EPS = 1e-8  # added to distances before their logarithm, as in DINOv2's code
ROUNDING = 8  # distances of unit vectors below this many machine epsilons are rounding
CHUNK_ENTRIES = 1 << 24  # similarities that are in memory at once, about


def koleo_loss(features: Tensor) -> Tensor:
    """Return minus the mean log distance of each image to its nearest other: features [V, B, D] -> 0-dim.

    Features are L2-normalized and compared within their view V; the result is the mean over views (KoLeo, sec. 3;
    DINOv2, sec. 4). The nearest image is found without gradient, and both ends of a distance receive one;
    equal features receive none, since their distance has no direction but that of rounding. Raises UserError for B = 1.
    """
    if features.shape[1] < 2:
        raise UserError(
            "KoLeo compares an image with its nearest other, and this batch has one: use two images or more"
        )
    with autocast_off(features):
        unit = F.normalize(at_least_float32(features), dim=-1)
        nearest = nearest_others(unit.detach())
        neighbors = unit.gather(1, nearest[..., None].expand_as(unit))
        distances = torch.linalg.vector_norm(unit - neighbors, dim=-1)
        equal = distances < ROUNDING * torch.finfo(unit.dtype).eps
        distances = torch.where(equal, distances.detach(), distances)
        return -(distances + EPS).log().mean()


@torch.no_grad()
def nearest_others(unit: Tensor) -> Tensor:
    """Return the index of the most similar other row of each row of unit vectors [V, B, D], int64 [V, B]."""
    views, rows, _ = unit.shape
    size, nearest = max(1, CHUNK_ENTRIES // (views * rows)), []
    for start in range(0, rows, size):
        similarities = unit[:, start : start + size] @ unit.mT
        similarities.diagonal(start, dim1=1, dim2=2).fill_(-torch.inf)
        nearest.append(similarities.argmax(dim=-1))
    return torch.cat(nearest, dim=1)


def koleo_loss_of_part(features: Tensor, batch: Tensor, start: int) -> Tensor:
    """Return `koleo_loss` of a batch [V, B, D] without gradient, whose rows start.. are features [V, b, D] with one.

    Every part of the batch has the same value, and the mean of the parts' gradients is the gradient of the batch.
    """
    rows = features.shape[1]
    batch = batch.to(features.dtype)
    loss = koleo_loss(torch.cat([batch[:, :start], features, batch[:, start + rows :]], dim=1))
    return loss + (batch.shape[1] // rows - 1) * (loss - loss.detach())
