"""Table 1 of the SimPool paper: every pooling as an instance of the framework, with the weights of its module."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.nn.batch_norm import batch_normed
from maskwise.nn.pooling import framework
from maskwise.nn.pooling.framework import Parts, average, uniform
from maskwise.nn.pooling.kmeans import places
from maskwise.nn.pooling.otk import TEMPERATURE, sinkhorn
from maskwise.nn.pooling.pooling import as_map, gated, linear, normed
from maskwise.nn.pooling.simple import FLOOR
from maskwise.nn.pooling.slot import shared_out


def composed(pooling, grid: tuple[int, int]) -> list[Parts]:
    """The parts that `framework.pool` makes the vectors [B, k, D] of a row of POOLINGS from, for patches on that grid.

    Group 1 to 5 of Table 1. k-means is the one whose centroids all move at every iteration; GeM's released windows have no such form.
    """
    return LANDSCAPE[type(pooling).__name__](pooling, grid)


def how(p, grid) -> list[Parts]:
    """Attention: norms; values: FC(avg3(X)); update: length 1."""

    def value(x: Tensor, *_) -> Tensor:
        near = F.avg_pool2d(as_map(x, grid), 3, stride=1, padding=1, count_include_pad=False)
        return linear(p.fc, near.flatten(2).transpose(1, 2))

    return [Parts(average, lambda s, x: (x.square().sum(-1) + 1e-10).sqrt().unsqueeze(1), value=value, update=lambda z, u: F.normalize(z, dim=-1))]


def otk(p, grid) -> list[Parts]:
    """U: learned; similarity: -|x - u|^2; attention: Sinkhorn; values: psi(X)."""

    def init(x: Tensor) -> Tensor:
        return p.references.expand(len(x), -1, -1)

    psi = {"value": lambda x, *_: p.features(x), "update": lambda z, u: p.widened(z)}
    if p.variant == "released":
        return [Parts(init, framework.softmax(TEMPERATURE), similarity=framework.dot, **psi)]
    return [Parts(init, lambda s, x: sinkhorn(s / (p.dim * p.epsilon), p.iterations), similarity=framework.euclidean, **psi)]


def kmeans(p, grid) -> list[Parts]:
    """U: patches; similarity: -|x - u|^2; attention: one-hot over k, then shared out over patches; an empty cluster stands still."""

    def assign(s: Tensor, x: Tensor) -> Tensor:
        members = F.one_hot(s.argmax(dim=1), p.k).transpose(1, 2).to(x.dtype)
        return members / members.sum(dim=2, keepdim=True).clamp_min(1)

    def update(z: Tensor, u: Tensor) -> Tensor:
        return torch.where(z.abs().sum(dim=-1, keepdim=True) > 0, z, u)

    return [Parts(lambda x: x[:, list(places(p.seed, x.shape[1], p.k))], assign, similarity=framework.euclidean, update=update, iterations=p.iterations)]


def slot(p, grid) -> list[Parts]:
    """U: mu + sigma noise; softmax over slots, then shared out over patches; update: GRU, MLP."""

    def update(z: Tensor, u: Tensor) -> Tensor:
        u = p.gru(z.flatten(0, 1), u.flatten(0, 1)).view_as(u)
        return u + linear(p.fc2, F.relu(linear(p.fc1, normed(p.norm_mlp, u))))

    return [
        Parts(
            lambda x: (p.mu + p.log_sigma.exp() * p.noise).expand(len(x), -1, -1),
            lambda s, x: shared_out(s / math.sqrt(p.dim)),
            query=lambda u: linear(p.wq, normed(p.norm_slots, u)),
            key=lambda x, u: linear(p.wk, normed(p.norm_patches, x)),
            similarity=framework.dot,
            value=lambda x, *_: linear(p.wv, normed(p.norm_patches, x)),
            update=update,
            iterations=p.iterations,
            fixed=True,
        )
    ]


def residual(p, gate_of_x: Tensor, x: Tensor) -> Tensor:
    """What a gate makes of the features: their product, in the released form under a residual and a ReLU."""
    return F.relu(x + gate_of_x * x) if p.variant == "released" else gate_of_x * x


def se(p, grid) -> list[Parts]:
    """U: GAP; query: sigmoid(MLP(u)), which weighs the channels of V."""
    return [Parts(average, uniform, query=lambda u: torch.sigmoid(gated(p.mlp, u)), value=lambda x, q, u: residual(p, q, x))]


def cbam(p, grid) -> list[Parts]:
    """U: GAP (and max); query: sigmoid(MLP(u)); similarity: <q, x> / d; attention: sigmoid(conv7(S)) / N."""
    full = p.variant == "released"

    def similarity(q: Tensor, k: Tensor) -> Tensor:
        mean = framework.dot(q, k) / p.dim
        return torch.cat([mean, (q * k).amax(dim=-1).unsqueeze(1)], dim=1) if full else mean

    def attention(s: Tensor, x: Tensor) -> Tensor:
        scores = p.conv(s.unflatten(2, grid))
        return torch.sigmoid(scores if p.norm is None else batch_normed(p.norm, scores)).flatten(2) / x.shape[1]

    def init(x: Tensor) -> Tensor:
        return torch.cat([average(x), x.amax(dim=1, keepdim=True)], dim=1) if full else average(x)

    return [Parts(init, attention, query=lambda u: torch.sigmoid(gated(p.mlp, u).sum(dim=1, keepdim=True)), similarity=similarity, value=lambda x, q, u: q * x)]


def ge(p, grid) -> list[Parts]:
    """U: a strided depthwise convolution; query: sigmoid(MLP(u)) on every place, which weighs V."""
    small = tuple(-(-side // 2) for side in grid)

    def init(x: Tensor) -> Tensor:
        return batch_normed(p.norm, p.conv(as_map(x, grid))).flatten(2).transpose(1, 2)

    def query(u: Tensor) -> Tensor:
        return torch.sigmoid(F.interpolate(as_map(gated(p.mlp, u), small), size=grid)).flatten(2).transpose(1, 2)

    return [Parts(init, uniform, query=query, value=lambda x, q, u: residual(p, q, x))]


def vit(p, grid) -> list[Parts]:
    """U: learned; m heads as m queries; released: U among keys and values; paper: output map and MLP as update."""
    spread, gather = framework.split(p.num_heads)
    among = p.variant == "released"

    def held(x: Tensor, u: Tensor) -> Tensor:
        return torch.cat([u, x], dim=1) if among else x

    def update(z: Tensor, u: Tensor) -> Tensor:
        z = gather(z)
        return z if among else p.fc2(F.relu(p.fc1(p.proj(z))))

    return [
        Parts(
            lambda x: p.query.expand(len(x), -1, -1),
            framework.softmax(math.sqrt(p.dim // p.num_heads)),
            query=lambda u: spread(p.wq(u)),
            key=lambda x, u: p.wk(held(x, u)),
            similarity=framework.dot,
            value=lambda x, q, u: p.wv(held(x, u)),
            update=update,
        )
    ]


def cait(p, grid) -> list[Parts]:
    """U: learned, among keys and values; residuals and MLP as update; a step a block, the last with the final norm."""
    spread, gather = framework.split(p.num_heads)

    def block(layer, last: bool) -> Parts:
        def held(x: Tensor, u: Tensor) -> Tensor:
            return layer.norm1(torch.cat([u, x], dim=1))

        def update(z: Tensor, u: Tensor) -> Tensor:
            u = u + layer.gamma_1 * layer.proj(gather(z))
            u = u + layer.gamma_2 * layer.fc2(F.gelu(layer.fc1(layer.norm2(u))))
            return p.norm(u) if last else u

        return Parts(
            lambda x: p.cls_token.expand(len(x), -1, -1),
            framework.softmax(math.sqrt(p.dim // p.num_heads)),
            query=lambda u: spread(layer.wq(layer.norm1(u))),
            key=lambda x, u: layer.wk(held(x, u)),
            similarity=framework.dot,
            value=lambda x, q, u: layer.wv(held(x, u)),
            update=update,
        )

    return [block(layer, layer is p.layers[-1]) for layer in p.layers]


LANDSCAPE: dict[str, Callable] = {
    "GAP": lambda p, grid: [Parts(average, uniform)],
    "Max": lambda p, grid: [Parts(average, uniform, f=framework.maximum)],
    "GAPMax": lambda p, grid: [Parts(average, uniform, f=lambda a, v: (torch.matmul(a, v) + framework.maximum(a, v)) / 2)],
    "GeM": lambda p, grid: [Parts(average, uniform, value=lambda x, *_: x.clamp_min(FLOOR), f=framework.power(p.exponent))],
    "LSE": lambda p, grid: [Parts(average, uniform, f=framework.exponential(p.r))],
    "HOW": how, "OTK": otk, "KMeans": kmeans, "Slot": slot, "SE": se, "CBAM": cbam, "GE": ge, "ViT": vit, "CaiT": cait,
    "SimPool": lambda p, grid: p.steps(),
}  # fmt: skip
