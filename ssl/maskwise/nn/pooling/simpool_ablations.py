"""Alternatives to SimPool's design choices, as ablated in Table 10 of the SimPool paper."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.bounds import Count
from maskwise.errors import UserError
from maskwise.functional.power_means import power_mean
from maskwise.nn.pooling.base import check_choice, check_count, layer_norm, linear
from maskwise.nn.pooling.kmeans import lloyd
from maskwise.nn.pooling.multi_vector import Reduce

if TYPE_CHECKING:
    from maskwise.nn.pooling.simpool import SimPool

Init = Literal["gap", "energy", "learned"]
Similarity = Literal["dot", "euclidean", "cosine"]
Normalize = Literal["softmax", "sigmoid"]
SUBSETS = ("", "q", "k", "v", "qk", "qv", "kv", "qkv")


@dataclass(frozen=True)
class Ablation:
    """Design choices of SimPool (Table 10); the defaults are the paper's.

    init: initial vector, the average, an energy-weighted average or a learned one.
    similarity, normalize: attention logits, and their normalization over patches (sigmoid: divided by its sum).
    iterations, layers: repetitions with the same projections, and with projections of their own.
    shared: W_Q = W_K. linear, layer_norm: which of q, k, v have a projection, and a LayerNorm.
    k, reduce: number of vectors, initialized by k-means, and their reduction; see MultiVectorPooling.
    """

    init: Init = "gap"
    similarity: Similarity = "dot"
    normalize: Normalize = "softmax"
    iterations: Count = 1
    layers: Count = 1
    shared: bool = False
    linear: str = "qk"
    layer_norm: str = "kv"
    k: Count = 1
    reduce: Reduce = "max_logit"

    @property
    def is_default(self) -> bool:
        """Whether all choices that affect the computation of a single vector are the paper's."""
        return replace(self, reduce="max_logit") == Ablation()

    def check(self, num_heads: int) -> None:
        """Raise UserError for choices that do not exist or exclude one another."""
        check_choice("init", self.init, get_args(Init))
        check_choice("similarity", self.similarity, get_args(Similarity))
        check_choice("normalize", self.normalize, get_args(Normalize))
        check_count("iterations", self.iterations)
        check_count("layers", self.layers)
        for key, value in (("linear", self.linear), ("layer_norm", self.layer_norm)):
            if value not in SUBSETS:
                raise UserError(
                    f"pooling.{key}={value!r} is unknown: "
                    "name those of q, k and v that have one, such as kv; '' for none"
                )
        if self.shared and "qk" not in self.linear:
            raise UserError(
                "pooling.shared=true shares the projection of q and k, "
                f"and pooling.linear={self.linear!r} lacks one of them: choose qk or qkv"
            )
        if self.k > 1 and (num_heads > 1 or self.init != "gap"):
            raise UserError(
                f"pooling.k={self.k} vectors are initialized by k-means and have one head each: "
                "leave pooling.init and pooling.num_heads out, or choose k=1"
            )


def ablated_simpool(pooling: SimPool, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pool patches [B, N, D] by any design: vectors [B, k, D], attention [B, k or heads, N]."""
    ablation, heads = pooling.ablation, pooling.num_heads
    scale = 1.0 if ablation.similarity == "cosine" else math.sqrt(pooling.dim // heads)
    u = _initial_vectors(pooling, x)
    for layer in [pooling] if ablation.layers == 1 else [pooling, *pooling.further]:
        for iteration in range(ablation.iterations):
            queries = projected(pooling, layer, "q", u)
            if heads > 1:
                queries = split_heads(queries, heads)
            if iteration == 0:  # the patches do not change
                keys, values = projected(pooling, layer, "k", x), projected(pooling, layer, "v", x)
                if pooling.gamma is not None:
                    values = pooling.subtract_minimum(values)
            logits = SIMILARITIES[ablation.similarity](queries, keys)
            attention = NORMALIZATIONS[ablation.normalize](logits / scale)
            if pooling.gamma is None:
                u = torch.matmul(attention, values)
            else:
                u = power_mean(attention, values, pooling.current_gamma(values.dtype))
            if heads > 1:
                u = merge_heads(u, heads)
    return u, attention


def _initial_vectors(pooling: SimPool, x: Tensor) -> Tensor:
    ablation = pooling.ablation
    if ablation.k > 1:
        return torch.matmul(lloyd(x.detach(), ablation.k, iterations=5, tolerance=0.01, seed=0), x)
    if ablation.init == "learned":
        return pooling.start.to(x.dtype).expand(len(x), -1, -1)
    if ablation.init == "gap":
        return x.mean(dim=1, keepdim=True)
    energy = x.square().sum(dim=-1).unsqueeze(1)
    return torch.matmul(energy / energy.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny), x)


def projected(pooling: SimPool, layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """Apply the LayerNorm and the projection of q, k or v, where the ablation has them."""
    ablation = pooling.ablation
    if name in ablation.layer_norm:
        x = layer_norm(pooling.norm_patches, x)
    if name not in ablation.linear:
        return x
    shared_name = "q" if name == "k" and ablation.shared else name
    return linear(layer.get_submodule(f"w{shared_name}"), x)


def split_heads(queries: Tensor, heads: int) -> Tensor:
    """Spread a query [B, 1, D] over heads on a block diagonal, [B, heads, D] (eq. B49)."""
    blocks = torch.eye(heads, dtype=queries.dtype, device=queries.device)
    return queries * blocks.repeat_interleave(queries.shape[-1] // heads, dim=1)


def merge_heads(vectors: Tensor, heads: int) -> Tensor:
    """Concatenate each head's block of the vectors [B, heads, D]: [B, 1, D]."""
    return vectors.unflatten(-1, (heads, -1)).diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1).unsqueeze(1)


def _dot(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.matmul(queries, keys.transpose(1, 2))


def _euclidean(queries: Tensor, keys: Tensor) -> Tensor:
    squared_queries = queries.square().sum(dim=-1, keepdim=True)
    return 2 * _dot(queries, keys) - squared_queries - keys.square().sum(dim=-1).unsqueeze(1)


def _cosine(queries: Tensor, keys: Tensor) -> Tensor:
    return _dot(F.normalize(queries, dim=-1, eps=1e-6), F.normalize(keys, dim=-1, eps=1e-6))


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1)


def _sigmoid(logits: Tensor) -> Tensor:
    weights = torch.sigmoid(logits)
    return weights / weights.sum(dim=-1, keepdim=True)


SIMILARITIES = {"dot": _dot, "euclidean": _euclidean, "cosine": _cosine}
NORMALIZATIONS = {"softmax": _softmax, "sigmoid": _sigmoid}
