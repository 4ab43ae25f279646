"""Several class tokens of a Vision Transformer as a classifier."""

import pytest
import torch
import torch.nn.functional as F

from maskwise.errors import UserError
from maskwise.functional.classification import criterion, smooth_labels
from maskwise.functional.map_losses import map_loss
from maskwise.nn import CLASSIFIERS, POOLINGS, Backbone, Encoder
from maskwise.nn.multi_token.class_tokens import ClassTokensClassifier

SIZE = {"image_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 3}


def encoder(pooling="cls", norm="before", **options):
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", **SIZE, **options)
    return Encoder(backbone, POOLINGS[pooling](12), norm=norm).double()


def images(n=3):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(model, **options):
    torch.manual_seed(2)
    return ClassTokensClassifier(model, 5, **options).double()


@pytest.mark.parametrize("head", ["joint", "split"])
def test_logits_are_those_of_the_normalized_prefix(head):
    model = encoder(reg_tokens=3).eval()
    made = built(model, groups=2, head=head).eval()
    assert CLASSIFIERS["class_tokens"] is ClassTokensClassifier and made.tokens == 4
    features = model(images(), attention=False, layers=made.layers)
    tokens = F.layer_norm(model.backbone(images()).prefix, (12,), model.norm.weight, model.norm.bias, model.norm.eps)
    torch.testing.assert_close(torch.cat(made.token_groups(features), dim=1), tokens)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for group, pair in zip(made.heads, (tokens[:, :2], tokens[:, 2:])):
        if head == "joint":
            flat = F.layer_norm(pair.flatten(1), (24,))
            expected += flat @ group.head.weight.T + group.head.bias
        else:
            for i in range(2):
                expected += F.layer_norm(pair[:, i], (12,)) @ group.heads[i].weight.T + group.heads[i].bias
    torch.testing.assert_close(made(features), expected / 2)
    alone = made.token_logits(features)
    biases = sum(group.head.bias for group in made.heads) if head == "joint" else 0
    assert alone.shape == (3, 4, 5)
    torch.testing.assert_close(made(features), (alone.sum(1) + biases) / 2)


def test_the_registers_take_part_in_every_block():
    """A changed register changes the class token's output, which a token added behind the last block cannot."""
    model = encoder(reg_tokens=1).eval()
    before = model.backbone(images()).prefix[:, 0].clone()
    with torch.no_grad():
        model.backbone.reg_token.add_(torch.randn(12, dtype=torch.float64))
    assert (model.backbone(images()).prefix[:, 0] - before).abs().max() > 1e-6


def test_losses_and_gradients():
    model = encoder(pooling="simpool", norm="after", class_token=True, reg_tokens=3)
    made = built(model, groups=2, inter=-0.3)
    features = model(images(), attention=False, layers=made.layers)
    targets = smooth_labels(torch.tensor([0, 4, 2]), 5, 0.1).double()
    losses = made.losses(features, targets, criterion())
    expected = map_loss(made.group_logits(features), None, targets, criterion(), inter=-0.3)
    assert set(losses) == {"loss", "label", "inter"}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    torch.testing.assert_close(losses["loss"], losses["label"] - 0.3 * losses["inter"])
    losses["loss"].backward()
    for part in (model, made):
        for name, parameter in part.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None), name


def test_dropout_differs_from_group_to_group_and_follows_the_key():
    model = encoder(reg_tokens=3)
    made = built(model, groups=2, token_dropout=0.5).train()
    features = model(images(), attention=False, layers=made.layers)
    key = torch.tensor([7, 8, 9])
    first, second = (tokens == 0 for tokens in made.token_groups(features, key))
    assert first.double().mean().item() == pytest.approx(0.5, abs=0.2) and not torch.equal(first, second)
    torch.testing.assert_close(made.group_logits(features, key), made.group_logits(features, key))
    turned = model(images().flip(0), attention=False, layers=made.layers)
    torch.testing.assert_close(made.group_logits(turned, key.flip(0)).flip(0), made.group_logits(features, key))


def test_wrong_arguments():
    for model, options, words in (
        (encoder(pooling="simpool", class_token=False), {}, "this network has none"),
        (encoder(reg_tokens=3), {"groups": 3}, "groups=3 does not divide the 4 class tokens"),
        (encoder(reg_tokens=3), {"head": "both"}, "choose joint or split"),
    ):
        with pytest.raises(UserError, match=words):
            ClassTokensClassifier(model, 5, **options)
