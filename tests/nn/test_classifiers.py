"""Contract of every row of CLASSIFIERS, and the linear classifier against matrix products."""

from types import SimpleNamespace

import pytest
import torch

from maskwise.errors import UserError
from maskwise.functional.classification import criterion, smooth_labels
from maskwise.nn import CLASSIFIERS, Backbone, Encoder, LinearClassifier, SimPool


def features(rows=3):
    encoder = Encoder(
        Backbone(
            "vit_tiny_patch16_224", image_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=3, class_token=True
        ),
        SimPool(12),
        norm="before",
    )
    return encoder, encoder.eval()


def encoder_of_width(dim=4):
    return SimpleNamespace(dim=dim)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_row_gives_logits_and_a_loss_with_gradients(name):
    torch.manual_seed(0)
    encoder, _ = features()
    head = CLASSIFIERS[name](encoder, 5)
    inputs = encoder(torch.randn(3, 3, 16, 16), attention=False, layers=head.layers)
    assert head.eval()(inputs).shape == (3, 5)
    losses = head.train().losses(inputs, smooth_labels(torch.tensor([0, 4, 2]), 5, 0.1), criterion())
    losses["loss"].backward()
    assert losses["loss"].ndim == 0 and all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_linear_by_hand():
    head = LinearClassifier(encoder_of_width(), 3)
    x = torch.randn(2, 4)
    assert torch.allclose(head(SimpleNamespace(pooled=x, vectors=None)), x @ head.linear.weight.T)
    assert head.linear.weight.std() < 0.05 and not head.linear.bias.any()


def test_k_vectors_take_the_largest_logit_of_each_class():
    head = LinearClassifier(encoder_of_width(), 3)
    vectors = torch.randn(2, 5, 4)
    expected = torch.stack([(row @ head.linear.weight.T).max(dim=0).values for row in vectors])
    assert torch.allclose(head(SimpleNamespace(pooled=vectors[:, 0], vectors=vectors)), expected)


def test_wrong_arguments():
    with pytest.raises(UserError, match="classifier.classes=0"):
        LinearClassifier(encoder_of_width(), 0)
    with pytest.raises(UserError, match="classifier.dropout=1.0"):
        LinearClassifier(encoder_of_width(), 3, dropout=1.0)
