"""MAP as a row of CLASSIFIERS."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from maskwise.functional import distillation
from maskwise.functional.errors import UserError
from maskwise.nn.map import MAPHead, Said
from maskwise.nn.tokens import Features


class MAPClassifier(nn.Module):
    """Multi-token attention pooling over the stages of a backbone: Features -> logits [B, C], the mean over token groups.

    layers: which stages or blocks; by default all stages of a backbone of several, stem first, and the final patches alone of others.
    `level` is the one whose grid they are brought to, by default the last but one. The network's own pooling is not read, nor its
    final norm where stages are taken as they are: both stand still. intra, inter, reduction, teacher, center and total are
    distillation.map_loss's; everything else is as in MAPHead, MultiScale and MAP. light: MAP-light, inference only.
    Raises UserError for sizes that do not fit, and when a light one is to be trained. Kang and Ryu 2024, pooling.md 3.
    """

    def __init__(
        self, encoder: nn.Module, classes: int, *, layers: tuple[int, ...] | None = None, level: int = -2, resample: str = "released", dim: int = 384,
        groups: int = 2, tokens: int = 4, gram: bool = True, gram_width: int | None = None, gram_groups: int | None = None, embed: int | None = None,
        heads: int | None = None, talking: bool = False, keys: str = "tokens+pixels", average: str | None = "mean", mlp_ratio: float = 4.0,
        mlp_groups: int = 2, head: str = "joint", norm: bool = True, dropout: float = 0.05, token_dropout: float = 0.0, intra: float = 1.0,
        inter: float = -0.8, reduction: str = "mean_elements", teacher: str = "tokens", center: str = "logits", total: str = "per_group", light: bool = False,
    ):  # fmt: skip
        super().__init__()
        if classes < 1:
            raise UserError(f"classifier.classes={classes} leaves nothing to tell apart: choose 1 or more")
        distillation.check(reduction, teacher=teacher, center=center, total=total)
        backbone = encoder.backbone
        widths = getattr(backbone, "stage_dims", None)
        if layers is None:
            layers = () if widths is None or len(widths) == 2 else tuple(range(len(widths)))
        self.layers, self.prefix, self.classes, self.light = tuple(layers), getattr(backbone, "num_prefix", 0), classes, False
        self.tokens = groups * tokens  # that speak
        dims = [encoder.dim if widths is None else widths[i] for i in self.layers] or [encoder.dim]
        self.distil = {"intra": intra, "inter": inter, "reduction": reduction, "teacher": teacher, "center": center, "total": total}
        self.head = MAPHead(
            dims, classes, dim=dim, level=level, resample=resample, head=head, norm=norm, token_dropout=token_dropout, groups=groups,
            tokens=tokens, gram=gram, gram_width=gram_width, gram_groups=gram_groups, embed=embed, heads=heads, talking=talking, keys=keys,
            average=average, mlp_ratio=mlp_ratio, mlp_groups=mlp_groups, dropout=dropout,
        )  # fmt: skip
        if light:
            self.lighten()
        encoder.pooling.requires_grad_(False)
        if self.layers and widths is not None:
            encoder.norm.requires_grad_(False)

    def lighten(self) -> None:
        """Drop the tokens' heads: MAP-light. Raises UserError where there are no averaged tokens."""
        self.head.lighten()
        self.light, self.tokens = True, len(self.head.map.groups)

    def maps(self, features: Features) -> list[Tensor]:
        """The stages as maps [B, C_s, H_s, W_s]: tokens [B, P + N, D] are laid on the grid without their prefix."""
        if not self.layers:
            return [features.patches.transpose(1, 2).unflatten(2, features.grid)]
        return [stage if stage.ndim == 4 else stage[:, self.prefix :].transpose(1, 2).unflatten(2, features.grid) for stage in features.layers]

    def say(self, features: Features, drop_key: Tensor | None = None) -> Said:
        """Features -> what every group's tokens and averaged token say, [B, G, C] each."""
        return self.head(self.maps(features), drop_key)

    def forward(self, features: Features) -> Tensor:
        """Features -> logits [B, C]."""
        return self.head.logits(self.say(features))

    def each(self, features: Features) -> Tensor:
        """What every token says alone, group by group: Features -> logits [B, G * T, C], or of the averaged tokens [B, G, C] when light."""
        attended = self.head.map(self.head.fuse(self.maps(features)))
        if self.head.heads is None:
            return self.head.speak(attended).averaged
        return torch.cat([head.each(group) for head, group in zip(self.head.heads, attended.tokens.unbind(1))], dim=1)

    def losses(
        self, features: Features, targets: Tensor, criterion: Callable[[Tensor, Tensor], Tensor], *, drop_key: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Features, targets [B, C] -> {"loss", "label", "intra", "inter"}; drop_key int64 [B] makes dropout a function of an image's key."""
        said = self.say(features, drop_key)
        if said.tokens is None:
            raise UserError("classifier.light=true is for inference: train with light=false, then leave the tokens' heads out")
        return distillation.map_loss(said.tokens, said.averaged, targets, criterion, **self.distil)
