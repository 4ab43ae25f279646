"""Slot attention: slots compete for patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.functional import draws
from maskwise.functional.errors import UserError
from maskwise.nn.pooling.pooling import linear, normed
from maskwise.nn.pooling.several import Several
from maskwise.nn.tokens import Pooled

STREAM = 59  # beside the streams of functional.draws
EPS = 1e-8


class Slot(Several):
    """k slots after `iterations` of competition, GRU and MLP. Attention: the last, each slot's sum over patches 1.

    Slots begin at mu + sigma times a normal noise that is a function of `seed` and kept with the weights, so that a result can
    be had again; `resample` draws it anew for each image in training, from torch's own generator (then a resumed run is no
    longer bit-equal to an uninterrupted one). Weights: 11 D^2 + 19 D for D of at least 128. Raises UserError for iterations below 1.
    SimPool paper eq. B21-B24.
    """

    def __init__(self, dim: int, k: int = 3, reduce: str = "max_logit", iterations: int = 3, seed: int = 0, resample: bool = False):
        super().__init__(dim, k, reduce)
        if iterations < 1:
            raise UserError(f"pooling.iterations={iterations} is out of range: choose 1 or more")
        self.iterations, self.seed, self.resample = iterations, seed, resample
        hidden = max(dim, 128)
        self.mu = nn.Parameter(torch.randn(1, 1, dim))
        self.log_sigma = nn.Parameter(torch.empty(1, 1, dim).uniform_(-math.sqrt(3 / dim), math.sqrt(3 / dim)))
        self.norm_patches, self.norm_slots, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.wq, self.wk, self.wv = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.gru = nn.GRUCell(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        uniform = draws.uniform(draws.mix(STREAM, seed), k * dim).clamp(1e-12, 1 - 1e-12)
        self.register_buffer("noise", (math.sqrt(2) * torch.erfinv(2 * uniform - 1)).view(1, k, dim).float())

    def pool(self, x: Tensor, grid) -> Pooled:
        """Slots of the patches."""
        anew = self.resample and self.training
        noise = torch.randn(len(x), self.k, self.dim, dtype=x.dtype, device=x.device) if anew else self.noise.to(x.dtype)
        u = (self.mu.to(x.dtype) + self.log_sigma.to(x.dtype).exp() * noise).expand(len(x), -1, -1)
        h = normed(self.norm_patches, x)
        keys, values = linear(self.wk, h), linear(self.wv, h)
        attention = x.new_zeros(())
        for _ in range(self.iterations):
            logits = torch.matmul(linear(self.wq, normed(self.norm_slots, u)), keys.transpose(1, 2)) / math.sqrt(self.dim)
            attention = shared_out(logits)
            u = self.recur(torch.matmul(attention, values), u)
            u = u + linear(self.fc2, F.relu(linear(self.fc1, normed(self.norm_mlp, u))))
        return self.reduced(u, attention)

    def recur(self, z: Tensor, u: Tensor) -> Tensor:
        """The gated recurrent unit: input z and state u [B, k, D] -> the new state."""
        cell = self.gru
        given = F.linear(z, cell.weight_ih.to(z.dtype), cell.bias_ih.to(z.dtype)).chunk(3, dim=-1)
        held = F.linear(u, cell.weight_hh.to(z.dtype), cell.bias_hh.to(z.dtype)).chunk(3, dim=-1)
        reset, update = torch.sigmoid(given[0] + held[0]), torch.sigmoid(given[1] + held[1])
        return (1 - update) * torch.tanh(given[2] + reset * held[2]) + update * u


def shared_out(logits: Tensor) -> Tensor:
    """Logits [B, k, N] -> softmax over slots, then each slot's row to a sum of 1 over patches."""
    claims = torch.softmax(logits, dim=1) + EPS
    return claims / claims.sum(dim=2, keepdim=True)
