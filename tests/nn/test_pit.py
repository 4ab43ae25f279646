"""PiT as a backbone: timm's own forward with and without its class token, positions of any size, published counts, drop path, files, exports."""

import pytest
import torch
from nn.map_networks import assert_every_parameter_gets_a_gradient, images, stirred
from torch import nn

import maskwise
from maskwise.functional import draws
from maskwise.functional.errors import UserError
from maskwise.functional.resample import position_table
from maskwise.nn import CLASSIFIERS, POOLINGS, Backbone, Encoder, SimPool, encoder_from_spec
from maskwise.nn.maps import MapBackbone
from maskwise.recipe import read_recipe

import timm  # after maskwise.nn, which readies it

TINY = {"base_dims": (8, 8, 8), "depth": (1, 2, 1), "heads": (1, 2, 4)}
WITHOUT = {"class_token": False}


def tiny(**options):
    torch.manual_seed(0)
    return Backbone("pit_s_224", **{"image_size": 64, **TINY, **options})


def twin(backbone, side):
    """timm's own model with the same weights for images of that size; without the class token it has one of no rows."""
    model = timm.create_model("pit_s_224", num_classes=0, img_size=side, **TINY).double().eval()
    state = {**model.state_dict(), **backbone.state_dict()}
    there, wanted = state["pos_embed"], model.pos_embed.shape[-2:]
    state["pos_embed"] = position_table(there.flatten(2).transpose(1, 2), tuple(there.shape[-2:]), tuple(wanted)).transpose(1, 2).unflatten(2, wanted)
    model.load_state_dict(state)
    if backbone.cls_token is None:
        model.cls_token = nn.Parameter(torch.zeros(1, 0, 8, dtype=torch.float64))
    return model


@pytest.mark.parametrize("options", [{}, WITHOUT], ids=["class token", "without"])
@pytest.mark.parametrize("side, grids", [(64, (7, 4, 2)), (96, (11, 6, 3)), (75, (8, 4, 2)), (32, (3, 2, 1))])
def test_every_stage_is_timms_at_the_native_and_other_sizes(options, side, grids):
    backbone, x = stirred(tiny(**options), by=0.2), images(side)
    tokens = backbone(x, layers=(0, 1, 2, 3, -1))
    model = twin(backbone, side)
    torch.testing.assert_close(tokens.stages[0], model.patch_embed(x) + model.pos_embed, rtol=1e-11, atol=1e-11)
    for mine, theirs in zip(tokens.stages[1:4], model.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    assert [stage.shape[-1] for stage in tokens.stages[1:4]] == list(grids) and tokens.grid == (grids[-1],) * 2 == backbone.grid_for((side, side))
    assert tuple(stage.shape[1] for stage in tokens.stages[:4]) == backbone.stage_dims == (8, 8, 16, 32)
    assert torch.equal(tokens.patches, tokens.stages[4].flatten(2).transpose(1, 2)) and tokens.prefix.shape == (2, 0, 32) and tokens.keys is None
    wide = backbone(images(side, width=96))
    assert wide.grid == backbone.grid_for((side, 96)) and wide.patches.shape[1] == wide.grid[0] * wide.grid[1]
    torch.testing.assert_close(backbone(x[1:]).patches[0], tokens.patches[1], rtol=1e-12, atol=1e-12)


def test_the_class_token_is_kept_where_it_is_not_dropped():
    """The last norm of timm's is the class token's: it is ours as well."""
    backbone = stirred(tiny(), by=0.2)
    model = twin(backbone, 64)
    assert backbone.cls_token.shape == (1, 1, 8) and torch.equal(model.norm.weight, backbone.norm.weight)
    bare = tiny(**WITHOUT)
    assert bare.cls_token is None and set(backbone.state_dict()) - set(bare.state_dict()) == {
        "cls_token", *(f"transformers.{i}.pool.fc.{part}" for i in (1, 2) for part in ("weight", "bias"))
    }  # fmt: skip
    with pytest.raises(UserError, match="needs a class token and pit_s_224 hands none out: choose pooling simpool"):
        Encoder(backbone, POOLINGS["cls"](32))
    with pytest.raises(UserError, match="needs a class token and pit_s_224 has none: choose pooling simpool"):
        Encoder(bare, POOLINGS["cls"](32))


@pytest.mark.parametrize("position", ["size", "offset_always"])
def test_positions_are_resampled_as_a_transformers_are(position):
    backbone = stirred(tiny(position=position), by=0.2)
    x = images(96)
    table = position_table(backbone.pos_embed.flatten(2).transpose(1, 2), (7, 7), (11, 11), position)
    expected = backbone.patch_embed(x).flatten(2).transpose(1, 2) + table
    torch.testing.assert_close(backbone(x, layers=(0,)).stages[0].flatten(2).transpose(1, 2), expected)


def test_parameters_of_the_paper_and_of_the_release():
    """Table 2 and the release: no class token, no layer that it alone passes, no last norm before MAP; stem and three stages are fused (pooling.md 3.1)."""
    with torch.device("meta"):
        whole, bare = Backbone("pit_s_224"), Backbone("pit_s_224", **WITHOUT)
        encoder = Encoder(bare, POOLINGS["gap"](576), norm="before")
        head = CLASSIFIERS["map"](encoder, 1000, groups=2, tokens=4, gram_groups=32, embed=192, heads=6)
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in (("whole", whole), ("bare", bare), ("norm", encoder.norm), ("head", head))}
    classifier = 576 * 1000 + 1000
    assert count["whole"] + classifier == 23_461_912  # timm's, with the class token
    assert round((count["bare"] + count["norm"] + classifier) / 1e6, 1) == 23.3  # the paper's, with average pooling
    assert head.layers == (0, 1, 2, 3) and count["bare"] + count["head"] == 36_147_424


def test_drop_path_belongs_to_the_sample_and_leaves_the_shortcut(monkeypatch):
    backbone, x, keys = stirred(tiny(drop_path=0.5), by=0.2).train(), images(count=6), draws.mix(1, torch.arange(6))
    whole = backbone(x, drop_key=keys).patches
    parts = torch.cat([backbone(x[:2], drop_key=keys[:2]).patches, backbone(x[2:], drop_key=keys[2:]).patches])
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
    assert (whole != backbone(x, drop_key=keys + 1).patches).flatten(1).any(1).sum() >= 4
    theirs = timm.create_model("pit_s_224", drop_path_rate=0.5, **TINY)
    assert backbone.drop_path.rates == pytest.approx([getattr(block.drop_path1, "drop_prob", 0.0) for part in theirs.transformers for block in part.blocks])
    monkeypatch.setattr(backbone.drop_path, "forward", lambda batch, like, key=None: torch.zeros(4, 2, batch, 1, 1, dtype=like.dtype))
    expected = backbone.transformers[2].pool.conv(backbone.transformers[1].pool.conv(backbone.patch_embed(x) + backbone.pos_embed))
    torch.testing.assert_close(backbone(x, layers=(-1,)).stages[0], expected)


@pytest.mark.parametrize("options", [{}, WITHOUT], ids=["class token", "without"])
@pytest.mark.parametrize("classifier, more", [("linear", {}), ("map", {"dim": 16, "tokens": 2, "heads": 2})])
def test_every_parameter_gets_a_gradient(options, classifier, more):
    backbone = tiny(drop_path=0.1, **options)
    encoder = Encoder(backbone, SimPool(32, gamma=1.25), norm="before").double().train()
    assert_every_parameter_gets_a_gradient(encoder, classifier, **more)


@pytest.mark.parametrize("pooling", ["simpool", "gap"])
def test_an_encoder_and_its_description(pooling):
    backbone = tiny(drop_path=0.1, position="size", **WITHOUT)
    encoder = stirred(Encoder(backbone, POOLINGS[pooling](32), norm="before"), by=0.2)
    features = encoder(images(96), layers=(0, 3))
    raw = backbone(images(96))
    torch.testing.assert_close(features.patches, encoder.norm(raw.patches))
    torch.testing.assert_close(features.pooled, encoder.pooling(encoder.norm(raw.patches)).vector)
    again = encoder_from_spec(encoder.spec()).double().eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(images(96)).pooled, features.pooled) and again.spec() == encoder.spec()


def test_wrong_arguments_end_in_one_line():
    for options, words in (
        ({"patch_size": 8}, "backbone.patch_size=8 is not to be set"), ({"image_size": 24}, "24x24 pixels are smaller than the stride 32 of pit_s_224"),
        ({"mask_token": True}, "has no patch tokens to hide"), ({"drop_path_rate": 0.1}, "say drop_path"), ({"position": "else"}, "choose offset, size or"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            tiny(**options)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_pretrained_weights_from_a_file(tmp_path):
    donor = timm.create_model("pit_s_224", img_size=64, **TINY).eval()
    state = {key.replace("transformers.1.pool.", "pools.0.").replace("transformers.2.pool.", "pools.1."): value for key, value in donor.state_dict().items()}
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "timm.pth")
    torch.save({"model": state}, tmp_path / "authors.pth")
    x = images(dtype=torch.float32)
    for name in ("timm", "authors"):
        backbone = tiny(weights=tmp_path / f"{name}.pth").eval()
        torch.testing.assert_close(backbone(x, layers=(-1,)).stages[0], donor.forward_intermediates(x, intermediates_only=True)[-1])
        bare = tiny(weights=tmp_path / f"{name}.pth", image_size=96, **WITHOUT)
        assert bare.pos_embed.shape == (1, 8, 11, 11) and torch.equal(bare.transformers[2].pool.conv.weight, donor.transformers[2].pool.conv.weight)
    with pytest.raises(UserError, match="does not fit this backbone"):
        tiny(weights=tmp_path / "timm.pth", depth=(1, 1, 1))


def test_a_recipe_reads_what_is_its_own():
    words = ("backbone=pit_ti_224", "masking=none", "pooling=simpool", "crops.local_size=32", "crops.global_size=64", "backbone.depth=[1, 1, 1]")
    recipe = read_recipe("debug/tiny", *words, "backbone.class_token=false", "backbone.position=size")
    assert recipe.backbone.keywords()["class_token"] is False and recipe.backbone.keywords()["position"] == "size"
    with pytest.raises(UserError, match="nothing reads this key"):
        read_recipe("debug/tiny", *words, "backbone.stride=4")


def test_two_steps_of_dino(tmp_path):
    words = [f"backbone.{key}={list(value)}" for key, value in TINY.items()]
    recipe = read_recipe(
        "debug/tiny", "backbone=pit_ti_224", "method=dino", "masking=none", "pooling=simpool", "crops.global_size=64", "crops.local_size=32", *words, "data.count=16",
        "train.epochs=2", "train.batch_size=16", "optimizer.warmup_epochs=0", "evaluate.pictures_every=0", "evaluate.knn_every=0", "speed.workers=0",
    )  # fmt: skip
    assert maskwise.train(recipe, out=tmp_path / "run", quiet=True)["status"] == "complete"
    encoder = maskwise.load(tmp_path / "run").eval()
    assert isinstance(encoder.backbone, MapBackbone) and encoder(images(dtype=torch.float32)).pooled.shape == (2, 32)


@pytest.mark.slow
def test_programs_take_any_batch_and_any_size(tmp_path):
    """Written programs are run beside the encoder, at another size too, before they are kept."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    said = []
    maskwise.export(Encoder(tiny(), SimPool(32, gamma=1.25)).eval(), tmp_path / "out", onnx=("onnx",), say=said.append)
    assert any("onnxruntime" in line and line.endswith("any batch, any size") for line in said), said


@pytest.mark.slow
def test_an_export_opens_everywhere_with_the_class_token_and_is_refused_without(tmp_path):
    """The folder is compared in timm and transformers while it is written, and comes back bit for bit."""
    encoder = Encoder(tiny(), POOLINGS["gap"](32), norm="before").eval()
    maskwise.export(encoder, tmp_path / "out", say=None)
    back, x = maskwise.load(tmp_path / "out"), images(dtype=torch.float32)
    assert back.spec() == encoder.spec() and torch.equal(back(x).pooled, encoder(x).pooled)
    bare = Encoder(tiny(**WITHOUT), POOLINGS["gap"](32), norm="before").eval()
    with pytest.raises(UserError, match="timm's pit_s_224 always has a class token: keep the run folder, which `maskwise.load` reads"):
        maskwise.export(bare, tmp_path / "bare", say=None)
    assert not (tmp_path / "bare").exists()
