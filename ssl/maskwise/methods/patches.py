"""Patches of a patch loss, masked or visible: their places, targets and loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskwise.functional import losses
from maskwise.functional.chunked_losses import LinearLogits, TeacherProbs
from maskwise.methods.masking import SampledMasks


class PatchTargets(NamedTuple):
    """Teacher outputs and targets for the patches of a patch loss: the masked ones, or the visible ones."""

    mask: Tensor  # bool [G * B, N], True for these patches
    count: int  # of its True entries
    indices: Tensor  # [M], of these patches among all G * B * N, then padding
    bottleneck: Tensor  # [M, d]
    probs: Tensor | None = None  # [M, K], by Sinkhorn-Knopp
    total: Tensor | None = None  # such patches in the whole batch of all ranks, if the loss divides by it

    def weights(self, reduction: str) -> Tensor:
        """Return the weights of the patches in their loss, [M]."""
        return losses.patch_weights(self.mask, len(self.indices), reduction, self.total)


def select_patches(masks: SampledMasks, bottleneck: Tensor, pad_multiple: int = 1) -> PatchTargets:
    """Return the masked patches, with their rows of the bottlenecks [V * N, d] of all patches."""
    indices = masked_indices(masks, pad_multiple)
    return PatchTargets(masks.mask, masks.num_masked, indices, bottleneck.index_select(0, indices))


def masked_indices(masks: SampledMasks, pad_multiple: int = 1) -> Tensor:
    """Return the indices of the masked patches among all V * N, in order, padded with others; no host sync."""
    flat = masks.mask.flatten()
    count = min(-(-masks.num_masked // pad_multiple) * pad_multiple, len(flat))
    return torch.argsort(~flat, stable=True)[:count]


def visible_patches(masks: SampledMasks, started: bool) -> SampledMasks:
    """Return the complement of the masks, nothing unless `started`."""
    if not started:
        return SampledMasks(torch.zeros_like(masks.mask), 0)
    return SampledMasks(~masks.mask, masks.mask.numel() - masks.num_masked)


def patch_loss(
    logits: LinearLogits, probs: TeacherProbs, patches: PatchTargets, temp: float, reduction: str, parts: int
) -> Tensor:
    """Return the loss of patches, logits and targets [M, K], of one of the `parts` of a batch: ranks x micro-batches.

    The mean over the parts is the loss of the batch.
    """
    loss = losses.ibot_loss_from_probs(logits, probs, patches.mask, temp, reduction, patches.total)
    return parts * loss if reduction == "token" else loss


def zero_pad(probs: Tensor, rows: int) -> Tensor:
    """Append rows of zeros to [m, K] until there are `rows`."""
    return torch.cat([probs, probs.new_zeros(rows - len(probs), probs.shape[1])])
