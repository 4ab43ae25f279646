"""The table of classifiers: features in, logits out, and what a classifier learns from.

A row is a module made by (encoder, classes, **options): it reads widths from the encoder and does not keep it. It has `layers`,
the blocks or stages whose output it wants as Features.layers (() for none); forward(features) -> logits [B, C], which is what
evaluations see; and losses(features, targets [B, C], criterion) -> dict with "loss", where criterion(logits, targets) is a
scalar, a mean over images. Rows of the features may be several views of each image, view-major; the criterion knows.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.nn.map_classifier import MAPClassifier
from maskwise.nn.tokens import Features


class LinearClassifier(nn.Module):
    """One linear layer on the pooled vector: Features -> logits [B, C].

    Where the pooling gives k vectors [B, k, D] and says reduce="max_logit" the layer is shared and each class takes the largest of its k
    logits (SimPool paper, section 4). `dropout` is the share of the input's entries that is dropped in training.
    """

    layers: tuple[int, ...] = ()

    def __init__(self, encoder: nn.Module, classes: int, *, dropout: float = 0.0):
        super().__init__()
        if classes < 1:
            raise UserError(f"classifier.classes={classes} leaves nothing to tell apart: choose 1 or more")
        if not 0 <= dropout < 1:
            raise UserError(f"classifier.dropout={dropout} is not a rate: choose one from 0 to below 1")
        self.max_logit = getattr(encoder.pooling, "reduce", None) == "max_logit"
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Features) -> Tensor:
        """Features -> logits [B, C]."""
        vectors = getattr(features, "vectors", None) if self.max_logit else None
        if vectors is None:
            return self.linear(self.dropout(features.pooled))
        return self.linear(self.dropout(vectors)).amax(dim=1)

    def losses(self, features: Features, targets: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        """Features, targets [B, C] -> {"loss"}."""
        return {"loss": criterion(self(features), targets)}


CLASSIFIERS = {"linear": LinearClassifier, "map": MAPClassifier}
