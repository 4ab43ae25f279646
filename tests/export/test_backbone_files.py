"""Backbones of DINOv2, DINOv3 and timm: equal features, timm's own reader as a second opinion, and back to their names bit for bit."""

import json

import pytest
import torch
from export.published import DEPTH, DIM, SIZE, X, dinov2, features, randn, training_file
from safetensors.torch import load_file, save_file

import maskwise  # before timm, which it readies
from maskwise.export import dinov3, layouts, timm_files
from maskwise.export.convert import convert
from maskwise.functional.errors import UserError
from maskwise.nn import Backbone

import timm  # noqa: E402

KINDS = {
    "plain": {}, "registers": {"registers": 4}, "gated": {"gated": True}, "gated with registers": {"gated": True, "registers": 4}, "chunked": {"chunks": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_dinov2_gives_equal_features_and_comes_back(tmp_path, kind):
    torch.manual_seed(0)
    tensors = dinov2(**KINDS[kind])
    torch.save(tensors, tmp_path / "dinov2.pth")
    encoder = layouts.load(tmp_path / "dinov2.pth")
    flat = {key.replace("blocks.0.", "blocks.", 1) if KINDS[kind].get("chunks") and key.startswith("blocks.0.") else key: value for key, value in tensors.items()}
    pooled, attention = features(flat, X)
    seen = encoder(X)
    assert torch.allclose(seen.pooled.double(), pooled, atol=1e-5) and torch.allclose(seen.attention.double(), attention, atol=1e-6)
    assert encoder.backbone.position == ("size" if "registers" in KINDS[kind] else "offset")
    convert(tmp_path / "dinov2.pth", tmp_path / "back.pth", layout="dinov2")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == flat.keys()
    folded = {"cls_token", "pos_embed"} if "registers" in KINDS[kind] else set()  # the token keeps its place's vector
    assert all(torch.equal(flat[key], back[key]) for key in flat.keys() - folded)
    if folded:
        assert torch.equal(back["cls_token"], flat["cls_token"] + flat["pos_embed"][:, :1]) and torch.equal(back["pos_embed"][:, 1:], flat["pos_embed"][:, 1:])
        again, _ = features(back, X)
        assert torch.allclose(again, pooled, atol=1e-6)


def test_dinov2_reads_as_timm_reads_it(tmp_path):
    """timm's own filter, on a model of the published width."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, embed_dim=DIM, depth=DEPTH, num_heads=1)
    tensors = dinov2(registers=4, patch=14, grid=4)
    save_file(tensors, tmp_path / "dinov2.safetensors")
    theirs = timm.models.vision_transformer.checkpoint_filter_fn({key: value.clone() for key, value in tensors.items()}, model)
    ours = layouts.read(tmp_path / "dinov2.safetensors")
    own = {key.removeprefix("backbone."): value for key, value in ours.networks["only"].items() if key != "backbone.mask_token"}
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    assert ours.spec["backbone"]["name"] == "vit_small_patch14_reg4_dinov2"


def dinov3_file(bias=False, gated=False):
    """The tensors of a DINOv3 transformer under its names."""
    tensors = {
        "cls_token": randn(1, 1, DIM), "storage_tokens": randn(1, 4, DIM), "mask_token": randn(1, DIM), "norm.weight": 1 + randn(DIM), "norm.bias": randn(DIM),
        "patch_embed.proj.weight": randn(DIM, 3, 16, 16), "patch_embed.proj.bias": randn(DIM),
        "rope_embed.periods": 100.0 ** (2 * torch.arange(DIM // 4) / (DIM // 2)),
    }  # fmt: skip
    mask = torch.cat([torch.ones(DIM), torch.zeros(DIM), torch.ones(DIM)])
    for i in range(DEPTH):
        front = f"blocks.{i}."
        for name in ("norm1", "norm2"):
            tensors[f"{front}{name}.weight"], tensors[f"{front}{name}.bias"] = 1 + randn(DIM), randn(DIM)
        mlp = (("mlp.w1", 4 * DIM, DIM), ("mlp.w2", 4 * DIM, DIM), ("mlp.w3", DIM, 4 * DIM)) if gated else (("mlp.fc1", 4 * DIM, DIM), ("mlp.fc2", DIM, 4 * DIM))
        for name, out, inside in (("attn.qkv", 3 * DIM, DIM), ("attn.proj", DIM, DIM), *mlp):
            tensors[f"{front}{name}.weight"], tensors[f"{front}{name}.bias"] = randn(out, inside), randn(out)
        tensors[f"{front}attn.qkv.bias"] = randn(3 * DIM) * mask if bias else torch.zeros(3 * DIM)
        tensors[f"{front}attn.qkv.bias_mask"] = mask.clone()
        tensors[f"{front}ls1.gamma"], tensors[f"{front}ls2.gamma"] = randn(DIM), randn(DIM)
    return tensors


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_reads_as_timm_reads_it_and_comes_back(tmp_path, bias, gated):
    torch.manual_seed(0)
    tensors = dinov3_file(bias, gated)
    torch.save(tensors, tmp_path / "dinov3.pth")
    source = layouts.read(tmp_path / "dinov3.pth")
    assert source.layout == "dinov3" and source.spec["backbone"]["name"] == f"vit_small{'_plus' if gated else ''}_patch16_dinov3{'_qkvb' if bias else ''}"
    model = timm.create_model(source.spec["backbone"]["name"], embed_dim=DIM, depth=DEPTH, num_heads=1, num_classes=0, global_pool="")
    theirs = timm.models.eva.checkpoint_filter_fn({key: value.clone() for key, value in tensors.items()}, model)
    own = {key.removeprefix("backbone."): value for key, value in source.networks["only"].items() if key != "backbone.mask_token"}
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    back, left = dinov3.write(source)
    assert back.keys() == tensors.keys() and not left
    assert all(torch.equal(back[key], tensors[key]) for key in tensors if key != "rope_embed.periods")
    assert torch.allclose(back["rope_embed.periods"], tensors["rope_embed.periods"])


def test_dinov3_runs_as_timm_runs_it(tmp_path):
    try:
        with torch.device("meta"):
            Backbone("vit_small_patch16_dinov3", image_size=32)
    except UserError:
        pytest.skip("backbones of timm's Eva are not built yet")
    torch.manual_seed(0)
    tensors = dinov3_file(bias=True)
    torch.save(tensors, tmp_path / "dinov3.pth")
    encoder = layouts.load(tmp_path / "dinov3.pth")
    model = timm.create_model("vit_small_patch16_dinov3_qkvb", embed_dim=DIM, depth=DEPTH, num_heads=1, num_classes=0, global_pool="").eval()
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
        layouts.read(tmp_path / "dinov3.pth")


def test_timm_there_and_back(tmp_path):
    """A timm state dict, with a classifier that is left out and said, and with the folder timm writes for the Hub."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=DIM, depth=DEPTH, num_heads=2, num_classes=3).eval()
    state = model.state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    source = timm_files.source_of("vit_tiny_patch16_224", tmp_path / "timm.safetensors", "timm", {"image_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": 2})
    assert sorted(source.unused["classifier and tokens of pretraining"]) == ["head.bias", "head.weight"]
    back, _ = timm_files.write(source)
    assert back.keys() == {key for key in state if not key.startswith("head.")} and all(torch.equal(back[key], state[key]) for key in back)
    with torch.no_grad():
        assert torch.allclose(source.encoder().eval()(X).pooled, model.forward_features(X)[:, 0], atol=1e-5)
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 3, "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": 2, "num_classes": 3},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    encoder = layouts.load(folder)
    assert encoder.mean == (0.5, 0.5, 0.5) and encoder.std == (0.25, 0.25, 0.25)
    with torch.no_grad():
        assert torch.allclose(encoder(X).pooled, model.forward_features(X)[:, 0], atol=1e-5)


def test_ours_to_timm_runs_in_timm(tmp_path):
    """Fact 65: forward parity with timm below 1e-5, from a research file, through --layout timm."""
    content = training_file("ibot")
    torch.save(content, tmp_path / "ibot.pth")
    lines = convert(tmp_path / "ibot.pth", tmp_path / "timm.safetensors", layout="timm")
    assert any("student network" in line for line in lines)
    model = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=DIM, depth=DEPTH, num_heads=1, num_classes=0).eval()
    model.load_state_dict(load_file(tmp_path / "timm.safetensors"))
    with torch.no_grad():
        assert torch.allclose(model.forward_features(X)[:, 0], maskwise.load(tmp_path / "ibot.pth")(X).pooled, atol=1e-5)
        # a DINO-family network under DINOv2's names: layer scales of one and an unused mask token, and the same features
        convert(tmp_path / "ibot.pth", tmp_path / "dinov2.pth", layout="dinov2")
        assert torch.allclose(maskwise.load(tmp_path / "dinov2.pth")(X).pooled, maskwise.load(tmp_path / "ibot.pth")(X).pooled, atol=1e-6)
