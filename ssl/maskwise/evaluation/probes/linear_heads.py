"""Linear classifiers trained jointly on the same features, each with its own learning rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maskwise.functional import keyed_random

_CELLS = 1 << 26  # logits at a time: 256 MiB of float32
MOMENTUM, TRUST = 0.9, 0.001


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """Settings of one head: peak learning rate (already scaled by the batch), weight decay, "sgd" or "lars"."""

    lr: float
    weight_decay: float = 0.0
    optimizer: str = "sgd"


class LinearHeads:
    """T linear heads [C, F] from the same initial weights, trained by SGD with momentum or LARS on cross-entropy.

    Weights start from N(0, .01), biases from 0. `step` equals that of T separate runs; the gradient is explicit, so
    that all heads take two matrix products.
    """

    def __init__(
        self, specs: Sequence[HeadSpec], width: int, classes: int, *, seed: int = 0, device="cpu", dtype=torch.float32
    ):
        self.specs, self.classes = list(specs), classes
        generator = torch.Generator().manual_seed(int(keyed_random.make_key(41, seed)) & ((1 << 63) - 1))
        start = torch.empty(classes, width, dtype=torch.float64).normal_(0, 0.01, generator=generator)
        heads = len(self.specs)
        self.weight = start.to(device, dtype).expand(heads, -1, -1).clone()
        self.bias = torch.zeros(heads, classes, device=device, dtype=dtype)
        self.speed_weight, self.speed_bias = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        column = lambda values: torch.tensor(values, device=device, dtype=dtype)  # noqa: E731
        self.lr = column([spec.lr for spec in self.specs])
        self.weight_decay = column([spec.weight_decay for spec in self.specs])
        self.lars = torch.tensor([spec.optimizer == "lars" for spec in self.specs], device=device)
        self.any_lars = any(spec.optimizer == "lars" for spec in self.specs)
        self.any_decay = any(spec.weight_decay for spec in self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def logits(self, x: Tensor) -> Tensor:
        """Map features [b, F] to logits [b, T, C]."""
        return torch.addmm(self.bias.flatten(), x, self.weight.flatten(0, 1).T).unflatten(1, (len(self), self.classes))

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        """Take one step of every head on a batch -> losses before the step [T], on the device.

        x [b, F], y int64 [b]; factor: of all learning rates.
        """
        rows = max(1, _CELLS // (len(self) * self.classes))
        grad_weight, grad_bias, loss = None, torch.zeros_like(self.bias), torch.zeros_like(self.lr)
        for piece, truth in zip(x.split(rows), y.split(rows)):
            scores = torch.log_softmax(self.logits(piece), dim=-1)
            place = truth[:, None, None].expand(-1, len(self), 1)
            loss -= scores.gather(2, place)[..., 0].sum(dim=0) / len(x)
            scores = scores.exp_().scatter_add_(2, place, scores.new_full((), -1.0).expand(place.shape)).div_(len(x))
            grad_bias += scores.sum(dim=0)
            product = scores.flatten(1).T @ piece
            grad_weight = product if grad_weight is None else grad_weight.add_(product)
        grad_weight = grad_weight.view_as(self.weight)
        if self.any_decay:
            grad_weight.addcmul_(self.weight, self.weight_decay[:, None, None])
            grad_bias.addcmul_(self.bias, (self.weight_decay * ~self.lars)[:, None])  # LARS leaves 1-D tensors alone
        if self.any_lars:
            long, steep = self.weight.flatten(1).norm(dim=1), grad_weight.flatten(1).norm(dim=1)
            trust = torch.where(self.lars & (long > 0) & (steep > 0), TRUST * long / steep, torch.ones_like(long))
            grad_weight.mul_(trust[:, None, None])
        lr = self.lr * factor
        self.speed_weight.mul_(MOMENTUM).add_(grad_weight)
        self.speed_bias.mul_(MOMENTUM).add_(grad_bias)
        self.weight.addcmul_(self.speed_weight, lr[:, None, None], value=-1)
        self.bias.addcmul_(self.speed_bias, lr[:, None], value=-1)
        return loss

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> Tensor:
        """Score every head on features [n, F] and labels int64 [n] -> float64 [T, 2] on the CPU.

        Top-1 and top-5 (or top-C) in per cent; NaN for a head that diverged.
        """
        rows = max(1, min(4096, _CELLS // (len(self) * self.classes)))
        hits = torch.zeros(len(self), 2, dtype=torch.int64, device=self.bias.device)
        for piece, truth in zip(features.split(rows), labels.split(rows)):
            right = (
                self.logits(piece.to(self.weight)).topk(min(5, self.classes), dim=-1).indices
                == truth.to(self.bias.device)[:, None, None]
            )
            hits += torch.stack([right[..., 0].sum(0), right.flatten(2).any(-1).sum(0)], dim=1)
        finite = torch.isfinite(self.weight).flatten(1).all(1) & torch.isfinite(self.bias).all(1)
        score = 100 * hits.double() / max(1, len(features))
        return torch.where(finite[:, None], score, score.new_full((), math.nan)).cpu()

    def head(self, which: int) -> nn.Linear:
        """Return a copy of one head as a linear layer, on the CPU."""
        classes, width = self.weight.shape[1:]
        layer = nn.utils.skip_init(nn.Linear, width, classes)  # draws no random numbers
        with torch.no_grad():
            layer.weight.copy_(self.weight[which])
            layer.bias.copy_(self.bias[which])
        return layer
