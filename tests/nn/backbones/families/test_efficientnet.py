"""EfficientNet and MobileNet V1 and V2 backbones: timm parity, stages, drop path, counts, files, exports."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import maskwise
from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.nn import CLASSIFIERS, POOLINGS, Backbone, Encoder, SimPool, encoder_from_spec
from maskwise.nn.backbones.generic import GenericBackbone
from maskwise.recipe.reading import read_recipe
from support.map_networks import assert_every_parameter_gets_a_gradient, images

FAMILIES = {  # widths of the stages, the stem's first
    "mobilenetv1_100": (32, 64, 128, 256, 512, 1024),
    "mobilenetv2_050": (16, 8, 16, 16, 48, 1280),  # the last one after the head's convolution
    "efficientnet_b0": (32, 16, 24, 40, 112, 1280),
    "mixnet_s": (16, 16, 24, 40, 120, 1536),
    "efficientnet_es": (32, 24, 32, 48, 144, 1280),
    "tf_efficientnetv2_b0": (32, 16, 32, 48, 112, 1280),
}


def tiny(name="mobilenetv2_035", **options):
    torch.manual_seed(0)
    return Backbone(name, **{"image_size": 64, **options})


def perturbed(module):
    """Add noise to all weights and running statistics; returns the module in float64 and eval mode."""
    module.double().eval()
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if "running_var" in name or value.ndim == 1 and name.endswith("weight"):
                value.add_(torch.rand_like(value) * 0.3)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.02)
    return module


SLOW = ("efficientnet_b0", "efficientnet_es", "tf_efficientnetv2_b0")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FAMILIES]
)
def test_stages_equal_timm_at_the_native_and_another_size(name):
    backbone = perturbed(tiny(name))
    model = timm.create_model(name, num_classes=0).double().eval()
    model.load_state_dict(backbone.state_dict())
    for side in (64, 75):
        x = images(side)
        tokens = backbone(x, layers=(0, 1, 2, 3, 4, 5, -1))
        torch.testing.assert_close(tokens.stages[0], model.bn1(model.conv_stem(x)), rtol=1e-11, atol=1e-11)
        last, theirs = model.forward_intermediates(x)
        for stage, intermediate in zip(tokens.stages[1:5], theirs[:4], strict=True):
            torch.testing.assert_close(stage, intermediate, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(tokens.stages[5], last, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(last, model.forward_features(x), rtol=1e-10, atol=1e-10)
        assert tokens.grid == backbone.grid_for((side, side)) == tuple(last.shape[-2:]) and backbone.patch_size == (
            32,
            32,
        )
        assert tuple(stage.shape[1] for stage in tokens.stages[:6]) == backbone.stage_dims == FAMILIES[name]
        assert torch.equal(tokens.patches, tokens.stages[6].flatten(2).transpose(1, 2)) and tokens.prefix.shape == (
            2,
            0,
            backbone.dim,
        )
    assert backbone(images(64, width=96)).grid == (2, 3)
    torch.testing.assert_close(backbone(x[1:]).patches[0], tokens.patches[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options, side, grid", [({"output_stride": 16}, 64, 4), ({"aa_layer": "blur"}, 75, 3), ({"aa_layer": "avg"}, 64, 2)]
)
def test_other_strides(options, side, grid):
    backbone = tiny(**options).eval().double()
    x = images(side, dtype=torch.float64)
    model = timm.create_model("mobilenetv2_035", num_classes=0, **options).eval().double()
    model.load_state_dict(backbone.state_dict())
    tokens = backbone(x)
    assert tokens.grid == (grid, grid) == backbone.grid_for((side, side))
    torch.testing.assert_close(tokens.patches.transpose(1, 2).unflatten(2, tokens.grid), model.forward_features(x))
    if options.get("aa_layer") == "avg":
        with pytest.raises(UserError, match="75x75 pixels do not divide into patches of 32x32"):
            backbone(images(75, dtype=torch.float64))


def test_parameter_count_of_the_released_map_mobilenet():
    """MAP's release: D=192, four tokens over the last map, no averaged token, linear heads without norm."""
    with torch.device("meta"):
        encoder = Encoder(Backbone("mobilenetv1_100"), POOLINGS["gap"](1024))
        options = {
            "layers": (),
            "dim": 192,
            "groups": 1,
            "gram_groups": 32,
            "talking": True,
            "average": None,
            "mlp_ratio": 1,
            "mlp_groups": 1,
            "norm": False,
        }
        head = CLASSIFIERS["map"](encoder, 1000, **options)
    assert sum(p.numel() for module in (encoder, head) for p in module.parameters()) == 4_879_612


def test_drop_path_is_keyed_by_sample_and_leaves_the_shortcut(monkeypatch):
    backbone, x, keys = perturbed(tiny(drop_path=0.5)), images(count=6), keyed_random.make_key(1, torch.arange(6))
    backbone.drop_path.train()  # batch norms stay in eval mode: their statistics would be those of the batch
    whole = backbone(x, drop_key=keys).patches
    parts = torch.cat([backbone(x[:2], drop_key=keys[:2]).patches, backbone(x[2:], drop_key=keys[2:]).patches])
    torch.testing.assert_close(whole, parts, rtol=1e-11, atol=1e-11)
    assert (whole != backbone(x, drop_key=keys + 1).patches).flatten(1).any(1).sum() >= 4
    assert backbone.drop_path.rates[-1] == 0.5
    factors = torch.rand(backbone.depth, 2, 6, 1, 1, dtype=torch.float64)
    monkeypatch.setattr(backbone.drop_path, "forward", lambda batch, like, key=None: factors)
    expected = backbone.bn1(backbone.conv_stem(x))
    for block, scale in zip(backbone.family.blocks(backbone), factors, strict=True):
        branch = block(expected) - expected if block.has_skip else block(expected)
        expected = expected + scale[0][:, :, :, None] * branch if block.has_skip else branch
    torch.testing.assert_close(
        backbone(x, layers=(-1,)).stages[0], backbone.bn2(backbone.conv_head(expected)), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv2_035"])
@pytest.mark.parametrize(
    "classifier, more",
    [
        ("linear", {}),
        ("map", {"dim": 16, "tokens": 2, "heads": 2, "layers": ()}),
        ("map", {"dim": 16, "tokens": 2, "heads": 2}),
    ],
)
def test_every_parameter_gets_a_gradient(name, classifier, more):
    backbone = tiny(name, drop_path=0.1)
    encoder = Encoder(backbone, POOLINGS["gap"](backbone.dim)).double().train()
    assert_every_parameter_gets_a_gradient(encoder, classifier, **more)


@pytest.mark.parametrize("pooling", ["simpool", "gap"])
def test_encoder_and_its_spec(pooling):
    backbone = tiny(drop_path=0.1)
    encoder = perturbed(Encoder(backbone, POOLINGS[pooling](1280)))
    assert isinstance(encoder.norm, nn.Identity)
    features, raw = encoder(images(96), layers=(1, -1)), backbone(images(96))
    assert torch.equal(features.pooled, encoder.pooling(raw).vector) and features.layers[1].shape == (2, 1280, 3, 3)
    rebuilt = encoder_from_spec(encoder.spec()).double().eval()
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt(images(96)).pooled, features.pooled) and rebuilt.spec() == encoder.spec()


@pytest.mark.slow
def test_a_network_of_conditional_convolutions_runs_whole():
    with torch.device("meta"):
        assert isinstance(Backbone("tf_efficientnet_cc_b0_4e"), GenericBackbone)


def test_wrong_arguments_are_refused_in_one_line():
    for name, options, words in (
        ("mobilenetv2_035", {"image_size": 24}, "24x24 pixels are smaller than the stride 32 of mobilenetv2_035"),
        ("mobilenetv2_035", {"mask_token": True}, "has no patch tokens to mask"),
        (
            "mobilenetv2_035",
            {"stem_size": 8},
            "backbone.stem_size cannot be set: it is part of the name mobilenetv2_035",
        ),
        ("mobilenetv2_035", {"drop_rate": 0.1}, "only drop_path is keyed by sample"),
        ("mobilenetv2_035", {"class_token": True}, "mobilenetv2_035 has no class token"),
    ):
        with pytest.raises(UserError) as caught:
            tiny(name, **options)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_pretrained_weights_from_a_file(tmp_path):
    donor = timm.create_model("mobilenetv2_035").eval()
    save_file(donor.state_dict(), tmp_path / "timm.safetensors")
    backbone, x = tiny(weights=tmp_path / "timm.safetensors").eval(), images(dtype=torch.float32)
    torch.testing.assert_close(backbone(x, layers=(-1,)).stages[0], donor.forward_features(x))
    with pytest.raises(UserError, match="does not fit this backbone"):
        tiny("mobilenetv2_050", weights=tmp_path / "timm.safetensors")


def test_two_steps_of_dino(tmp_path):
    recipe = read_recipe(
        "debug/tiny",
        "backbone=mobilenetv2_035",
        "method=dino",
        "masking=none",
        "pooling=simpool",
        "head.norm=batch",
        "crops.global_size=64",
        "crops.local_size=32",
        "crops.local_number=1",
        "data.count=4",
        "train.epochs=2",
        "train.batch_size=4",
        "optimizer.warmup_epochs=0",
        "evaluate.pictures_every=0",
        "evaluate.knn_every=0",
        "speed.workers=0",
    )
    assert maskwise.train(recipe, out=tmp_path / "run", quiet=True)["status"] == "complete"
    assert maskwise.load(tmp_path / "run").eval()(images(dtype=torch.float32)).pooled.shape == (2, 1280)


@pytest.mark.slow
def test_export_loads_in_every_library(tmp_path):
    """Export verifies the folder in timm and transformers; loading it is bit-exact."""
    encoder = perturbed(Encoder(tiny(), SimPool(1280, gamma=2.0))).float()
    maskwise.export(encoder, tmp_path / "out", say=None)
    loaded, x = maskwise.load(tmp_path / "out"), images(dtype=torch.float32)
    assert loaded.spec() == encoder.spec() and torch.equal(loaded(x).pooled, encoder(x).pooled)
