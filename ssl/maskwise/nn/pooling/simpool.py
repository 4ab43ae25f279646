"""SimPool: one attention-weighted power mean of the patches, asked for by their average."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.functional.means import power_mean
from maskwise.nn.pooling import framework
from maskwise.nn.pooling.kmeans import lloyd
from maskwise.nn.pooling.several import Several
from maskwise.nn.tokens import Pooled

NORM_EPS = 1e-6
SHIFT = 1e-6  # added after the minimum is taken off, so that no value is zero under the power
LEAST = 0.1  # of a learned gamma, as in GeM: nearer to 0 the root of the mean is all rounding
INITS = ("gap", "energy", "learned")
SIMILARITIES = ("dot", "euclidean", "cosine")
NORMALISATIONS = ("softmax", "sigmoid")
STARTS = ("normal", "uniform")


class SimPool(Several):
    """Tokens, [B, N, dim] or [B, dim, H, W] -> Pooled(vector [B, dim], attention [B, heads, N], each head's sum 1).

    The query is the mean of the raw tokens, keys and values share one LayerNorm, and values meet in a power mean of
    exponent `gamma` above the minimum (None: a plain mean). `min_scope` takes that minimum per "image", as the paper,
    or per "batch", as the released weights were trained. `beta` adds a learned scalar. Weights: 2 dim^2 + 2 dim (+ 1).
    `weight_start` draws W_Q and W_K "normal" (std 0.02: ViT, ConvNeXt; None too) or "uniform" (+-1 / sqrt(dim): ResNet).
    `learn_gamma` makes gamma a weight, `exponent` [1], that begins at `gamma` and is read as no less than 0.1 and, given `gamma_max`, no more
    than that (the paper's 5); beyond a bound only a gradient that leads back reaches it. `gamma_lr` is a factor on its learning rate (the paper's 0.1).

    The rest are the paper's ablations (Table 10), the default its choice: what the query begins as (`init`), `similarity`,
    `normalise` (sigmoid: then shared out over patches), `iterations` of one set of maps, `layers` of a set each, `shared` W_Q = W_K,
    which of q, k, v have a map (`linear`) and a LayerNorm (`layer_norm`), and `k` vectors begun by k-means, with their `reduce`.
    Raises UserError for arguments outside these. SimPool paper eq. 12-17, pooling.md 1 and 2.4.
    """

    def __init__(
        self,
        dim: int,
        gamma: float | None = 1.25,
        num_heads: int = 1,
        min_scope: str = "image",
        beta: bool = False,
        *,
        weight_start: str | None = None,
        init: str = "gap",
        similarity: str = "dot",
        normalise: str = "softmax",
        iterations: int = 1,
        layers: int = 1,
        shared: bool = False,
        linear: str = "qk",
        layer_norm: str = "kv",
        k: int = 1,
        reduce: str = "max_logit",
        learn_gamma: bool = False,
        gamma_max: float | None = None,
        gamma_lr: float = 1.0,
    ):
        super().__init__(dim, k, reduce)
        if gamma is not None and gamma <= 0:
            raise UserError(f"pooling.gamma={gamma} is not above 0: choose 1.25 for transformers, 2 for convolutions, or null for a plain mean")
        self.learn_gamma, self.gamma_max, self.gamma_lr = learn_gamma, gamma_max, gamma_lr
        self._check_learned(gamma)
        self.gamma, self.num_heads, self.min_scope = gamma, self.heads_of(num_heads), self.chosen("min_scope", min_scope, ("image", "batch"))
        self.weight_start, self.init = weight_start and self.chosen("weight_start", weight_start, STARTS), self.chosen("init", init, INITS)
        self.similarity, self.normalise = self.chosen("similarity", similarity, SIMILARITIES), self.chosen("normalise", normalise, NORMALISATIONS)
        self.iterations, self.layers, self.shared, self.linear, self.layer_norm = iterations, layers, shared, linear, layer_norm
        self._check()
        if layer_norm:
            self.norm_patches = nn.LayerNorm(dim, eps=NORM_EPS)
        for name in linear:
            self._add_map(self, name)
        self.beta = nn.Parameter(torch.zeros(1)) if beta and gamma is not None else None
        self.exponent = nn.Parameter(torch.full((1,), float(gamma))) if learn_gamma else None
        self.lr_factors = {"exponent": gamma_lr} if learn_gamma else {}
        if init == "learned":
            self.start = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        if layers > 1:
            self.further = nn.ModuleList(nn.Module() for _ in range(layers - 1))
            for each in self.further:
                for name in linear:
                    self._add_map(each, name)
        self.usual = (init, similarity, normalise, iterations, layers, shared, linear, layer_norm, k) == ("gap", "dot", "softmax", 1, 1, False, "qk", "kv", 1)

    def _check_learned(self, gamma: float | None) -> None:
        if not self.learn_gamma:
            for key, value, usual in (("gamma_max", self.gamma_max, None), ("gamma_lr", self.gamma_lr, 1.0)):
                if value != usual:
                    raise UserError(f"pooling.{key}={value} is of a learned gamma, and pooling.learn_gamma is false: set it to true, or leave {key} out")
            return
        highest = math.inf if self.gamma_max is None else self.gamma_max
        if gamma is None or not LEAST <= gamma <= highest:
            raise UserError(f"pooling.gamma={gamma} cannot be where pooling.learn_gamma begins: choose {f'{LEAST} or more, such as 2' if self.gamma_max is None else f'from {LEAST} to gamma_max={highest}'}")
        if self.gamma_lr <= 0:
            raise UserError(f"pooling.gamma_lr={self.gamma_lr} is not above 0: choose 0.1, or pooling.learn_gamma=false for a gamma that stands still")

    def power(self, dtype: torch.dtype) -> float | Tensor | None:
        """The exponent in use: gamma, or [1] of the weight within its bounds."""
        if self.exponent is None:
            return self.gamma
        return Within.apply(self.exponent.to(dtype), LEAST, math.inf if self.gamma_max is None else self.gamma_max)

    def _check(self) -> None:
        for key in ("iterations", "layers"):
            if getattr(self, key) < 1:
                raise UserError(f"pooling.{key}={getattr(self, key)} is out of range: choose 1 or more")
        for key in ("linear", "layer_norm"):
            value = getattr(self, key)
            if value not in ("", "q", "k", "v", "qk", "qv", "kv", "qkv"):
                raise UserError(f"pooling.{key}={value!r} is unknown: name those of q, k and v that have one, such as kv; '' for none")
        if self.shared and "qk" not in self.linear:
            raise UserError(f"pooling.shared=true shares the maps of q and k, and pooling.linear={self.linear!r} has not both: choose qk or qkv")
        if self.k > 1 and (self.num_heads > 1 or self.init != "gap"):
            raise UserError(f"pooling.k={self.k} vectors begin by k-means and have one head each: leave pooling.init and pooling.num_heads out, or choose k=1")

    def _add_map(self, home: nn.Module, name: str) -> None:
        if name == "k" and self.shared:
            return
        layer = nn.Linear(self.dim, self.dim, bias=False)
        if self.weight_start != "uniform":
            nn.init.normal_(layer.weight, std=0.02)
        home.add_module(f"w{name}", layer)

    def arguments(self) -> dict[str, object]:
        """What this pooling was built with; `beta` is a weight, and told by its presence."""
        return {**super().arguments(), "beta": self.beta is not None}

    def pool(self, x: Tensor, grid) -> Pooled:
        """The weighted power mean of patches."""
        return self._usual(x) if self.usual else self._ablated(x)

    def _usual(self, x: Tensor) -> Pooled:
        heads, width = self.num_heads, self.dim // self.num_heads
        normed = F.layer_norm(x, (self.dim,), self.norm_patches.weight.to(x.dtype), self.norm_patches.bias.to(x.dtype), NORM_EPS)
        query = F.linear(x.mean(dim=1), self.wq.weight.to(x.dtype)).unflatten(-1, (heads, 1, width))
        # (H W_K^T) q = H (W_K^T q): with few queries this order saves N D^2 products an image
        towards = torch.matmul(query, self.wk.weight.to(x.dtype).unflatten(0, (heads, width))).squeeze(2)  # [B, heads, D]
        attention = torch.softmax(torch.matmul(towards, normed.transpose(1, 2)) / math.sqrt(width), dim=-1)
        if self.gamma is None:
            return Pooled(self._weigh(attention, normed), attention)
        values = self._lifted(normed)
        top = values.detach().amax(dim=1, keepdim=True)  # a scale that cancels: no power of a large gamma under- or overflows
        gamma = self.power(x.dtype)
        mean = self._weigh(attention, (values / top).pow(gamma)).clamp_min(torch.finfo(x.dtype).tiny)
        mean = mean.pow(1 / gamma) * top[:, 0]
        return Pooled(mean if self.beta is None else mean + self.beta.to(x.dtype), attention)

    def _lifted(self, values: Tensor) -> Tensor:
        low = values.flatten(1).min(dim=1).values[:, None, None] if self.min_scope == "image" else values.min()
        return values - low + SHIFT

    def _weigh(self, attention: Tensor, values: Tensor) -> Tensor:
        split = values.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, D / heads]
        return torch.matmul(attention.unsqueeze(2), split).flatten(1)

    def _ablated(self, x: Tensor) -> Pooled:
        u, attention = framework.pool(x, *self.steps())
        return self.reduced(u if self.beta is None else u + self.beta.to(x.dtype), attention)

    def steps(self) -> list[framework.Parts]:
        """This pooling in the parts of the framework, one `Parts` a layer; equal to what `forward` computes in one piece."""
        spread, gather = framework.split(self.num_heads)
        scale = math.sqrt(self.dim // self.num_heads) if self.similarity != "cosine" else 1.0
        normalise = {"softmax": framework.softmax, "sigmoid": framework.sigmoid}[self.normalise](scale)
        more = [] if self.layers == 1 else list(self.further)

        def mapped(home: nn.Module, name: str):
            layer = getattr(home, "wq" if self.shared and name == "k" else f"w{name}", None) if name in self.linear else None

            def apply(x: Tensor, *_) -> Tensor:
                if name in self.layer_norm:
                    x = F.layer_norm(x, (self.dim,), self.norm_patches.weight.to(x.dtype), self.norm_patches.bias.to(x.dtype), NORM_EPS)
                return x if layer is None else F.linear(x, layer.weight.to(x.dtype))

            return apply

        def parts(home: nn.Module) -> framework.Parts:
            query, value = mapped(home, "q"), mapped(home, "v")
            return framework.Parts(
                init=self._begin,
                query=query if self.num_heads == 1 else lambda u: spread(query(u)),
                key=mapped(home, "k"),
                similarity=getattr(framework, self.similarity),
                attention=normalise,
                value=value if self.gamma is None else lambda x, *_: self._lifted(value(x)),
                f=torch.matmul if self.gamma is None else lambda a, v: power_mean(a, v, self.power(v.dtype)),
                update=framework.same if self.num_heads == 1 else gather,
                iterations=self.iterations,
                fixed=True,
            )

        return [parts(home) for home in (self, *more)]

    def _begin(self, x: Tensor) -> Tensor:
        if self.k > 1:
            return torch.matmul(lloyd(x.detach(), self.k, iterations=5, tolerance=0.01, seed=0), x)
        if self.init == "learned":
            return self.start.to(x.dtype).expand(len(x), -1, -1)
        return framework.average(x) if self.init == "gap" else framework.by_energy(x)


class Within(torch.autograd.Function):
    """A tensor brought between two numbers; beyond one of them a gradient passes if a step against it leads back, so that nothing is stuck there."""

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        """x, clamped."""
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, given: Tensor) -> tuple[Tensor, None, None]:
        """The gradient, or 0 where it leads further out."""
        (x,), (low, high) = ctx.saved_tensors, ctx.bounds
        return torch.where(((x >= high) & (given < 0)) | ((x <= low) & (given > 0)), 0, given), None, None
