"""Cross-entropy against many prototypes, a chunk of rows at a time (a fused linear cross-entropy).

The last layer of a projection head is linear. A chunk of rows computes its logits, targets, loss and exact gradient,
then frees them; logits [M, K] are never whole in memory, and the matrix products are those of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maskwise.functional.precision import at_least_float32, at_least_float32_dtype, matmul_dtype
from maskwise.functional.targets import center_and_sharpen

# logits of a chunk: few enough for the caches of a CPU, many enough to fill other devices
CHUNK_ENTRIES = {"cpu": 1 << 22}
CHUNK_ENTRIES_ELSEWHERE = 1 << 26

ChunkLoss = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LinearLogits:
    """Logits of a last layer without bias, bottleneck [..., M, d] times weight [K, d] transposed, as two factors."""

    bottleneck: Tensor
    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits, (..., M, K)."""
        return (*self.bottleneck.shape[:-1], len(self.weight))

    def cast(self, dtype: torch.dtype | None = None) -> LinearLogits:
        """Return both factors without gradient in `dtype`, by default that of matrix products here."""
        dtype = dtype or matmul_dtype(self.bottleneck)
        return LinearLogits(self.bottleneck.detach().to(dtype), self.weight.detach().to(dtype))

    def rows(self, start: int, stop: int, step: int = 1) -> Tensor:
        """Return the logits of some rows, [..., n, K], in at least float32."""
        return at_least_float32(torch.matmul(self.bottleneck[..., start:stop:step, :], self.weight.T))


@dataclass(frozen=True)
class CenteredProbs:
    """Teacher probabilities [..., M, K] of logits that are centered and sharpened chunk by chunk (DINO, sec. 3.1)."""

    logits: LinearLogits
    center: Tensor
    temp: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the probabilities, (..., M, K)."""
        return self.logits.shape

    def rows(self, start: int, stop: int, step: int = 1) -> Tensor:
        """Return the probabilities of some rows, [..., n, K]."""
        return center_and_sharpen(self.logits.rows(start, stop, step), self.center, self.temp)


@dataclass(frozen=True)
class WholeProbs:
    """Teacher probabilities [..., M, K] that are in memory, such as those of Sinkhorn-Knopp."""

    probs: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the probabilities, (..., M, K)."""
        return tuple(self.probs.shape)

    def rows(self, start: int, stop: int, step: int = 1) -> Tensor:
        """Return the probabilities of some rows, [..., n, K]."""
        return self.probs[..., start:stop:step, :]


TeacherProbs = CenteredProbs | WholeProbs


def chunks(rows: int, entries_per_row: int, device: torch.device, entries: int | None = None) -> Iterator[tuple]:
    """Yield (start, stop) of chunks with about `entries` logits, by default as many as suit the device."""
    entries = entries or CHUNK_ENTRIES.get(device.type, CHUNK_ENTRIES_ELSEWHERE)
    size = max(1, entries // max(1, entries_per_row))
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def view_pair_loss(student: LinearLogits, probs: TeacherProbs, temp: float, entries: int | None = None) -> Tensor:
    """Return `losses.dino_loss_from_probs` of logits [S, B, K] and probabilities [G, B, K] in chunks of samples."""
    views, samples, _ = student.shape
    teachers = probs.shape[0]
    scale = 1.0 / (teachers * (views - 1) * samples)

    def chunk_loss(logits: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return view_pair_chunk(logits, probs.rows(start, stop), temp, scale)

    return chunked_cross_entropy(student, chunk_loss, entries=entries)


def token_loss(
    student: LinearLogits, probs: TeacherProbs, weights: Tensor, temp: float, entries: int | None = None
) -> Tensor:
    """Return the sum of weights [M] times the cross-entropy of logits and probabilities [M, K], in chunks of rows."""

    def chunk_loss(logits: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        loss, grad = token_chunk(logits[0], probs.rows(start, stop), weights[start:stop].to(logits.dtype), temp)
        return loss, grad[None]

    one_view = LinearLogits(student.bottleneck[None], student.weight)
    return chunked_cross_entropy(one_view, chunk_loss, entries=entries)


def view_pair_chunk(logits: Tensor, probs: Tensor, temp: float, scale: float) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of student logits [S, n, K] (overwritten) for teacher probabilities [G, n, K].

    Each student view meets the probabilities of every other teacher view, so its target is their sum without its own.
    """
    teachers = len(probs)
    all_probs = probs.sum(dim=0)
    log_probs = torch.log_softmax(logits.div_(temp), dim=-1)
    loss = -(all_probs * log_probs.sum(dim=0)).sum() + (probs * log_probs[:teachers]).sum()
    grad = log_probs.exp_()
    grad[:teachers].mul_(teachers - 1).add_(probs)
    grad[teachers:].mul_(teachers)
    return loss * scale, grad.sub_(all_probs).mul_(scale / temp)


def token_chunk(logits: Tensor, probs: Tensor, weights: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of student logits [n, K] (overwritten) for probabilities [n, K] and weights [n]."""
    log_probs = torch.log_softmax(logits.div_(temp), dim=-1)
    loss = -((probs * log_probs).sum(dim=-1) * weights).sum()
    return loss, log_probs.exp_().sub_(probs).mul_((weights / temp)[:, None])


def chunked_cross_entropy(
    student: LinearLogits, chunk_loss: ChunkLoss, dtype: torch.dtype | None = None, entries: int | None = None
) -> Tensor:
    """Return the sum of a loss over chunks of logits [V, M, K], with gradients for bottleneck and weight.

    `chunk_loss(logits [V, n, K] in at least float32, start, stop)` returns the loss of rows start..stop of all views
    and its gradient in the logits, which it may overwrite. Products run in `dtype`, by default that of autocast.
    """
    dtype = dtype or matmul_dtype(student.bottleneck)
    return _ChunkedCrossEntropy.apply(student.bottleneck, student.weight, chunk_loss, dtype, entries)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients with the loss; `backward` only scales them."""

    @staticmethod
    def forward(ctx, bottleneck, weight, chunk_loss, dtype, entries):
        factors = LinearLogits(bottleneck, weight).cast(dtype)
        sum_dtype = at_least_float32_dtype(dtype)
        loss = torch.zeros((), dtype=sum_dtype, device=bottleneck.device)
        bottleneck_grad = torch.zeros_like(factors.bottleneck)
        weight_grad = torch.zeros(weight.shape, dtype=sum_dtype, device=bottleneck.device)
        views, rows, _ = bottleneck.shape
        for start, stop in chunks(rows, views * len(weight), bottleneck.device, entries):
            chunk, grad = chunk_loss(factors.rows(start, stop), start, stop)
            loss += chunk
            grad = grad.to(dtype)
            bottleneck_grad[:, start:stop] = torch.matmul(grad, factors.weight)
            inputs = factors.bottleneck[:, start:stop].reshape(-1, weight.shape[1])
            if dtype == sum_dtype:
                weight_grad.addmm_(grad.flatten(0, 1).T, inputs)
            else:
                weight_grad += (grad.flatten(0, 1).T @ inputs).to(sum_dtype)
        ctx.save_for_backward(bottleneck_grad, weight_grad)
        ctx.dtypes = bottleneck.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad):
        grads = ((grad * loss_grad).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return *grads, None, None, None
