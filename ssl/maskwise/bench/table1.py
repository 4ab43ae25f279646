"""Table 1 of the SimPool paper: poolings in the parts of Algorithm 1, with the weights of their modules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.bench import algorithm1
from maskwise.bench.algorithm1 import Parts, average, uniform
from maskwise.errors import UserError
from maskwise.nn.batch_norm import batch_normed
from maskwise.nn.pooling.base import Pooling, apply_mlp, as_map, layer_norm, linear
from maskwise.nn.pooling.gates import CBAM, GE, SE
from maskwise.nn.pooling.how import HOW
from maskwise.nn.pooling.kmeans import KMeans, initial_indices
from maskwise.nn.pooling.otk import OTK, TEMPERATURE, sinkhorn
from maskwise.nn.pooling.query_attention import CaiT, ViT
from maskwise.nn.pooling.simple import FLOOR, GAP, LSE, GAPMax, GeM, Max
from maskwise.nn.pooling.simpool import NORM_EPS, SHIFT, SimPool
from maskwise.nn.pooling.slot import Slot, normalize_over_slots

Grid = tuple[int, int]


def parts_of(pooling: Pooling, grid: Grid) -> list[Parts]:
    """Return the steps of `algorithm1.pool` that compute the vectors [B, k, D] of a pooling on a grid.

    k-means moves the centroids at every iteration, as with tolerance 0. The released GeM's windows and SimPool's
    ablations have no such form; raises UserError for the latter.
    """
    return TABLE1[type(pooling)](pooling, grid)


def gap(p: GAP, grid: Grid) -> list[Parts]:
    """Uniform attention."""
    return [Parts(average, uniform)]


def max_(p: Max, grid: Grid) -> list[Parts]:
    """Uniform attention; f: maximum."""
    return [Parts(average, uniform, f=algorithm1.maximum)]


def gap_max(p: GAPMax, grid: Grid) -> list[Parts]:
    """Uniform attention; f: mean of average and maximum."""
    return [Parts(average, uniform, f=lambda a, v: (torch.matmul(a, v) + algorithm1.maximum(a, v)) / 2)]


def gem(p: GeM, grid: Grid) -> list[Parts]:
    """Uniform attention; values: clamped to at least 1e-6; f: power."""
    return [Parts(average, uniform, value=lambda x, *_: x.clamp_min(FLOOR), f=algorithm1.power(p.exponent))]


def lse(p: LSE, grid: Grid) -> list[Parts]:
    """Uniform attention; f: exponential."""
    return [Parts(average, uniform, f=algorithm1.exponential(p.r))]


def how(p: HOW, grid: Grid) -> list[Parts]:
    """Attention: norms; values: FC(avg3(X)); update: normalization to length 1."""

    def attention(s: Tensor | None, x: Tensor) -> Tensor:
        return (x.square().sum(-1) + 1e-10).sqrt().unsqueeze(1)

    def value(x: Tensor, *_) -> Tensor:
        averages = F.avg_pool2d(as_map(x, grid), 3, stride=1, padding=1, count_include_pad=False)
        return linear(p.fc, averages.flatten(2).transpose(1, 2))

    return [Parts(average, attention, value=value, update=lambda z, u: F.normalize(z, dim=-1))]


def otk(p: OTK, grid: Grid) -> list[Parts]:
    """U: learned; similarity: -|x - u|^2; attention: Sinkhorn; values: psi(X)."""

    def init(x: Tensor) -> Tensor:
        return p.references.expand(len(x), -1, -1)

    def attention(s: Tensor, x: Tensor) -> Tensor:
        return sinkhorn(s / (p.dim * p.epsilon), p.iterations)

    psi = {"value": lambda x, *_: p.features(x), "update": lambda z, u: p.projected(z)}
    if p.variant == "released":
        return [Parts(init, algorithm1.softmax(TEMPERATURE), similarity=algorithm1.dot, **psi)]
    return [Parts(init, attention, similarity=algorithm1.euclidean, **psi)]


def kmeans(p: KMeans, grid: Grid) -> list[Parts]:
    """U: patches; similarity: -|x - u|^2; attention: one-hot over k, normalized over patches; empty clusters stay."""

    def assign(s: Tensor, x: Tensor) -> Tensor:
        members = F.one_hot(s.argmax(dim=1), p.k).transpose(1, 2).to(x.dtype)
        return members / members.sum(dim=2, keepdim=True).clamp_min(1)

    def update(z: Tensor, u: Tensor) -> Tensor:
        return torch.where(z.abs().sum(dim=-1, keepdim=True) > 0, z, u)

    return [
        Parts(
            lambda x: x[:, list(initial_indices(p.seed, x.shape[1], p.k))],
            assign,
            similarity=algorithm1.euclidean,
            update=update,
            iterations=p.iterations,
        )
    ]


def slot(p: Slot, grid: Grid) -> list[Parts]:
    """U: mu + sigma noise; attention: softmax over slots, normalized over patches; update: GRU, MLP."""

    def update(z: Tensor, u: Tensor) -> Tensor:
        u = p.gru(z.flatten(0, 1), u.flatten(0, 1)).view_as(u)
        return u + linear(p.fc2, F.relu(linear(p.fc1, layer_norm(p.norm_mlp, u))))

    return [
        Parts(
            lambda x: (p.mu + p.log_sigma.exp() * p.noise).expand(len(x), -1, -1),
            lambda s, x: normalize_over_slots(s / math.sqrt(p.dim)),
            query=lambda u: linear(p.wq, layer_norm(p.norm_slots, u)),
            key=lambda x, u: linear(p.wk, layer_norm(p.norm_patches, x)),
            similarity=algorithm1.dot,
            value=lambda x, *_: linear(p.wv, layer_norm(p.norm_patches, x)),
            update=update,
            iterations=p.iterations,
            constant_keys=True,
        )
    ]


def gated(p: SE | GE, gate: Tensor, x: Tensor) -> Tensor:
    """Return gate * x, in the released variant with a residual and a ReLU."""
    return F.relu(x + gate * x) if p.variant == "released" else gate * x


def se(p: SE, grid: Grid) -> list[Parts]:
    """U: GAP; query: sigmoid(MLP(u)), which gates the channels of V."""

    def query(u: Tensor) -> Tensor:
        return torch.sigmoid(apply_mlp(p.mlp, u))

    return [Parts(average, uniform, query=query, value=lambda x, q, u: gated(p, q, x))]


def cbam(p: CBAM, grid: Grid) -> list[Parts]:
    """U: GAP (and max); query: sigmoid(MLP(u)); similarity: <q, x> / d; attention: sigmoid(conv7(S)) / N."""
    with_maximum = p.variant == "released"

    def similarity(q: Tensor, k: Tensor) -> Tensor:
        mean = algorithm1.dot(q, k) / p.dim
        return torch.cat([mean, (q * k).amax(dim=-1).unsqueeze(1)], dim=1) if with_maximum else mean

    def attention(s: Tensor, x: Tensor) -> Tensor:
        scores = p.conv(s.unflatten(2, grid))
        return torch.sigmoid(scores if p.norm is None else batch_normed(p.norm, scores)).flatten(2) / x.shape[1]

    def init(x: Tensor) -> Tensor:
        return torch.cat([average(x), x.amax(dim=1, keepdim=True)], dim=1) if with_maximum else average(x)

    def query(u: Tensor) -> Tensor:
        return torch.sigmoid(apply_mlp(p.mlp, u).sum(dim=1, keepdim=True))

    return [Parts(init, attention, query=query, similarity=similarity, value=lambda x, q, u: q * x)]


def ge(p: GE, grid: Grid) -> list[Parts]:
    """U: a strided depthwise convolution; query: sigmoid(MLP(u)) at every patch, which gates V."""
    small = tuple(-(-side // 2) for side in grid)

    def init(x: Tensor) -> Tensor:
        return batch_normed(p.norm, p.conv(as_map(x, grid))).flatten(2).transpose(1, 2)

    def query(u: Tensor) -> Tensor:
        return torch.sigmoid(F.interpolate(as_map(apply_mlp(p.mlp, u), small), size=grid)).flatten(2).transpose(1, 2)

    return [Parts(init, uniform, query=query, value=lambda x, q, u: gated(p, q, x))]


def vit(p: ViT, grid: Grid) -> list[Parts]:
    """U: learned; m heads as m queries; released: U among keys and values; paper: projection and MLP as update."""
    spread, gather = algorithm1.split(p.num_heads)
    query_among_keys = p.variant == "released"

    def tokens(x: Tensor, u: Tensor) -> Tensor:
        return torch.cat([u, x], dim=1) if query_among_keys else x

    def update(z: Tensor, u: Tensor) -> Tensor:
        z = gather(z)
        return z if query_among_keys else p.fc2(F.relu(p.fc1(p.proj(z))))

    return [
        Parts(
            lambda x: p.query.expand(len(x), -1, -1),
            algorithm1.softmax(math.sqrt(p.dim // p.num_heads)),
            query=lambda u: spread(p.wq(u)),
            key=lambda x, u: p.wk(tokens(x, u)),
            similarity=algorithm1.dot,
            value=lambda x, q, u: p.wv(tokens(x, u)),
            update=update,
        )
    ]


def cait(p: CaiT, grid: Grid) -> list[Parts]:
    """U: learned, among keys and values; residuals and MLP as update; a step per block, then the final norm."""
    spread, gather = algorithm1.split(p.num_heads)

    def block(layer, last: bool) -> Parts:
        def tokens(x: Tensor, u: Tensor) -> Tensor:
            return layer.norm1(torch.cat([u, x], dim=1))

        def update(z: Tensor, u: Tensor) -> Tensor:
            u = u + layer.gamma_1 * layer.proj(gather(z))
            u = u + layer.gamma_2 * layer.fc2(F.gelu(layer.fc1(layer.norm2(u))))
            return p.norm(u) if last else u

        return Parts(
            lambda x: p.cls_token.expand(len(x), -1, -1),
            algorithm1.softmax(math.sqrt(p.dim // p.num_heads)),
            query=lambda u: spread(layer.wq(layer.norm1(u))),
            key=lambda x, u: layer.wk(tokens(x, u)),
            similarity=algorithm1.dot,
            value=lambda x, q, u: layer.wv(tokens(x, u)),
            update=update,
        )

    return [block(layer, layer is p.layers[-1]) for layer in p.layers]


def simpool(p: SimPool, grid: Grid) -> list[Parts]:
    """U: GAP; query, key: linear; softmax; values: LN(X) above its minimum; f: power."""
    if not p.ablation.is_default:
        raise UserError("SimPool's ablations have no row in Table 1: leave their options out")
    spread, gather = algorithm1.split(p.num_heads)

    def normalized(x: Tensor) -> Tensor:
        weight, bias = p.norm_patches.weight, p.norm_patches.bias
        return F.layer_norm(x, (p.dim,), weight.to(x.dtype), bias.to(x.dtype), NORM_EPS)

    def value(x: Tensor, *_) -> Tensor:
        x = normalized(x)
        if p.gamma is None:
            return x
        minimum = x.amin(dim=(1, 2), keepdim=True) if p.min_scope == "image" else x.min()
        return x - minimum + SHIFT

    return [
        Parts(
            average,
            algorithm1.softmax(math.sqrt(p.dim // p.num_heads)),
            query=lambda u: spread(linear(p.wq, u)),
            key=lambda x, u: linear(p.wk, normalized(x)),
            similarity=algorithm1.dot,
            value=value,
            f=torch.matmul if p.gamma is None else algorithm1.power(p.gamma),
            update=gather,
        )
    ]


TABLE1: dict[type[Pooling], Callable[..., list[Parts]]] = {
    GAP: gap,
    Max: max_,
    GAPMax: gap_max,
    GeM: gem,
    LSE: lse,
    HOW: how,
    OTK: otk,
    KMeans: kmeans,
    Slot: slot,
    SE: se,
    CBAM: cbam,
    GE: ge,
    ViT: vit,
    CaiT: cait,
    SimPool: simpool,
}
