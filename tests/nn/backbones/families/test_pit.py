"""PiT backbones: timm parity with and without class token, positions, counts, drop path, files, exports."""

import pytest
import timm
import torch
from torch import nn

import maskwise
from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.functional.resample import position_table
from maskwise.nn import CLASSIFIERS, POOLINGS, Backbone, Encoder, SimPool, encoder_from_spec
from maskwise.nn.backbones.feature_maps import FeatureMapBackbone
from maskwise.recipe.reading import read_recipe
from support.map_networks import assert_every_parameter_gets_a_gradient, images, perturbed

TINY = {"base_dims": (8, 8, 8), "depth": (1, 2, 1), "heads": (1, 2, 4)}
WITHOUT = {"class_token": False}


def tiny(**options):
    torch.manual_seed(0)
    return Backbone("pit_s_224", **{"image_size": 64, **TINY, **options})


def twin(backbone, side):
    """Build the timm model with the same weights for images of that size; an absent class token has no rows."""
    model = timm.create_model("pit_s_224", num_classes=0, img_size=side, **TINY).double().eval()
    state = {**model.state_dict(), **backbone.state_dict()}
    table, grid = state["pos_embed"], model.pos_embed.shape[-2:]
    state["pos_embed"] = (
        position_table(table.flatten(2).transpose(1, 2), tuple(table.shape[-2:]), tuple(grid))
        .transpose(1, 2)
        .unflatten(2, grid)
    )
    model.load_state_dict(state)
    if backbone.cls_token is None:
        model.cls_token = nn.Parameter(torch.zeros(1, 0, 8, dtype=torch.float64))
    return model


@pytest.mark.parametrize("options", [{}, WITHOUT], ids=["class token", "without"])
@pytest.mark.parametrize("side, grids", [(64, (7, 4, 2)), (96, (11, 6, 3)), (75, (8, 4, 2)), (32, (3, 2, 1))])
def test_stages_equal_timm_at_the_native_and_other_sizes(options, side, grids):
    backbone, x = perturbed(tiny(**options), by=0.2), images(side)
    tokens = backbone(x, layers=(0, 1, 2, 3, -1))
    model = twin(backbone, side)
    torch.testing.assert_close(tokens.stages[0], model.patch_embed(x) + model.pos_embed, rtol=1e-11, atol=1e-11)
    for stage, theirs in zip(tokens.stages[1:4], model.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(stage, theirs, rtol=1e-11, atol=1e-11)
    assert [stage.shape[-1] for stage in tokens.stages[1:4]] == list(grids) and tokens.grid == (
        grids[-1],
    ) * 2 == backbone.grid_for((side, side))
    assert tuple(stage.shape[1] for stage in tokens.stages[:4]) == backbone.stage_dims == (8, 8, 16, 32)
    assert (
        torch.equal(tokens.patches, tokens.stages[4].flatten(2).transpose(1, 2))
        and tokens.prefix.shape == (2, 0, 32)
        and tokens.keys is None
    )
    wide = backbone(images(side, width=96))
    assert wide.grid == backbone.grid_for((side, 96)) and wide.patches.shape[1] == wide.grid[0] * wide.grid[1]
    torch.testing.assert_close(backbone(x[1:]).patches[0], tokens.patches[1], rtol=1e-12, atol=1e-12)


def test_the_class_token_stays_unless_removed():
    """timm's last norm acts on the class token, and here too."""
    backbone = perturbed(tiny(), by=0.2)
    model = twin(backbone, 64)
    assert backbone.cls_token.shape == (1, 1, 8) and torch.equal(model.norm.weight, backbone.norm.weight)
    bare = tiny(**WITHOUT)
    assert bare.cls_token is None and set(backbone.state_dict()) - set(bare.state_dict()) == {
        "cls_token",
        *(f"transformers.{i}.pool.fc.{part}" for i in (1, 2) for part in ("weight", "bias")),
    }
    with pytest.raises(
        UserError, match="needs a class token and pit_s_224 keeps its own internal: choose pooling simpool"
    ):
        Encoder(backbone, POOLINGS["cls"](32))
    with pytest.raises(UserError, match="needs a class token and pit_s_224 has none: choose pooling simpool"):
        Encoder(bare, POOLINGS["cls"](32))


@pytest.mark.parametrize("position", ["size", "offset_always"])
def test_positions_are_resampled_like_those_of_a_vit(position):
    backbone = perturbed(tiny(position=position), by=0.2)
    x = images(96)
    table = position_table(backbone.pos_embed.flatten(2).transpose(1, 2), (7, 7), (11, 11), position)
    expected = backbone.patch_embed(x).flatten(2).transpose(1, 2) + table
    torch.testing.assert_close(backbone(x, layers=(0,)).stages[0].flatten(2).transpose(1, 2), expected)


def test_parameter_counts_of_the_map_paper_and_release():
    """MAP, Table 2: no class token, no layers for it, no last norm before MAP; stem and three stages are fused."""
    with torch.device("meta"):
        whole, bare = Backbone("pit_s_224"), Backbone("pit_s_224", **WITHOUT)
        encoder = Encoder(bare, POOLINGS["gap"](576), norm="before")
        head = CLASSIFIERS["map"](encoder, 1000, groups=2, tokens=4, gram_groups=32, embed=192, heads=6)
    count = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in (("whole", whole), ("bare", bare), ("norm", encoder.norm), ("head", head))
    }
    classifier = 576 * 1000 + 1000
    assert count["whole"] + classifier == 23_461_912  # timm's, with the class token
    assert round((count["bare"] + count["norm"] + classifier) / 1e6, 1) == 23.3  # the MAP paper, with average pooling
    assert head.layers == (0, 1, 2, 3) and count["bare"] + count["head"] == 36_147_424


def test_drop_path_is_keyed_by_sample_and_leaves_the_shortcut(monkeypatch):
    backbone, x, keys = (
        perturbed(tiny(drop_path=0.5), by=0.2).train(),
        images(count=6),
        keyed_random.make_key(1, torch.arange(6)),
    )
    whole = backbone(x, drop_key=keys).patches
    parts = torch.cat([backbone(x[:2], drop_key=keys[:2]).patches, backbone(x[2:], drop_key=keys[2:]).patches])
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
    assert (whole != backbone(x, drop_key=keys + 1).patches).flatten(1).any(1).sum() >= 4
    theirs = timm.create_model("pit_s_224", drop_path_rate=0.5, **TINY)
    assert backbone.drop_path.rates == pytest.approx(
        [getattr(block.drop_path1, "drop_prob", 0.0) for part in theirs.transformers for block in part.blocks]
    )
    monkeypatch.setattr(
        backbone.drop_path, "forward", lambda batch, like, key=None: torch.zeros(4, 2, batch, 1, 1, dtype=like.dtype)
    )
    expected = backbone.transformers[2].pool.conv(
        backbone.transformers[1].pool.conv(backbone.patch_embed(x) + backbone.pos_embed)
    )
    torch.testing.assert_close(backbone(x, layers=(-1,)).stages[0], expected)


@pytest.mark.parametrize("options", [{}, WITHOUT], ids=["class token", "without"])
@pytest.mark.parametrize("classifier, more", [("linear", {}), ("map", {"dim": 16, "tokens": 2, "heads": 2})])
def test_every_parameter_gets_a_gradient(options, classifier, more):
    backbone = tiny(drop_path=0.1, **options)
    encoder = Encoder(backbone, SimPool(32, gamma=1.25), norm="before").double().train()
    assert_every_parameter_gets_a_gradient(encoder, classifier, **more)


@pytest.mark.parametrize("pooling", ["simpool", "gap"])
def test_encoder_and_its_spec(pooling):
    backbone = tiny(drop_path=0.1, position="size", **WITHOUT)
    encoder = perturbed(Encoder(backbone, POOLINGS[pooling](32), norm="before"), by=0.2)
    features = encoder(images(96), layers=(0, 3))
    raw = backbone(images(96))
    torch.testing.assert_close(features.patches, encoder.norm(raw.patches))
    torch.testing.assert_close(features.pooled, encoder.pooling(encoder.norm(raw.patches)).vector)
    rebuilt = encoder_from_spec(encoder.spec()).double().eval()
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt(images(96)).pooled, features.pooled) and rebuilt.spec() == encoder.spec()


def test_wrong_arguments_are_refused_in_one_line():
    for options, words in (
        ({"patch_size": 8}, "backbone.patch_size=8 cannot be set"),
        ({"image_size": 24}, "24x24 pixels are smaller than the stride 32 of pit_s_224"),
        ({"mask_token": True}, "has no patch tokens to mask"),
        ({"drop_path_rate": 0.1}, "use drop_path"),
        ({"position": "else"}, "choose offset, size or"),
    ):
        with pytest.raises(UserError) as caught:
            tiny(**options)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_pretrained_weights_from_a_file(tmp_path):
    donor = timm.create_model("pit_s_224", img_size=64, **TINY).eval()
    state = {
        key.replace("transformers.1.pool.", "pools.0.").replace("transformers.2.pool.", "pools.1."): value
        for key, value in donor.state_dict().items()
    }
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "timm.pth")
    torch.save({"model": state}, tmp_path / "authors.pth")
    x = images(dtype=torch.float32)
    for name in ("timm", "authors"):
        backbone = tiny(weights=tmp_path / f"{name}.pth").eval()
        torch.testing.assert_close(
            backbone(x, layers=(-1,)).stages[0], donor.forward_intermediates(x, intermediates_only=True)[-1]
        )
        bare = tiny(weights=tmp_path / f"{name}.pth", image_size=96, **WITHOUT)
        assert bare.pos_embed.shape == (1, 8, 11, 11) and torch.equal(
            bare.transformers[2].pool.conv.weight, donor.transformers[2].pool.conv.weight
        )
    with pytest.raises(UserError, match="does not fit this backbone"):
        tiny(weights=tmp_path / "timm.pth", depth=(1, 1, 1))


def test_recipe_accepts_the_keys_of_the_family():
    words = (
        "backbone=pit_ti_224",
        "masking=none",
        "pooling=simpool",
        "crops.local_size=32",
        "crops.global_size=64",
        "backbone.depth=[1, 1, 1]",
    )
    recipe = read_recipe("debug/tiny", *words, "backbone.class_token=false", "backbone.position=size")
    assert recipe.backbone.keywords()["class_token"] is False and recipe.backbone.keywords()["position"] == "size"
    with pytest.raises(UserError, match="nothing reads this key"):
        read_recipe("debug/tiny", *words, "backbone.stride=4")


def test_two_steps_of_dino(tmp_path):
    words = [f"backbone.{key}={list(value)}" for key, value in TINY.items()]
    recipe = read_recipe(
        "debug/tiny",
        "backbone=pit_ti_224",
        "method=dino",
        "masking=none",
        "pooling=simpool",
        "crops.global_size=64",
        "crops.local_size=32",
        *words,
        "data.count=16",
        "train.epochs=2",
        "train.batch_size=16",
        "optimizer.warmup_epochs=0",
        "evaluate.pictures_every=0",
        "evaluate.knn_every=0",
        "speed.workers=0",
    )
    assert maskwise.train(recipe, out=tmp_path / "run", quiet=True)["status"] == "complete"
    encoder = maskwise.load(tmp_path / "run").eval()
    assert isinstance(encoder.backbone, FeatureMapBackbone) and encoder(images(dtype=torch.float32)).pooled.shape == (
        2,
        32,
    )


@pytest.mark.slow
def test_exported_programs_accept_any_batch_and_size(tmp_path):
    """Export compares each program with the encoder, at another size too."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    lines = []
    maskwise.export(Encoder(tiny(), SimPool(32, gamma=1.25)).eval(), tmp_path / "out", onnx=("onnx",), say=lines.append)
    assert any("onnxruntime" in line and line.endswith("any batch, any size") for line in lines), lines


@pytest.mark.slow
def test_export_loads_in_every_library_and_is_refused_without_class_token(tmp_path):
    """Export verifies the folder in timm and transformers; loading it is bit-exact."""
    encoder = Encoder(tiny(), POOLINGS["gap"](32), norm="before").eval()
    maskwise.export(encoder, tmp_path / "out", say=None)
    loaded, x = maskwise.load(tmp_path / "out"), images(dtype=torch.float32)
    assert loaded.spec() == encoder.spec() and torch.equal(loaded(x).pooled, encoder(x).pooled)
    bare = Encoder(tiny(**WITHOUT), POOLINGS["gap"](32), norm="before").eval()
    with pytest.raises(
        UserError, match="timm's pit_s_224 always has a class token: use the run folder, which `maskwise.load` reads"
    ):
        maskwise.export(bare, tmp_path / "bare", say=None)
    assert not (tmp_path / "bare").exists()
