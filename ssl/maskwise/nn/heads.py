"""Projection head of DINO and iBOT: an MLP to a unit-norm bottleneck, then prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.functional.precision import at_least_float32


class WeightNormLinear(nn.Module):
    """Linear layer without bias; row k is weight_g[k] times the unit vector along weight_v[k].

    weight_g [K, 1] starts at 1, weight_v [K, in] as in nn.Linear; the names are those of DINO's checkpoints. Unlike
    torch's weight norm it can be copied.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(outputs, 1))
        self.weight_v = nn.Parameter(nn.Linear(inputs, outputs, bias=False).weight.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The normalized weight [K, in], in float32 at least."""
        v = self.weight_v
        with torch.autocast(v.device.type, enabled=False):
            return v * (self.weight_g / v.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., K]."""
        return F.linear(x.to(self.weight_v.dtype), self.weight)


class ProjectionHead(nn.Module):
    """Vectors [..., dim] -> logits over prototypes [..., K] (DINO, sec. 3.1; iBOT, sec. 3.2).

    `layers` Linears with GELU between them lead to a bottleneck, normalized to length 1; the last layer is
    weight-normalized, so that logits are cosines while its gains are 1 (frozen by `norm_last_layer`). norm="batch"
    adds a batch norm after each hidden Linear. `patch_prototypes` adds a separate last layer for patches.
    Raises UserError for another norm or fewer than one layer.
    """

    def __init__(
        self,
        dim: int,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        norm: str | None = None,
        norm_last_layer: bool = True,
        patch_prototypes: int | None = None,
    ):
        super().__init__()
        if norm not in (None, "batch"):
            raise UserError(f"head.norm={norm!r} is unknown: choose batch, or null for none")
        if layers < 1:
            raise UserError(f"head.layers={layers} is too few: choose 1 or more")
        self.dim, self.bottleneck = dim, bottleneck
        self.prototypes, self.patch_prototypes = prototypes, patch_prototypes
        widths = [dim, *[hidden] * (layers - 1), bottleneck]
        mlp: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            mlp.append(nn.Linear(inputs, outputs))
            if i < layers - 1:
                mlp += [nn.BatchNorm1d(outputs)] * (norm == "batch") + [nn.GELU()]
        self.mlp = nn.Sequential(*mlp)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck, prototypes)
        self.last_layer2 = WeightNormLinear(bottleneck, patch_prototypes) if patch_prototypes else None
        for last in filter(None, (self.last_layer, self.last_layer2)):
            last.weight_g.requires_grad_(not norm_last_layer)

    def embed(self, x: Tensor) -> Tensor:
        """[..., dim] -> bottleneck vectors of length 1, [..., bottleneck], float32 at least."""
        z = self.mlp(x.reshape(-1, x.shape[-1]))
        z = at_least_float32(z)  # autocast on CPU would normalize in bf16
        return F.normalize(z, dim=-1).reshape(*x.shape[:-1], self.bottleneck)

    def classify(self, z: Tensor) -> Tensor:
        """Bottleneck vectors [..., bottleneck] -> logits [..., K]."""
        return self.last_layer(z)

    def classify_patches(self, z: Tensor) -> Tensor:
        """Bottleneck vectors of patches [..., bottleneck] -> logits over the patch prototypes [..., K]."""
        return self.last_layer(z) if self.last_layer2 is None else self.last_layer2(z)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return the last layers' weights for images and for patches, [K, bottleneck] each; the same one if shared."""
        weight = self.last_layer.weight
        return weight, weight if self.last_layer2 is None else self.last_layer2.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> logits [..., K]."""
        return self.classify(self.embed(x))
