"""The table of classifiers: features in, logits out, and what a classifier learns from.

A row is a module made by (encoder, classes, **options): it reads widths from the encoder and does not keep it. It has `classes`; `layers`,
the blocks or stages whose output it wants as Features.layers (() for none); forward(features) -> logits [B, C], which is what
evaluations see; and losses(features, targets [B, C], criterion, drop_key=int64 [B]) -> dict with "loss", where criterion(logits, targets) is
a scalar, a mean over images, and the key makes a dropout a function of the image. Rows of the features may be several views of each image, view-major; the criterion knows.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.nn.dropout import KeyedDropout
from maskwise.nn.map_classifier import MAPClassifier
from maskwise.nn.tokens import Features


class LinearClassifier(nn.Module):
    """One linear layer on the pooled vector: Features -> logits [B, C].

    Where the pooling gives k vectors [B, k, D] (its reduce is max_logit) the layer is shared and each class takes the largest of its k
    logits (SimPool paper, section 4). `dropout` is the share of the input's entries that is dropped in training.
    """

    layers: tuple[int, ...] = ()

    def __init__(self, encoder: nn.Module, classes: int, *, dropout: float = 0.0):
        super().__init__()
        if classes < 1:
            raise UserError(f"classifier.classes={classes} leaves nothing to tell apart: choose 1 or more")
        if not 0 <= dropout < 1:
            raise UserError(f"classifier.dropout={dropout} is not a rate: choose one from 0 to below 1")
        self.classes = classes
        self.dropout = KeyedDropout(dropout)
        self.linear = nn.Linear(encoder.dim, classes)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Features, drop_key: Tensor | None = None) -> Tensor:
        """Features -> logits [B, C]."""
        if features.vectors is None:
            return self.linear(self.dropout(features.pooled, drop_key))
        return self.linear(self.dropout(features.vectors, drop_key)).amax(dim=1)

    def losses(
        self, features: Features, targets: Tensor, criterion: Callable[[Tensor, Tensor], Tensor], *, drop_key: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Features, targets [B, C] -> {"loss"}."""
        return {"loss": criterion(self(features, drop_key), targets)}


CLASSIFIERS = {"linear": LinearClassifier, "map": MAPClassifier}
