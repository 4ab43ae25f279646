"""The projection head of self-distillation: a trunk to a unit bottleneck, then prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.functional.errors import UserError


class WeightNormLinear(nn.Module):
    """Linear map without bias whose row k is weight_g[k] times the unit vector along weight_v[k].

    weight_g [K, 1] starts at 1, weight_v [K, in] as a framework Linear does; the names are those of the reference's
    files. Unlike torch's weight norm it can be copied. attmask.md 1.2, 6.4.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(outputs, 1))
        self.weight_v = nn.Parameter(nn.Linear(inputs, outputs, bias=False).weight.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The matrix that the layer multiplies with, [K, in], in float32 at least."""
        v = self.weight_v
        with torch.autocast(v.device.type, enabled=False):
            return v * (self.weight_g / v.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., K]."""
        return F.linear(x.to(self.weight_v.dtype), self.weight)


class ProjectionHead(nn.Module):
    """Vectors [..., dim] -> logits over prototypes [..., K] (DINO head; iBOT's with `patch_prototypes`; attmask.md 1.2).

    `layers` Linears with GELU between lead to a bottleneck that is scaled to length 1; the last layer is weight-normed,
    so that with its gains at 1 (frozen there by `norm_last_layer`) logits are cosines. norm="batch" puts a batch norm
    of its own after each hidden Linear. `patch_prototypes` gives patches a last layer of their own.
    Raises UserError for another norm or layers below 1.
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
            raise UserError(f"head.layers={layers} leaves no layer: choose 1 or more")
        self.dim, self.prototypes, self.patch_prototypes, self.bottleneck = dim, prototypes, patch_prototypes, bottleneck
        widths = [dim, *[hidden] * (layers - 1), bottleneck]
        trunk: list[nn.Module] = []
        for i, (before, after) in enumerate(zip(widths, widths[1:])):
            trunk.append(nn.Linear(before, after))
            if i < layers - 1:
                trunk += [nn.BatchNorm1d(after)] * (norm == "batch") + [nn.GELU()]
        self.mlp = nn.Sequential(*trunk)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck, prototypes)
        self.last_layer2 = WeightNormLinear(bottleneck, patch_prototypes) if patch_prototypes else None
        for last in filter(None, (self.last_layer, self.last_layer2)):
            last.weight_g.requires_grad_(not norm_last_layer)

    def embed(self, x: Tensor) -> Tensor:
        """[..., dim] -> bottleneck vectors of length 1, [..., bottleneck], float32 or better."""
        z = self.mlp(x.reshape(-1, x.shape[-1]))
        z = z if z.dtype == torch.float64 else z.float()  # autocast on CPU would normalise in bf16
        return F.normalize(z, dim=-1).reshape(*x.shape[:-1], self.bottleneck)

    def classify(self, z: Tensor) -> Tensor:
        """Bottleneck vectors [..., bottleneck] -> logits [..., K]."""
        return self.last_layer(z)

    def classify_patches(self, z: Tensor) -> Tensor:
        """Bottleneck vectors of patches [..., bottleneck] -> logits over the patches' prototypes."""
        return self.last_layer(z) if self.last_layer2 is None else self.last_layer2(z)

    def weights(self) -> tuple[Tensor, Tensor]:
        """The last layers' matrices for images and for patches, [K, bottleneck] each; the same one where it is shared."""
        own = self.last_layer.weight
        return own, own if self.last_layer2 is None else self.last_layer2.weight

    def patch_mean_logits(self, zbar: Tensor) -> Tensor:
        """Mean logits of many patches from their mean bottleneck vector: mean(W z) = W mean(z) (attmask.md fact 34)."""
        return self.classify_patches(zbar)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> logits [..., K]."""
        return self.classify(self.embed(x))
