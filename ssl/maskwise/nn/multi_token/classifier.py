"""MAP as a classifier of an encoder's features: the row "map" of CLASSIFIERS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from maskwise.bounds import Count, Rate
from maskwise.errors import UserError
from maskwise.functional import map_losses
from maskwise.nn.multi_token.head import GroupLogits, MAPHead
from maskwise.nn.multi_token.options import (
    AttentionOptions,
    Average,
    DistillationOptions,
    FusionOptions,
    TokenHeadOptions,
    TokenOptions,
)
from maskwise.nn.option_groups import option_groups
from maskwise.nn.tokens import Features


class MAPClassifier(nn.Module):
    """Classify the stages of a backbone by MAPHead: Features -> logits [B, C], the mean over token groups.

    layers: stages or blocks to fuse; by default all stages, stem first, of a backbone with several, and the final
    patches of others. level: the stage whose grid they are resized to. light: MAP-light, for inference only.
    The encoder's pooling, and its final norm if stages are fused, are unused and frozen. Other arguments as in MAPHead
    and functional.map_losses.map_loss. Raises UserError for sizes that do not fit.
    """

    @option_groups
    def __init__(
        self,
        encoder: nn.Module,
        classes: Count,
        *,
        layers: tuple[int, ...] | None = None,
        heads: Count | None = None,
        average: Average | None = "mean",
        dropout: Rate = 0.05,
        light: bool = False,
        fusion_options: FusionOptions = FusionOptions(level=-2),
        token_options: TokenOptions = TokenOptions(),
        attention_options: AttentionOptions = AttentionOptions(),
        head_options: TokenHeadOptions = TokenHeadOptions(),
        distillation: DistillationOptions = DistillationOptions(),
    ):
        super().__init__()
        if classes < 1:
            raise UserError(f"classifier.classes={classes} leaves no class to predict: choose 1 or more")
        map_losses.check(
            distillation.reduction, teacher=distillation.teacher, center=distillation.center, total=distillation.total
        )
        widths = encoder.backbone.stage_dims
        if layers is None:
            layers = () if widths is None or len(widths) <= 2 else tuple(range(len(widths)))
        self.layers, self.prefix = tuple(layers), encoder.backbone.num_prefix
        self.classes, self.light, self.distillation = classes, light, distillation
        self.head = MAPHead(
            [encoder.dim if widths is None else widths[i] for i in self.layers] or [encoder.dim],
            classes,
            heads=heads,
            average=average,
            dropout=dropout,
            light=light,
            fusion_options=fusion_options,
            token_options=token_options,
            attention_options=attention_options,
            head_options=head_options,
        )
        encoder.pooling.requires_grad_(False)
        if self.layers and widths is not None:
            encoder.norm.requires_grad_(False)

    @property
    def groups(self) -> int:
        """Number of token groups."""
        return len(self.head.map.groups)

    @property
    def tokens(self) -> int:
        """Number of tokens with logits of their own: G * T, or G if light."""
        return self.groups if self.light else self.groups * self.head.map.tokens

    def drop_token_heads(self) -> None:
        """Turn into MAP-light by removing the token heads; raises UserError without averaged tokens."""
        self.head.drop_token_heads()
        self.light = True

    def stage_maps(self, features: Features) -> list[Tensor]:
        """Return the stages as maps [B, C_s, H_s, W_s], prefix tokens removed."""
        if not self.layers:
            return [features.patches.transpose(1, 2).unflatten(2, features.grid)]
        return [
            stage if stage.ndim == 4 else stage[:, self.prefix :].transpose(1, 2).unflatten(2, features.grid)
            for stage in features.layers
        ]

    def group_logits(self, features: Features, drop_key: Tensor | None = None) -> GroupLogits:
        """Return the logits of each group's tokens and averaged token, [B, G, C] each."""
        return self.head(self.stage_maps(features), drop_key)

    def forward(self, features: Features) -> Tensor:
        """Return the logits [B, C]."""
        return self.head.logits(self.group_logits(features))

    def token_logits(self, features: Features) -> Tensor:
        """Return each token's logits, group by group, [B, G * T, C]; if light, those of averaged tokens."""
        attended = self.head.map(self.head.fuse(self.stage_maps(features)))
        if self.head.heads is None:
            return self.head.group_logits(attended).averaged
        pairs = zip(self.head.heads, attended.tokens.unbind(1))
        return torch.cat([head.token_logits(group) for head, group in pairs], dim=1)

    def losses(
        self,
        features: Features,
        targets: Tensor,
        criterion: Callable[[Tensor, Tensor], Tensor],
        *,
        drop_key: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return {"loss", "label", "intra", "inter"} for targets [B, C].

        drop_key: int64 [B], makes dropout a function of each image's key.
        """
        groups = self.group_logits(features, drop_key)
        if groups.tokens is None:
            raise UserError("classifier.light=true is for inference: train with light=false, then export with light")
        return map_losses.map_loss(groups.tokens, groups.averaged, targets, criterion, **asdict(self.distillation))
