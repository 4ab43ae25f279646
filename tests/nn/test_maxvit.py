"""MaxViT as a backbone: timm's own forward, windows of other sizes, drop path of five branches, published counts, files, exports."""

import pytest
import torch
from nn.map_networks import assert_every_parameter_gets_a_gradient, images, stirred
from torch import nn

import maskwise
from maskwise.functional import draws
from maskwise.functional.errors import UserError
from maskwise.nn import CLASSIFIERS, POOLINGS, Backbone, Encoder, SimPool, encoder_from_spec, maxvit
from maskwise.recipe import read_recipe

import timm  # after maskwise.nn, which readies it

SMALL = {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64), "stem_width": 8}
FAMILIES = {"tensorflow's": ("maxvit_tiny_tf_224", SMALL), "timm's": ("maxvit_tiny_rw_224", SMALL), "table made by an MLP": ("maxvit_rmlp_pico_rw_256", SMALL),
            "layer scale": ("maxvit_tiny_tf_224", {**SMALL, "transformer_init_values": 0.5})}  # fmt: skip


def tiny(family="tensorflow's", **options):
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
def test_every_stage_is_timms_at_the_native_and_another_size(family, sides):
    backbone = stirred(tiny(family), by=0.1)
    model, x = twin(backbone, family), images(*sides[:1], width=sides[1])
    tokens = backbone(x, layers=(0, 1, 2, 3, 4, -1))
    for mine, theirs in zip(tokens.stages, model.forward_intermediates(x, intermediates_only=True)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(backbone.norm(tokens.patches).transpose(1, 2).unflatten(2, tokens.grid), model.forward_features(x))
    assert tuple(stage.shape[1] for stage in tokens.stages[:5]) == backbone.stage_dims and backbone.patch_size == (32, 32) and backbone.depth == 4
    assert tokens.grid == backbone.grid_for(sides) == (sides[0] // 32, 2) and tokens.prefix.shape == (2, 0, 64)
    assert torch.equal(tokens.patches, tokens.stages[5].flatten(2).transpose(1, 2)) and tokens.stages[5] is tokens.stages[4]
    torch.testing.assert_close(backbone(x[1:]).patches[0], tokens.patches[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["tensorflow's", "timm's", "table made by an MLP"])
def test_smaller_images_pass_with_the_middle_of_the_tables(family):
    """timm's model for that size, its tables cut by hand; what an MLP makes of an offset is the same there."""
    backbone, cut = stirred(tiny(family, image_size=96), by=0.1), {}
    for key, value in backbone.state_dict().items():
        if key.endswith("bias_table"):
            plane = value if value.ndim == 3 else value.T.unflatten(1, (5, 5))
            middle = plane[:, 1:4, 1:4]
            cut[key] = middle if value.ndim == 3 else middle.flatten(1).T
    assert (family == "table made by an MLP") == (not cut)
    model, x = twin(backbone, family, **cut), images(64)
    torch.testing.assert_close(backbone(x, layers=(-1,)).stages[0], model.forward_intermediates(x, intermediates_only=True)[-1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [True, False], ids=["windows", "grid"])
def test_attention_is_that_of_an_explicit_loop(block):
    backbone = stirred(tiny(), by=0.1)
    inside = maxvit.blocks(backbone)[0]
    piece, x = inside.attn_block if block else inside.attn_grid, torch.randn(1, 4, 6, 32, dtype=torch.float64)
    attn = piece.attn
    q, k, v = attn.qkv(x[0]).unflatten(-1, (3, 32)).unbind(2) if attn.head_first else attn.qkv(x[0]).chunk(3, dim=-1)  # one head
    table, expected = attn.rel_pos.relative_position_bias_table[0], torch.zeros(4, 6, 32, dtype=torch.float64)

    def seat(i, j):
        """Which places see one another, and where in their window."""
        return ((i // 2, j // 2), (i % 2, j % 2)) if block else ((i % 2, j % 3), (i // 2, j // 3))

    for i in range(4):
        for j in range(6):
            logits, values = [], []
            for a in range(4):
                for b in range(6):
                    (home, mine), (there, at) = seat(i, j), seat(a, b)
                    if home == there:
                        logits.append(q[i, j] @ k[a, b] * attn.scale + table[at[0] - mine[0] + 1, at[1] - mine[1] + 1])
                        values.append(v[a, b])
            expected[i, j] = torch.stack(logits).softmax(0) @ torch.stack(values)
    torch.testing.assert_close(maxvit.attend(piece, x, (2, 2), {})[0], attn.proj(expected))


def test_sizes_that_do_not_divide_end_in_one_line():
    backbone = tiny(image_size=96)
    for side, words in ((80, "do not divide into patches of 32x32"), (128, "128x128 pixels do not divide into the windows of maxvit_tiny_tf_224, which are those of 96x96 pixels: "
                        "take multiples of these, or of 32 below them, or set backbone.image_size"), (31, "smaller than the stride 32")):  # fmt: skip
        with pytest.raises(UserError) as caught:
            backbone(images(side, dtype=torch.float32))
        assert words in str(caught.value) and "\n" not in str(caught.value)
    for options, words in (({"mask_token": True}, "has no patch tokens to hide"), ({"position": "size"}, "has no position table"), ({"patch_size": 4}, "has none")):
        with pytest.raises(UserError, match=words):
            tiny(**options)


@pytest.mark.slow
@pytest.mark.parametrize("name, words", [("coatnet_nano_rw_224", "MbConvBlock"), ("maxvit_tiny_pm_256", "ParallelMaxxVitBlock"), ("maxxvit_rmlp_nano_rw_256", "made of ConvNeXtBlock")])
def test_other_networks_of_the_class_are_refused(name, words):
    with pytest.raises(UserError, match=f"^{name} is not supported: its blocks are {words}; backbones are .* the nearest is "):
        Backbone(name)


def test_parameters_of_the_release():
    """pooling.md 3.1: TensorFlow's MaxViT-T without norm and hidden layer of its head, stem and four stages fused."""
    with torch.device("meta"):
        encoder = Encoder(Backbone("maxvit_tiny_tf_224"), POOLINGS["gap"](512))
        head = CLASSIFIERS["map"](encoder, 1000, groups=4, tokens=2, gram_groups=24, embed=384, heads=12)
        whole = timm.create_model("maxvit_tiny_tf_224")
    count = [sum(p.numel() for p in module.parameters()) for module in (encoder.backbone, head, encoder.norm, whole)]
    assert count[0] + count[1] == 49_958_408 and head.layers == (0, 1, 2, 3, 4)
    assert count[3] - count[0] - count[2] == 512 * 512 + 512 + 512 * 1000 + 1000  # timm's hidden layer and classifier


def test_drop_path_belongs_to_the_sample_and_to_each_of_five_branches(monkeypatch):
    backbone, x, keys = stirred(tiny(drop_path=0.5), by=0.1), images(count=6), draws.mix(1, torch.arange(6))
    backbone.drop_path.train()  # batch norm stays as it is: its statistics are those of the batch
    whole = backbone(x, drop_key=keys).patches
    parts = torch.cat([backbone(x[:2], drop_key=keys[:2]).patches, backbone(x[2:], drop_key=keys[2:]).patches])
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-10)
    assert (whole != backbone(x, drop_key=keys + 1).patches).flatten(1).any(1).sum() >= 4
    drawn = backbone.drop_path(6, x, keys)
    assert drawn.shape == (4, 5, 6, 1, 1) and len({tuple(row) for row in drawn[-1].flatten(1).tolist()}) > 1
    theirs = timm.create_model("maxvit_tiny_tf_224", drop_path_rate=0.5, **SMALL)
    assert backbone.drop_path.rates == pytest.approx([getattr(block.conv.drop_path, "drop_prob", 0.0) for block in maxvit.blocks(theirs)])
    factors = torch.rand(4, 5, 6, 1, 1, dtype=torch.float64)
    monkeypatch.setattr(backbone.drop_path, "forward", lambda batch, like, key=None: factors)
    expected = backbone.stem(x)
    for block, rows in zip(maxvit.blocks(backbone), factors.unsqueeze(-1), strict=True):
        shortcut = block.conv.shortcut(expected)
        expected = (shortcut + rows[0] * (block.conv(expected) - shortcut)).permute(0, 2, 3, 1)
        for piece, first in ((block.attn_block, 1), (block.attn_grid, 3)):
            expected = expected + rows[first] * piece._partition_attn(piece.norm1(expected))
            expected = expected + rows[first + 1] * piece.mlp(piece.norm2(expected))
        expected = expected.permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone(x, layers=(-1,)).stages[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["tensorflow's", "table made by an MLP"])
@pytest.mark.parametrize("classifier, more", [("linear", {}), ("map", {"dim": 16, "tokens": 2, "heads": 2})])
def test_every_parameter_gets_a_gradient(family, classifier, more):
    encoder = Encoder(tiny(family, drop_path=0.1), POOLINGS["gap"](64), norm="before").double().train()
    assert_every_parameter_gets_a_gradient(encoder, classifier, **more)


@pytest.mark.parametrize("pooling", ["simpool", "gap"])
def test_an_encoder_and_its_description(pooling):
    encoder = stirred(Encoder(tiny(drop_path=0.1), POOLINGS[pooling](64)), by=0.1)
    features, raw = encoder(images(128), layers=(1, -1)), encoder.backbone(images(128))
    assert isinstance(encoder.norm, nn.LayerNorm) and encoder.norm.eps == 1e-5 and features.grid == (4, 4)
    torch.testing.assert_close(features.pooled, encoder.norm(encoder.pooling(raw).vector))
    again = encoder_from_spec(encoder.spec()).double().eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(images(128)).pooled, features.pooled) and again.spec() == encoder.spec()


@pytest.mark.parametrize("family", ["tensorflow's", "timm's"])
def test_pretrained_weights_from_a_file(family, tmp_path):
    name, arguments = FAMILIES[family]
    donor = timm.create_model(name, img_size=64, **arguments).eval()
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "timm.pth")
    backbone, x = tiny(family, weights=tmp_path / "timm.pth").eval(), images(dtype=torch.float32)
    torch.testing.assert_close(backbone(x, layers=(-1,)).stages[0], donor.forward_intermediates(x, intermediates_only=True)[-1])
    norm = getattr(donor.head, "norm", donor.norm)
    assert torch.equal(backbone.norm.weight, norm.weight) and backbone.norm.eps == norm.eps
    assert tiny(family, weights=tmp_path / "timm.pth", image_size=96)(images(96, dtype=torch.float32)).grid == (3, 3)  # tables resampled
    with pytest.raises(UserError, match="does not fit this backbone|does not know this layout"):
        tiny(family, weights=tmp_path / "timm.pth", depths=(1, 2, 1, 1))


def test_two_steps_of_dino(tmp_path):
    recipe = read_recipe(
        "debug/tiny", "backbone=test_maxvit", "method=dino", "masking=none", "pooling=simpool", "backbone.image_size=64", "crops.global_size=64", "crops.local_size=32",
        "data.count=4", "crops.local_number=1", "train.epochs=2", "train.batch_size=4", "optimizer.warmup_epochs=0", "evaluate.pictures_every=0", "evaluate.knn_every=0", "speed.workers=0",
    )  # fmt: skip
    assert maskwise.train(recipe, out=tmp_path / "run", quiet=True)["status"] == "complete"
    assert maskwise.load(tmp_path / "run").eval()(images(dtype=torch.float32)).pooled.shape == (2, 128)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tensorflow's", "timm's"])
def test_an_export_opens_everywhere(family, tmp_path):
    """The folder is compared in timm and transformers while it is written, and comes back bit for bit."""
    encoder = stirred(Encoder(tiny(family), SimPool(64, gamma=2.0)), by=0.1).float()
    maskwise.export(encoder, tmp_path / "out", say=None)
    back, x = maskwise.load(tmp_path / "out"), images(dtype=torch.float32)
    assert back.spec() == encoder.spec() and torch.equal(back(x).pooled, encoder(x).pooled)
