"""MaxViT backbones: timm parity, windows of other sizes, drop path of five branches, counts, files, exports."""

import pytest
import timm
import torch
from torch import nn

import maskwise
from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.nn import CLASSIFIERS, POOLINGS, Backbone, Encoder, SimPool, encoder_from_spec
from maskwise.nn.backbones import timm_registry
from maskwise.nn.backbones.families import maxvit
from maskwise.nn.backbones.generic import GenericBackbone
from maskwise.recipe.reading import read_recipe
from support.map_networks import assert_every_parameter_gets_a_gradient, images, perturbed

SMALL = {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64), "stem_width": 8}
FAMILIES = {
    "tensorflow": ("maxvit_tiny_tf_224", SMALL),
    "timm": ("maxvit_tiny_rw_224", SMALL),
    "bias from an MLP": ("maxvit_rmlp_pico_rw_256", SMALL),
    "layer scale": ("maxvit_tiny_tf_224", {**SMALL, "transformer_init_values": 0.5}),
}


def tiny(family="tensorflow", **options):
    name, arguments = FAMILIES[family]
    torch.manual_seed(0)
    return Backbone(name, **{"image_size": 64, **arguments, **options})


def twin(backbone, family, side=64, **changed):
    name, arguments = FAMILIES[family]
    model = timm.create_model(name, num_classes=0, img_size=side, head_hidden_size=0, **arguments).double().eval()
    model.load_state_dict({**backbone.state_dict(), **changed})
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sides", [(64, 64), (128, 64)])
def test_stages_equal_timm_at_the_native_and_another_size(family, sides):
    backbone = perturbed(tiny(family), by=0.1)
    model, x = twin(backbone, family), images(*sides[:1], width=sides[1])
    tokens = backbone(x, layers=(0, 1, 2, 3, 4, -1))
    for stage, theirs in zip(tokens.stages, model.forward_intermediates(x, intermediates_only=True)):
        torch.testing.assert_close(stage, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        backbone.norm(tokens.patches).transpose(1, 2).unflatten(2, tokens.grid), model.forward_features(x)
    )
    assert (
        tuple(stage.shape[1] for stage in tokens.stages[:5]) == backbone.stage_dims
        and backbone.patch_size == (32, 32)
        and backbone.depth == 4
    )
    assert tokens.grid == backbone.grid_for(sides) == (sides[0] // 32, 2) and tokens.prefix.shape == (2, 0, 64)
    assert (
        torch.equal(tokens.patches, tokens.stages[5].flatten(2).transpose(1, 2))
        and tokens.stages[5] is tokens.stages[4]
    )
    torch.testing.assert_close(backbone(x[1:]).patches[0], tokens.patches[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["tensorflow", "timm", "bias from an MLP"])
def test_smaller_images_use_the_middle_of_the_bias_table(family):
    """timm's model for that size with tables cut by hand; an MLP gives each offset the same bias there."""
    backbone, cut = perturbed(tiny(family, image_size=96), by=0.1), {}
    for key, value in backbone.state_dict().items():
        if key.endswith("bias_table"):
            plane = value if value.ndim == 3 else value.T.unflatten(1, (5, 5))
            middle = plane[:, 1:4, 1:4]
            cut[key] = middle if value.ndim == 3 else middle.flatten(1).T
    assert (family == "bias from an MLP") == (not cut)
    model, x = twin(backbone, family, **cut), images(64)
    torch.testing.assert_close(
        backbone(x, layers=(-1,)).stages[0],
        model.forward_intermediates(x, intermediates_only=True)[-1],
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("block", [True, False], ids=["windows", "grid"])
def test_attention_equals_an_explicit_loop(block):
    backbone = perturbed(tiny(), by=0.1)
    first = backbone.family.blocks(backbone)[0]
    part, x = first.attn_block if block else first.attn_grid, torch.randn(1, 4, 6, 32, dtype=torch.float64)
    attn = part.attn
    q, k, v = (
        attn.qkv(x[0]).unflatten(-1, (3, 32)).unbind(2) if attn.head_first else attn.qkv(x[0]).chunk(3, dim=-1)
    )  # one head
    table, expected = attn.rel_pos.relative_position_bias_table[0], torch.zeros(4, 6, 32, dtype=torch.float64)

    def locate(i, j):
        """Return the window of a position, and its coordinates inside."""
        return ((i // 2, j // 2), (i % 2, j % 2)) if block else ((i % 2, j % 3), (i // 2, j // 3))

    for i in range(4):
        for j in range(6):
            logits, values = [], []
            for a in range(4):
                for b in range(6):
                    (window_q, at_q), (window_k, at_k) = locate(i, j), locate(a, b)
                    if window_q == window_k:
                        bias = table[at_k[0] - at_q[0] + 1, at_k[1] - at_q[1] + 1]
                        logits.append(q[i, j] @ k[a, b] * attn.scale + bias)
                        values.append(v[a, b])
            expected[i, j] = torch.stack(logits).softmax(0) @ torch.stack(values)
    torch.testing.assert_close(maxvit.attend(part, x, (2, 2), {})[0], attn.proj(expected))


def test_sizes_that_do_not_divide_are_refused_in_one_line():
    backbone = tiny(image_size=96)
    for side, words in (
        (80, "do not divide into patches of 32x32"),
        (
            128,
            "128x128 pixels do not divide into the windows of maxvit_tiny_tf_224, 96x96 pixels each: "
            "use multiples of these, smaller multiples of 32, or set backbone.image_size",
        ),
        (31, "smaller than the stride 32"),
    ):
        with pytest.raises(UserError) as caught:
            backbone(images(side, dtype=torch.float32))
        assert words in str(caught.value) and "\n" not in str(caught.value)
    for options, words in (
        ({"mask_token": True}, "has no patch tokens to mask"),
        ({"position": "size"}, "has no position table"),
        ({"patch_size": 4}, "has no patch size"),
    ):
        with pytest.raises(UserError, match=words):
            tiny(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words",
    [
        ("coatnet_nano_rw_224", "MbConvBlock"),
        ("maxvit_tiny_pm_256", "ParallelMaxxVitBlock"),
        ("maxxvit_rmlp_nano_rw_256", "made of ConvNeXtBlock"),
    ],
)
def test_other_models_of_the_class_run_whole(name, words):
    assert timm_registry.unsupported_reason(timm_registry.build_shallow(name)) == f"its blocks are {words}"
    with torch.device("meta"):
        assert isinstance(Backbone(name), GenericBackbone)


def test_parameter_count_of_the_released_map_maxvit():
    """MAP's release: TensorFlow's MaxViT-T without norm and hidden layer of its head, stem and four stages fused."""
    with torch.device("meta"):
        encoder = Encoder(Backbone("maxvit_tiny_tf_224"), POOLINGS["gap"](512))
        head = CLASSIFIERS["map"](encoder, 1000, groups=4, tokens=2, gram_groups=24, embed=384, heads=12)
        whole = timm.create_model("maxvit_tiny_tf_224")
    count = [sum(p.numel() for p in module.parameters()) for module in (encoder.backbone, head, encoder.norm, whole)]
    assert count[0] + count[1] == 49_958_408 and head.layers == (0, 1, 2, 3, 4)
    assert count[3] - count[0] - count[2] == 512 * 512 + 512 + 512 * 1000 + 1000  # timm's hidden layer and classifier


def test_drop_path_is_keyed_by_sample_and_by_five_branches(monkeypatch):
    backbone, x, keys = (
        perturbed(tiny(drop_path=0.5), by=0.1),
        images(count=6),
        keyed_random.make_key(1, torch.arange(6)),
    )
    backbone.drop_path.train()  # batch norms stay in eval mode: their statistics would be those of the batch
    whole = backbone(x, drop_key=keys).patches
    parts = torch.cat([backbone(x[:2], drop_key=keys[:2]).patches, backbone(x[2:], drop_key=keys[2:]).patches])
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-10)
    assert (whole != backbone(x, drop_key=keys + 1).patches).flatten(1).any(1).sum() >= 4
    drawn = backbone.drop_path(6, x, keys)
    assert drawn.shape == (4, 5, 6, 1, 1) and len({tuple(row) for row in drawn[-1].flatten(1).tolist()}) > 1
    theirs = timm.create_model("maxvit_tiny_tf_224", drop_path_rate=0.5, **SMALL)
    assert backbone.drop_path.rates == pytest.approx(
        [getattr(block.conv.drop_path, "drop_prob", 0.0) for block in backbone.family.blocks(theirs)]
    )
    factors = torch.rand(4, 5, 6, 1, 1, dtype=torch.float64)
    monkeypatch.setattr(backbone.drop_path, "forward", lambda batch, like, key=None: factors)
    expected = backbone.stem(x)
    for block, rows in zip(backbone.family.blocks(backbone), factors.unsqueeze(-1), strict=True):
        shortcut = block.conv.shortcut(expected)
        expected = (shortcut + rows[0] * (block.conv(expected) - shortcut)).permute(0, 2, 3, 1)
        for part, branch in ((block.attn_block, 1), (block.attn_grid, 3)):
            expected = expected + rows[branch] * part._partition_attn(part.norm1(expected))
            expected = expected + rows[branch + 1] * part.mlp(part.norm2(expected))
        expected = expected.permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone(x, layers=(-1,)).stages[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["tensorflow", "bias from an MLP"])
@pytest.mark.parametrize("classifier, more", [("linear", {}), ("map", {"dim": 16, "tokens": 2, "heads": 2})])
def test_every_parameter_gets_a_gradient(family, classifier, more):
    encoder = Encoder(tiny(family, drop_path=0.1), POOLINGS["gap"](64), norm="before").double().train()
    assert_every_parameter_gets_a_gradient(encoder, classifier, **more)


@pytest.mark.parametrize("pooling", ["simpool", "gap"])
def test_encoder_and_its_spec(pooling):
    encoder = perturbed(Encoder(tiny(drop_path=0.1), POOLINGS[pooling](64)), by=0.1)
    features, raw = encoder(images(128), layers=(1, -1)), encoder.backbone(images(128))
    assert isinstance(encoder.norm, nn.LayerNorm) and encoder.norm.eps == 1e-5 and features.grid == (4, 4)
    torch.testing.assert_close(features.pooled, encoder.norm(encoder.pooling(raw).vector))
    rebuilt = encoder_from_spec(encoder.spec()).double().eval()
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt(images(128)).pooled, features.pooled) and rebuilt.spec() == encoder.spec()


@pytest.mark.parametrize("family", ["tensorflow", "timm"])
def test_pretrained_weights_from_a_file(family, tmp_path):
    name, arguments = FAMILIES[family]
    donor = timm.create_model(name, img_size=64, **arguments).eval()
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "timm.pth")
    backbone, x = tiny(family, weights=tmp_path / "timm.pth").eval(), images(dtype=torch.float32)
    torch.testing.assert_close(
        backbone(x, layers=(-1,)).stages[0], donor.forward_intermediates(x, intermediates_only=True)[-1]
    )
    norm = getattr(donor.head, "norm", donor.norm)
    assert torch.equal(backbone.norm.weight, norm.weight) and backbone.norm.eps == norm.eps
    assert tiny(family, weights=tmp_path / "timm.pth", image_size=96)(images(96, dtype=torch.float32)).grid == (
        3,
        3,
    )  # with resampled tables
    with pytest.raises(UserError, match="does not fit this backbone|does not know this layout"):
        tiny(family, weights=tmp_path / "timm.pth", depths=(1, 2, 1, 1))


def test_two_steps_of_dino(tmp_path):
    recipe = read_recipe(
        "debug/tiny",
        "backbone=test_maxvit",
        "method=dino",
        "masking=none",
        "pooling=simpool",
        "backbone.image_size=64",
        "crops.global_size=64",
        "crops.local_size=32",
        "data.count=4",
        "crops.local_number=1",
        "train.epochs=2",
        "train.batch_size=4",
        "optimizer.warmup_epochs=0",
        "evaluate.pictures_every=0",
        "evaluate.knn_every=0",
        "speed.workers=0",
    )
    assert maskwise.train(recipe, out=tmp_path / "run", quiet=True)["status"] == "complete"
    assert maskwise.load(tmp_path / "run").eval()(images(dtype=torch.float32)).pooled.shape == (2, 128)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tensorflow", "timm"])
def test_export_loads_in_every_library(family, tmp_path):
    """Export verifies the folder in timm and transformers; loading it is bit-exact."""
    encoder = perturbed(Encoder(tiny(family), SimPool(64, gamma=2.0)), by=0.1).float()
    maskwise.export(encoder, tmp_path / "out", say=None)
    loaded, x = maskwise.load(tmp_path / "out"), images(dtype=torch.float32)
    assert loaded.spec() == encoder.spec() and torch.equal(loaded(x).pooled, encoder(x).pooled)
