"""SimPool: a power mean of the patches, weighted by attention to their average (Psomas et al. 2023, Algorithm 2)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from maskwise.bounds import Count, Positive
from maskwise.errors import UserError
from maskwise.functional.precision import at_least_float32
from maskwise.nn.option_groups import option_groups
from maskwise.nn.pooling.base import check_choice, check_heads, layer_norm, linear
from maskwise.nn.pooling.learned_gamma import LearnedGamma
from maskwise.nn.pooling.multi_vector import MultiVectorPooling
from maskwise.nn.pooling.simpool_ablations import Ablation, ablated_simpool, projected
from maskwise.nn.tokens import Pooled

NORM_EPS = 1e-6
SHIFT = 1e-6  # keeps values positive after the minimum is subtracted, where the power has a finite gradient


class SimPool(MultiVectorPooling):
    """Pool into a vector [B, dim] with attention [B, heads, N], each head's sum 1.

    Weights: 2 dim^2 + 2 dim, + 1 with beta.
    gamma: exponent of the power mean, (1 - alpha) / 2; None for a plain weighted mean.
    min_scope: minimum subtracted from the values, of each "image" (the paper) or the "batch" (the released weights).
    beta: add a learned scalar, as in the released self-supervised ViTs.
    weight_init: W_Q and W_K "normal" with std 0.02 (ViT, ConvNeXt; also None) or "uniform" in +-1/sqrt(dim) (ResNet).
    The fields of LearnedGamma and Ablation are keywords. Raises UserError for values out of range.
    """

    @option_groups
    def __init__(
        self,
        dim: int,
        gamma: Positive | None = 1.25,
        num_heads: Count = 1,
        min_scope: Literal["image", "batch"] = "image",
        beta: bool = False,
        *,
        weight_init: Literal["normal", "uniform"] | None = None,
        ablation: Ablation = Ablation(),
        gamma_options: LearnedGamma = LearnedGamma(),
    ):
        super().__init__(dim, ablation.k, ablation.reduce)
        if gamma is not None and gamma <= 0:
            raise UserError(
                f"pooling.gamma={gamma} is not above 0: "
                "choose 1.25 for transformers, 2 for convolutions, or null for a plain mean"
            )
        gamma_options.check(gamma)
        self.gamma, self.num_heads = gamma, check_heads(num_heads, dim)
        self.min_scope = check_choice("min_scope", min_scope, ("image", "batch"))
        self.weight_init = weight_init and check_choice("weight_init", weight_init, ("normal", "uniform"))
        ablation.check(num_heads)
        self.ablation, self.gamma_options, self.learn_gamma = ablation, gamma_options, gamma_options.learn_gamma
        if ablation.layer_norm:
            self.norm_patches = nn.LayerNorm(dim, eps=NORM_EPS)
        self._add_projections(self)
        self.beta = nn.Parameter(torch.zeros(1)) if beta and gamma is not None else None
        self.exponent = nn.Parameter(torch.full((1,), float(gamma))) if self.learn_gamma else None
        self.lr_factors = {"exponent": gamma_options.gamma_lr} if self.learn_gamma else {}
        # "start" and "further" are the names of these weights in checkpoints.
        if ablation.init == "learned":
            self.start = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        if ablation.layers > 1:
            self.further = nn.ModuleList(nn.Module() for _ in range(ablation.layers - 1))
            for layer in self.further:
                self._add_projections(layer)

    def _add_projections(self, module: nn.Module) -> None:
        names = self.ablation.linear.replace("k", "") if self.ablation.shared else self.ablation.linear
        for name in names:
            projection = nn.Linear(self.dim, self.dim, bias=False)
            if self.weight_init != "uniform":
                nn.init.normal_(projection.weight, std=0.02)
            module.add_module(f"w{name}", projection)

    def arguments(self) -> dict[str, object]:
        """Return the keyword arguments that construct an equal pooling, width included."""
        return {**super().arguments(), "beta": self.beta is not None}

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Algorithm 2: GAP as the query, LayerNorm on keys and values, a power mean weighted by attention."""
        if not self.ablation.is_default:
            u, attention = ablated_simpool(self, x)
            return self.reduced(u if self.beta is None else u + self.beta.to(x.dtype), attention)
        head_dim = self.dim // self.num_heads
        patches = layer_norm(self.norm_patches, x)
        query = linear(self.wq, x.mean(dim=1)).unflatten(-1, (self.num_heads, 1, head_dim))  # eq. 12 and 13
        # LN(X) W_K^T q (eq. B52) from right to left: with a single query, this saves N D^2 products per image.
        key_weight = self.wk.weight.to(x.dtype).unflatten(0, (self.num_heads, head_dim))
        query_on_patches = torch.matmul(query, key_weight).squeeze(2)  # [B, heads, D]
        logits = torch.matmul(query_on_patches, patches.transpose(1, 2)) / math.sqrt(head_dim)
        attention = torch.softmax(logits, dim=-1)  # eq. 15
        if self.gamma is None:
            return Pooled(self._weighted_sum(attention, patches), attention)
        vector = self._power_mean(attention, self.subtract_minimum(patches))
        return Pooled(vector if self.beta is None else vector + self.beta.to(x.dtype), attention)

    def keys(self, x: Tensor) -> Tensor:
        """Return the keys W_K LN(X) of patches [B, N, D] as the pooling takes them -> [B, N, D] (eq. 14)."""
        return projected(self, self, "k", at_least_float32(x))

    def subtract_minimum(self, values: Tensor) -> Tensor:
        """Return values [B, N, D] above their minimum over each image, or over the batch (eq. B53)."""
        if self.min_scope == "batch":
            return values - values.min() + SHIFT
        return values - values.flatten(1).min(dim=1).values[:, None, None] + SHIFT

    def current_gamma(self, dtype: torch.dtype) -> float | Tensor | None:
        """Return gamma, or the learned exponent [1] within its bounds."""
        return self.gamma if self.exponent is None else self.gamma_options.clamp(self.exponent.to(dtype))

    def _power_mean(self, attention: Tensor, values: Tensor) -> Tensor:
        gamma = self.current_gamma(values.dtype)
        # Each channel's maximum cancels; dividing by it keeps powers of a large gamma in range.
        top = values.detach().amax(dim=1, keepdim=True)
        mean = self._weighted_sum(attention, (values / top).pow(gamma)).clamp_min(torch.finfo(values.dtype).tiny)
        return mean.pow(1 / gamma) * top[:, 0]  # eq. 17

    def _weighted_sum(self, attention: Tensor, values: Tensor) -> Tensor:
        split = values.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, D / heads]
        return torch.matmul(attention.unsqueeze(2), split).flatten(1)
