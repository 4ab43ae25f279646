"""Backbones of DINOv2, DINOv3 and timm: equal features, the same keys as timm's reader, bit-exact writing."""

import json

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

import maskwise
from export.folder.test_folder import build as build_encoder
from maskwise.errors import UserError
from maskwise.export import load, write
from maskwise.export.convert import check_written, convert
from maskwise.export.formats import dino_family_writer, dinov3
from maskwise.export.formats import timm as timm_files
from maskwise.export.formats.imported_model import ImportedModel
from maskwise.nn import POOLINGS, Backbone, Encoder
from support.research_files import DEPTH, DIM, SIZE, X, dinov2, features, randn, training_file

KINDS = {
    "plain": {},
    "registers": {"registers": 4},
    "gated": {"gated": True},
    "gated with registers": {"gated": True, "registers": 4},
    "chunked": {"chunks": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_dinov2_gives_equal_features_and_is_written_back(tmp_path, kind):
    torch.manual_seed(0)
    tensors = dinov2(**KINDS[kind])
    torch.save(tensors, tmp_path / "dinov2.pth")
    encoder = load.load(tmp_path / "dinov2.pth", num_heads=1)
    flat = {
        key.replace("blocks.0.", "blocks.", 1)
        if KINDS[kind].get("chunks") and key.startswith("blocks.0.")
        else key: value
        for key, value in tensors.items()
    }
    pooled, attention = features(flat, X)
    output = encoder(X)
    assert torch.allclose(output.pooled.double(), pooled, atol=1e-5)
    assert torch.allclose(output.attention.double(), attention, atol=1e-6)
    assert encoder.backbone.position == ("size" if "registers" in KINDS[kind] else "offset")
    convert(tmp_path / "dinov2.pth", tmp_path / "back.pth", layout="dinov2", num_heads=1)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == flat.keys()
    folded = {"cls_token", "pos_embed"} if "registers" in KINDS[kind] else set()  # the position is in the token
    assert all(torch.equal(flat[key], back[key]) for key in flat.keys() - folded)
    if folded:
        assert torch.equal(back["cls_token"], flat["cls_token"] + flat["pos_embed"][:, :1]) and torch.equal(
            back["pos_embed"][:, 1:], flat["pos_embed"][:, 1:]
        )
        again, _ = features(back, X)
        assert torch.allclose(again, pooled, atol=1e-6)


def test_dinov2_reads_as_timm_reads_it(tmp_path):
    """Compare with timm's checkpoint filter."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, embed_dim=DIM, depth=DEPTH, num_heads=1)
    tensors = dinov2(registers=4, patch=14, grid=4)
    save_file(tensors, tmp_path / "dinov2.safetensors")
    theirs = timm.models.vision_transformer.checkpoint_filter_fn(
        {key: value.clone() for key, value in tensors.items()}, model
    )
    ours = load.read(tmp_path / "dinov2.safetensors")
    own = {
        key.removeprefix("backbone."): value
        for key, value in ours.networks["only"].items()
        if key != "backbone.mask_token"
    }
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    assert ours.spec["backbone"]["name"] == "vit_small_patch14_reg4_dinov2"


def dinov3_file(bias=False, gated=False):
    """Return the tensors of a DINOv3 transformer under its names."""
    tensors = {
        "cls_token": randn(1, 1, DIM),
        "storage_tokens": randn(1, 4, DIM),
        "mask_token": randn(1, DIM),
        "norm.weight": 1 + randn(DIM),
        "norm.bias": randn(DIM),
        "patch_embed.proj.weight": randn(DIM, 3, 16, 16),
        "patch_embed.proj.bias": randn(DIM),
        "rope_embed.periods": 100.0 ** (2 * torch.arange(DIM // 4) / (DIM // 2)),
    }
    mask = torch.cat([torch.ones(DIM), torch.zeros(DIM), torch.ones(DIM)])
    for i in range(DEPTH):
        front = f"blocks.{i}."
        for name in ("norm1", "norm2"):
            tensors[f"{front}{name}.weight"], tensors[f"{front}{name}.bias"] = 1 + randn(DIM), randn(DIM)
        mlp = (
            (("mlp.w1", 4 * DIM, DIM), ("mlp.w2", 4 * DIM, DIM), ("mlp.w3", DIM, 4 * DIM))
            if gated
            else (("mlp.fc1", 4 * DIM, DIM), ("mlp.fc2", DIM, 4 * DIM))
        )
        for name, out, inside in (("attn.qkv", 3 * DIM, DIM), ("attn.proj", DIM, DIM), *mlp):
            tensors[f"{front}{name}.weight"], tensors[f"{front}{name}.bias"] = randn(out, inside), randn(out)
        tensors[f"{front}attn.qkv.bias"] = randn(3 * DIM) * mask if bias else torch.zeros(3 * DIM)
        tensors[f"{front}attn.qkv.bias_mask"] = mask.clone()
        tensors[f"{front}ls1.gamma"], tensors[f"{front}ls2.gamma"] = randn(DIM), randn(DIM)
    return tensors


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_reads_as_timm_reads_it_and_is_written_back(tmp_path, bias, gated):
    torch.manual_seed(0)
    tensors = dinov3_file(bias, gated)
    torch.save(tensors, tmp_path / "dinov3.pth")
    source = load.read(tmp_path / "dinov3.pth", num_heads=1)
    assert (
        source.layout == "dinov3"
        and source.spec["backbone"]["name"]
        == f"vit_small{'_plus' if gated else ''}_patch16_dinov3{'_qkvb' if bias else ''}"
    )
    model = timm.create_model(
        source.spec["backbone"]["name"], embed_dim=DIM, depth=DEPTH, num_heads=1, num_classes=0, global_pool=""
    )
    theirs = timm.models.eva.checkpoint_filter_fn({key: value.clone() for key, value in tensors.items()}, model)
    own = {
        key.removeprefix("backbone."): value
        for key, value in source.networks["only"].items()
        if key != "backbone.mask_token"
    }
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    back, left = dinov3.write(source)
    assert back.keys() == tensors.keys() and not left
    assert all(torch.equal(back[key], tensors[key]) for key in tensors if key != "rope_embed.periods")
    assert torch.allclose(back["rope_embed.periods"], tensors["rope_embed.periods"])


def test_dinov3_runs_as_timm_runs_it(tmp_path):
    torch.manual_seed(0)
    tensors = dinov3_file(bias=True)
    torch.save(tensors, tmp_path / "dinov3.pth")
    encoder = load.load(tmp_path / "dinov3.pth", num_heads=1)
    model = timm.create_model(
        "vit_small_patch16_dinov3_qkvb", embed_dim=DIM, depth=DEPTH, num_heads=1, num_classes=0, global_pool=""
    ).eval()
    theirs = timm.models.eva.checkpoint_filter_fn({key: value.clone() for key, value in tensors.items()}, model)
    model.load_state_dict(theirs)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(encoder(x).pooled, model.forward_features(x)[:, 0], atol=1e-5)


def test_a_bias_on_k_is_refused(tmp_path):
    torch.manual_seed(0)
    tensors = dinov3_file()
    tensors["blocks.0.attn.qkv.bias"] = torch.ones(3 * DIM)
    del tensors["blocks.0.attn.qkv.bias_mask"]
    torch.save(tensors, tmp_path / "dinov3.pth")
    with pytest.raises(UserError, match="bias on k"):
        load.read(tmp_path / "dinov3.pth")


def test_timm_is_read_and_written_back(tmp_path):
    """A timm state dict, with a classifier that is left out and reported, and a folder that timm wrote for the Hub."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=DIM, depth=DEPTH, num_heads=2, num_classes=3
    ).eval()
    state = model.state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    options = {"image_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": 2}
    source = timm_files.import_model("vit_tiny_patch16_224", {"only": state}, "timm", options, None)
    assert sorted(source.unused["classifier and tokens of pretraining"]) == ["head.bias", "head.weight"]
    back, _ = timm_files.write(source)
    assert back.keys() == {key for key in state if not key.startswith("head.")} and all(
        torch.equal(back[key], state[key]) for key in back
    )
    with torch.no_grad():
        assert torch.allclose(source.encoder().eval()(X).pooled, model.forward_features(X)[:, 0], atol=1e-5)
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "model_args": {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": DIM,
            "depth": DEPTH,
            "num_heads": 2,
            "num_classes": 3,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    encoder = load.load(folder)
    assert encoder.mean == (0.5, 0.5, 0.5) and encoder.std == (0.25, 0.25, 0.25)
    with torch.no_grad():
        assert torch.allclose(encoder(X).pooled, model.forward_features(X)[:, 0], atol=1e-5)


def test_ours_to_timm_runs_in_timm(tmp_path):
    """A research file written with --layout timm computes the same in timm, to 1e-5."""
    content = training_file("ibot")
    torch.save(content, tmp_path / "ibot.pth")
    lines = convert(tmp_path / "ibot.pth", tmp_path / "timm.safetensors", layout="timm", num_heads=1)
    assert any("student network" in line for line in lines)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=DIM, depth=DEPTH, num_heads=1, num_classes=0
    ).eval()
    model.load_state_dict(load_file(tmp_path / "timm.safetensors"))
    with torch.no_grad():
        assert torch.allclose(
            model.forward_features(X)[:, 0], maskwise.load(tmp_path / "ibot.pth", num_heads=1)(X).pooled, atol=1e-5
        )
        # under DINOv2's names: layer scales of one, an unused mask token, the same features
        convert(tmp_path / "ibot.pth", tmp_path / "dinov2.pth", layout="dinov2", num_heads=1)
        assert torch.allclose(
            maskwise.load(tmp_path / "dinov2.pth", num_heads=1)(X).pooled,
            maskwise.load(tmp_path / "ibot.pth", num_heads=1)(X).pooled,
            atol=1e-6,
        )


@pytest.mark.parametrize(
    "options, rows",
    [
        ({"reg_tokens": 5}, 17),
        ({"reg_tokens": 5, "no_embed_class": True}, 17),
        ({"no_embed_class": True}, 17),
        ({"qkv_bias": False}, 17),
        ({"image_size": 48}, 37),
    ],
    ids=["registers in the table", "registers outside", "class token outside", "no bias", "another grid"],
)
def test_dinov2_files_have_one_row_before_the_patches(tmp_path, options, rows):
    """Whatever rows the table had, the file reads back with the printed settings and gives equal features."""
    encoder = build_encoder(**options)
    write.write(encoder, tmp_path / "ours", say=None)
    lines = convert(tmp_path / "ours", tmp_path / "dinov2.pth", layout="dinov2")
    tensors = torch.load(tmp_path / "dinov2.pth", weights_only=True)
    assert tensors["pos_embed"].shape == (1, rows, 64)
    assert "register_tokens" not in tensors or tensors["register_tokens"].shape == (1, 5, 64)
    back = load.load(tmp_path / "dinov2.pth", **printed_settings(lines))
    for size in (32, 64):  # the table is resampled alike
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        expected, got = encoder(images), back(images)
        assert (expected.pooled - got.pooled).abs().max() < 1e-5
        assert (expected.attention - got.attention).abs().max() < 1e-6


def printed_settings(lines):
    """Return the settings in convert's last note, as keyword arguments."""
    words = lines[-2].partition("load it with ")[2].split()
    return {word.partition("=")[0]: yaml.safe_load(word.partition("=")[2]) for word in words}


def test_dino_files_get_the_row_of_the_class_token(tmp_path):
    encoder = build_encoder(no_embed_class=True)
    write.write(encoder, tmp_path / "ours", say=None)
    lines = convert(tmp_path / "ours", tmp_path / "dino.pth", layout="dino")
    assert torch.load(tmp_path / "dino.pth", weights_only=True)["pos_embed"].shape == (1, 17, 64)
    back = load.load(tmp_path / "dino.pth", **printed_settings(lines))
    assert (encoder(X).pooled - back(X).pooled).abs().max() < 1e-5


def test_settings_that_a_file_does_not_store_are_printed(tmp_path):
    encoder = build_encoder(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    encoder.image_size, encoder.crop_pct = (48, 48), 0.9
    write.write(encoder, tmp_path / "ours", say=None)
    lines = convert(tmp_path / "ours", tmp_path / "dino.pth", layout="dino")
    settings = printed_settings(lines)
    assert settings.keys() == {"num_heads", "image_size", "mean", "std", "crop_pct"}
    assert load.load(tmp_path / "dino.pth", **settings).transform == encoder.transform
    gap = Encoder(
        Backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=1),
        POOLINGS["gap"](64),
    )
    write.write(gap, tmp_path / "gap", say=None)
    lines = convert(tmp_path / "gap", tmp_path / "gap.pth", layout="dino")
    assert any("does not store the pooling gap" in line for line in lines)


def test_a_file_that_cannot_be_read_back_is_not_written(tmp_path):
    write.write(build_encoder(image_size=(32, 48)), tmp_path / "ours", say=None)
    for layout in ("dino", "dinov2"):
        with pytest.raises(UserError, match=f"cannot be written as {layout}: .*25 rows is not a square grid"):
            convert(tmp_path / "ours", tmp_path / "file.pth", layout=layout)
    write.write(build_encoder(pos_embed="none"), tmp_path / "plain", say=None)
    for layout in ("dino", "dinov2"):
        with pytest.raises(UserError, match="plain has no position table, unlike"):
            convert(tmp_path / "plain", tmp_path / "file.pth", layout=layout)
    norm = build_encoder()
    norm.norm.eps = 1e-3  # no file stores it
    model = load.read(tmp_path / "ours")
    with pytest.raises(UserError, match="its features differ"):
        check_written(model_of(norm), model_of(build_encoder()), None, {})
    assert model.layout == "export" and sorted(path.name for path in tmp_path.iterdir()) == ["ours", "plain"]


def model_of(encoder):
    """Return an encoder as an ImportedModel that builds it."""
    model = ImportedModel("memory", "export", encoder.spec(), {"only": encoder.state_dict()})
    model.encoder = lambda weights="teacher": encoder
    return model


def test_a_failed_or_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write.write(build_encoder(), tmp_path / "ours", say=None)
    (tmp_path / "file.pth").write_bytes(b"old")
    for error, expected in ((OSError(28, "No space left"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def fail(content, path, error=error):
            path.write_bytes(b"half")
            raise error

        monkeypatch.setattr(dino_family_writer, "save", fail)
        with pytest.raises(expected):
            convert(tmp_path / "ours", tmp_path / "file.pth", layout="dino")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.pth", "ours"]
    assert (tmp_path / "file.pth").read_bytes() == b"old"


def test_a_timm_file_comes_with_the_arguments_that_open_it(tmp_path):
    encoder = build_encoder(reg_tokens=2, init_values=0.3)
    write.write(encoder, tmp_path / "ours", say=None)
    line = convert(tmp_path / "ours", tmp_path / "timm.pth", layout="timm")[-2]
    model = eval(line.partition("open it with ")[2], {"timm": timm}).eval()
    model.load_state_dict(torch.load(tmp_path / "timm.pth", weights_only=True))
    with torch.no_grad():
        assert (model(X) - encoder(X).pooled).abs().max() < 1e-5
