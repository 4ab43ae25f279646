"""Slot attention over the patches of an image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.bounds import Count
from maskwise.functional import keyed_random
from maskwise.nn.pooling.base import check_count, layer_norm, linear
from maskwise.nn.pooling.multi_vector import MultiVectorPooling, Reduce
from maskwise.nn.tokens import Pooled

STREAM = 59  # first word of the random key; see functional.keyed_random
EPS = 1e-8


class Slot(MultiVectorPooling):
    """Slots after `iterations` of competition for patches, GRU and MLP (SimPool, eq. B21-B24).

    Attention: the last iteration's, each slot's sum over patches 1. Initial slots are mu + sigma * noise, where the
    normal noise is a function of `seed` stored with the weights. `resample` draws it for each image in training from
    torch's generator; a resumed run then no longer equals an uninterrupted one bit for bit.
    Raises UserError for iterations below 1.
    """

    def __init__(
        self,
        dim: int,
        k: Count = 3,
        reduce: Reduce = "max_logit",
        iterations: Count = 3,
        seed: int = 0,
        resample: bool = False,
    ):
        super().__init__(dim, k, reduce)
        self.iterations = check_count("iterations", iterations)
        self.seed, self.resample = seed, resample
        hidden = max(dim, 128)
        self.mu = nn.Parameter(torch.randn(1, 1, dim))
        self.log_sigma = nn.Parameter(torch.empty(1, 1, dim).uniform_(-math.sqrt(3 / dim), math.sqrt(3 / dim)))
        self.norm_patches, self.norm_slots, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.wq, self.wk, self.wv = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.gru = nn.GRUCell(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        uniform = keyed_random.uniform(keyed_random.make_key(STREAM, seed), k * dim).clamp(1e-12, 1 - 1e-12)
        self.register_buffer("noise", (math.sqrt(2) * torch.erfinv(2 * uniform - 1)).view(1, k, dim).float())

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Slots of the patches."""
        noise = self.noise.to(x.dtype)
        if self.resample and self.training:
            noise = torch.randn(len(x), self.k, self.dim, dtype=x.dtype, device=x.device)
        slots = (self.mu.to(x.dtype) + self.log_sigma.to(x.dtype).exp() * noise).expand(len(x), -1, -1)
        patches = layer_norm(self.norm_patches, x)
        keys, values = linear(self.wk, patches), linear(self.wv, patches)
        attention = x.new_zeros(())
        for _ in range(self.iterations):
            queries = linear(self.wq, layer_norm(self.norm_slots, slots))
            attention = normalize_over_slots(torch.matmul(queries, keys.transpose(1, 2)) / math.sqrt(self.dim))
            slots = self.gru_step(torch.matmul(attention, values), slots)
            slots = slots + linear(self.fc2, F.relu(linear(self.fc1, layer_norm(self.norm_mlp, slots))))
        return self.reduced(slots, attention)

    def gru_step(self, z: Tensor, slots: Tensor) -> Tensor:
        """Update slots [B, k, D] by the GRU with input z [B, k, D], in the dtype of z."""
        gru = self.gru
        from_input = F.linear(z, gru.weight_ih.to(z.dtype), gru.bias_ih.to(z.dtype)).chunk(3, dim=-1)
        from_state = F.linear(slots, gru.weight_hh.to(z.dtype), gru.bias_hh.to(z.dtype)).chunk(3, dim=-1)
        reset = torch.sigmoid(from_input[0] + from_state[0])
        update = torch.sigmoid(from_input[1] + from_state[1])
        return (1 - update) * torch.tanh(from_input[2] + reset * from_state[2]) + update * slots


def normalize_over_slots(logits: Tensor) -> Tensor:
    """Apply a softmax over slots to logits [B, k, N], then normalize each slot over patches."""
    weights = torch.softmax(logits, dim=1) + EPS
    return weights / weights.sum(dim=2, keepdim=True)
