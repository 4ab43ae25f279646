"""Several class tokens of a Vision Transformer as a classifier: the row "class_tokens" of CLASSIFIERS."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from maskwise.bounds import Count
from maskwise.errors import UserError
from maskwise.functional import map_losses
from maskwise.nn.dropout import KeyedDropout
from maskwise.nn.multi_token.head import HEADS, TOKEN_DROPOUT, initialize
from maskwise.nn.multi_token.options import TokenHeadOptions
from maskwise.nn.option_groups import option_groups
from maskwise.nn.tokens import Features


class ClassTokensClassifier(nn.Module):
    """Classify by class tokens that take part in every block (MAP, table 8, "ViT-style MAP").

    Features -> logits [B, C], the mean over groups. The tokens are the backbone's class token and registers, T = 1 +
    `backbone.reg_tokens`, split into `groups` with a head each. inter: weight of the divergence between groups (MAP,
    eq. 4). The fields of TokenHeadOptions are keywords. The encoder's pooling is unused and frozen.
    Raises UserError for an encoder without a class token, and for groups that do not divide the tokens.
    """

    @option_groups
    def __init__(
        self,
        encoder: nn.Module,
        classes: Count,
        *,
        groups: Count = 1,
        inter: float = -0.8,
        head_options: TokenHeadOptions = TokenHeadOptions(),
    ):
        super().__init__()
        backbone = encoder.backbone
        if classes < 1:
            raise UserError(f"classifier.classes={classes} leaves no class to predict: choose 1 or more")
        if not backbone.has_class_token:
            raise UserError(
                "classifier class_tokens reads the class token and registers of a Vision Transformer, and this network "
                "has none: choose backbone.class_token=true and backbone.reg_tokens, or classifier map"
            )
        self.tokens, self.layers = backbone.num_prefix, (backbone.depth - 1,)
        if groups < 1 or self.tokens % groups:
            raise UserError(
                f"classifier.groups={groups} does not divide the {self.tokens} class tokens and registers: choose a "
                "divisor, or other backbone.reg_tokens"
            )
        if head_options.head not in HEADS:
            raise UserError(f"map: head={head_options.head!r} is unknown: choose {' or '.join(HEADS)}")
        self.classes, self.groups, self.inter = classes, groups, inter
        head = HEADS[head_options.head]
        size = self.tokens // groups
        self.heads = nn.ModuleList(head(encoder.dim, size, classes, head_options.norm) for _ in range(groups))
        self.token_drop = KeyedDropout(head_options.token_dropout)
        initialize(self.heads)
        encoder.pooling.requires_grad_(False)

    def token_groups(self, features: Features, drop_key: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the normalized tokens of each group, [B, T / groups, D], in training after dropout."""
        tokens = self.token_drop(features.layers[0][:, : self.tokens], drop_key, TOKEN_DROPOUT)
        return tokens.chunk(self.groups, dim=1)

    def group_logits(self, features: Features, drop_key: Tensor | None = None) -> Tensor:
        """Return the logits of each group, [B, groups, C]."""
        pairs = zip(self.heads, self.token_groups(features, drop_key))
        return torch.stack([head(tokens) for head, tokens in pairs], dim=1)

    def forward(self, features: Features) -> Tensor:
        """Return the logits [B, C]."""
        return self.group_logits(features).mean(dim=1)

    def token_logits(self, features: Features) -> Tensor:
        """Return each token's logits, [B, T, C]."""
        return torch.cat([head.token_logits(t) for head, t in zip(self.heads, self.token_groups(features))], dim=1)

    def losses(
        self,
        features: Features,
        targets: Tensor,
        criterion: Callable[[Tensor, Tensor], Tensor],
        *,
        drop_key: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return {"loss", "label"} and with several groups "inter" for targets [B, C]."""
        logits = self.group_logits(features, drop_key)
        return map_losses.map_loss(logits, None, targets, criterion, inter=self.inter)
