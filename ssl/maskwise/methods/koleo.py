"""Student features of a whole batch, for a loss that compares the images of all ranks and micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class BatchFeatures(NamedTuple):
    """Features of all images of a step without gradient, [V, B, D], and the first row of this (micro-)batch."""

    features: Tensor
    start: int


@torch.no_grad()
def gather_features(
    parts: list[Tensor], all_sum: Callable[[Tensor], Tensor], rank: int, world_size: int
) -> list[BatchFeatures]:
    """Return the features of a step for each of this rank's micro-batches [V, b, D], all of one size.

    Rows are ordered by rank, then micro-batch. The sum of slots that are empty on other ranks gathers exact values.
    """
    own = torch.cat([part.detach() for part in parts], dim=1)
    rows = own.shape[1]
    if world_size == 1:
        whole = own
    else:
        slots = own.new_zeros(world_size, *own.shape)
        slots[rank] = own
        whole = all_sum(slots).transpose(0, 1).flatten(1, 2)
    return [BatchFeatures(whole, rank * rows + i * parts[0].shape[1]) for i in range(len(parts))]


@contextlib.contextmanager
def without_statistics(network: nn.Module):
    """Put the buffers of a network, such as running statistics, back after the block."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    yield
    for name, buffer in network.named_buffers():
        buffer.copy_(before[name])
