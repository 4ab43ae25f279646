"""MAP as a classifier of an encoder's features."""

import pytest
import torch

from maskwise.errors import UserError
from maskwise.functional.classification import criterion, smooth_labels
from maskwise.functional.map_losses import map_loss
from maskwise.nn import CLASSIFIERS, POOLINGS, Backbone, Encoder
from maskwise.nn.multi_token.classifier import MAPClassifier

SIZE = {"dim": 8, "tokens": 2, "heads": 2, "gram_groups": 1, "dropout": 0.0}


def encoder(**options):
    torch.manual_seed(0)
    backbone = Backbone(
        "vit_tiny_patch16_224", image_size=16, patch_size=4, embed_dim=12, depth=3, num_heads=3, **options
    )
    return Encoder(backbone, POOLINGS["simpool"](12), norm="before").double()


def images(n=3):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(model, **options):
    torch.manual_seed(2)
    return MAPClassifier(model, 5, **SIZE, **options).double()


def test_a_transformer_is_classified_by_its_final_patches():
    model = encoder()
    head = built(model).eval()
    assert CLASSIFIERS["map"] is MAPClassifier and head.layers == ()
    features = model.eval()(images())
    grid = features.patches.transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(head.stage_maps(features)[0], grid)
    torch.testing.assert_close(head(features), head.head([grid]).tokens.mean(1))


def test_blocks_of_a_transformer_become_maps_without_prefix():
    model = encoder()
    head = built(model, layers=[0, 2]).eval()
    features = model.eval()(images(), layers=head.layers)
    first, last = head.stage_maps(features)
    torch.testing.assert_close(last, features.patches.transpose(1, 2).unflatten(2, (4, 4)))
    torch.testing.assert_close(first[1, :, 2, 3], features.layers[0][1, 1 + 2 * 4 + 3])
    assert head(features).shape == (3, 5) and head.head.fuse.join[0].in_channels == 24


def test_losses_are_the_map_loss_of_the_group_logits():
    model = encoder()
    head = built(model, intra=0.5, inter=-0.3, reduction="batchmean", center="probabilities")
    features = model(images())
    targets = smooth_labels(torch.tensor([0, 4, 2]), 5, 0.1).double()
    state = {key: value.clone() for key, value in head.state_dict().items()}
    losses = head.losses(features, targets, criterion())
    head.load_state_dict(state)
    groups = head.group_logits(features)
    expected = map_loss(
        groups.tokens,
        groups.averaged,
        targets,
        criterion(),
        intra=0.5,
        inter=-0.3,
        reduction="batchmean",
        center="probabilities",
    )
    assert set(losses) == {"loss", "label", "intra", "inter"}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    torch.testing.assert_close(losses["loss"], losses["label"] + 0.5 * losses["intra"] - 0.3 * losses["inter"])


def test_no_trainable_parameter_is_without_gradient():
    model = encoder()
    head = built(model)
    head.losses(model(images()), smooth_labels(torch.tensor([0, 4, 2]), 5), criterion())["loss"].backward()
    for part in (model, head):
        for name, parameter in part.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None), name
    assert not any(parameter.requires_grad for parameter in model.pooling.parameters())


def test_token_logits_sum_to_the_logits():
    model = encoder().eval()
    head = built(model).eval()
    with torch.no_grad():
        features = model(images())
        alone = head.token_logits(features)
        assert alone.shape == (3, 4, 5)
        biases = sum(group.head.bias for group in head.head.heads)
        torch.testing.assert_close(head(features), (alone.sum(1) + biases) / 2)
        head.head.drop_token_heads()
        torch.testing.assert_close(head(features), head.token_logits(features).mean(1))


def test_light_gives_logits_and_cannot_be_trained():
    model = encoder().eval()
    full, light = built(model).eval(), built(model, light=True).eval()
    light.load_state_dict({key: value for key, value in full.state_dict().items() if not key.startswith("head.heads.")})
    features = model(images())
    logits = light(features)
    full.head.drop_token_heads()
    torch.testing.assert_close(logits, full(features))
    with pytest.raises(UserError, match="light=true is for inference"):
        light.train().losses(features, smooth_labels(torch.tensor([0, 4, 2]), 5), criterion())


def test_wrong_arguments():
    for options, words in (
        ({"reduction": "sum"}, "reduction"),
        ({"level": 4, "layers": [0, 1]}, "level=4 of 2"),
        ({"tokens": 5, "gram_width": 3}, "5 tokens do not divide the 6 entries"),
    ):
        with pytest.raises(UserError, match=words):
            MAPClassifier(encoder(), 5, **{**SIZE, **options})


MAPS = {
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 12]},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 12]},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 4,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "window_size": 2,
        "image_size": 64,
    },
}


@pytest.mark.parametrize("name, options", MAPS.items(), ids=str)
def test_all_stages_of_a_feature_map_backbone(name, options):
    torch.manual_seed(0)
    backbone = Backbone(name, **options)
    model = Encoder(backbone, POOLINGS["gap"](backbone.dim)).double()
    head = built(model)
    assert head.layers == (0, 1, 2, 3, 4) and head.head.fuse.dims == tuple(backbone.stage_dims)
    features = model(torch.randn(2, 3, 64, 64, dtype=torch.float64), layers=head.layers)
    fused = head.head.fuse(head.stage_maps(features))
    assert fused.shape[2:] == features.layers[3].shape[2:]
    head.losses(features, smooth_labels(torch.tensor([0, 4]), 5), criterion())["loss"].backward()
    for part in (model, head):
        for key, parameter in part.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None), key
    assert not any(parameter.requires_grad for parameter in model.norm.parameters())
