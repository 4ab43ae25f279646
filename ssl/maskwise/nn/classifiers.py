"""Table of classifiers: encoder features in, logits out.

A row is a module constructed as (encoder, classes, **options); it reads widths from the encoder without storing it.
It has `classes`, the number of classes; `layers`, the blocks or stages that it reads from Features.layers, () for none;
`forward(features)` -> logits [B, C]; and `losses(features, targets [B, C], criterion, drop_key=int64 [B])` -> dict with
"loss". criterion(logits, targets) is a scalar, a mean over images; the key makes dropout a function of the image.
Features may hold several views of each image, view-major; the criterion accounts for it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from maskwise.bounds import Count, Rate
from maskwise.errors import UserError
from maskwise.nn.dropout import KeyedDropout
from maskwise.nn.multi_token.class_tokens import ClassTokensClassifier
from maskwise.nn.multi_token.classifier import MAPClassifier
from maskwise.nn.tokens import Features


class LinearClassifier(nn.Module):
    """Linear layer on the pooled vector: Features -> logits [B, C].

    For a pooling into k vectors [B, k, D] (reduce max_logit), each class takes the largest of its k logits (SimPool,
    sec. 4). `dropout` is the rate on the input in training.
    """

    layers: tuple[int, ...] = ()

    def __init__(self, encoder: nn.Module, classes: Count, *, dropout: Rate = 0.0):
        super().__init__()
        if classes < 1:
            raise UserError(f"classifier.classes={classes} leaves no class to predict: choose 1 or more")
        if not 0 <= dropout < 1:
            raise UserError(f"classifier.dropout={dropout} is out of range: choose a rate of at least 0 and below 1")
        self.classes = classes
        self.dropout = KeyedDropout(dropout)
        self.linear = nn.Linear(encoder.dim, classes)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Features, drop_key: Tensor | None = None) -> Tensor:
        """Return the logits [B, C]."""
        if features.vectors is None:
            return self.linear(self.dropout(features.pooled, drop_key))
        return self.linear(self.dropout(features.vectors, drop_key)).amax(dim=1)

    def losses(
        self,
        features: Features,
        targets: Tensor,
        criterion: Callable[[Tensor, Tensor], Tensor],
        *,
        drop_key: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return {"loss"} for targets [B, C]."""
        return {"loss": criterion(self(features, drop_key), targets)}


CLASSIFIERS = {"linear": LinearClassifier, "map": MAPClassifier, "class_tokens": ClassTokensClassifier}
