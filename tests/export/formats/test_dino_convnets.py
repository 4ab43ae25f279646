"""ResNets, ConvNeXts and Swins in files of other projects, under their names, and exported to folders for timm."""

import argparse
import re

import pytest
import torch

import maskwise
from maskwise.errors import UserError
from maskwise.export import convert, write
from maskwise.export.folder import programs, verify
from maskwise.nn import POOLINGS, Backbone, Encoder, SimPool
from maskwise.nn.backbones.timm_registry import timm
from support.research_files import head, network, prefixed, randn

RES = {"layers": (1, 2, 1, 1), "channels": (8, 8, 8, 16)}
CNX = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 24)}
SWIN = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 7}
X = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def random_timm_model(name, **arguments):
    """Return timm's model with every weight and statistic changed from its initial value."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **arguments).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.rand_like(value) * 0.1)
        for key, value in model.named_buffers():
            if "running" in key:
                value.add_(torch.rand_like(value))
    return model


def meta(state):
    """Rename a ConvNeXt's keys from timm's names to Meta's."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"^stages\.(\d)\.blocks\.(\d)\.", r"stages.\1.\2.", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace("head.norm", "norm")
        key = key.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
        renamed[key] = value.reshape(1, 1, 1, -1) if "grn" in key else value
    return renamed


def simpool(dim):
    return {
        "norm_patches.weight": 1 + randn(dim),
        "norm_patches.bias": randn(dim),
        "wq.weight": randn(dim, dim),
        "wk.weight": randn(dim, dim),
    }


def pooled_by(weights, maps, gamma=2.0):
    pooling = SimPool(maps.shape[1], gamma=gamma, min_scope="batch")
    pooling.load_state_dict(weights)
    return pooling(maps).vector


def body(state, *without):
    return {key: value for key, value in state.items() if not key.startswith(without)}


def test_simpools_resnet_of_a_training_file(tmp_path, capsys):
    model, pool = random_timm_model("resnet50", **RES), simpool(64)
    backbone = {**body(model.state_dict(), "fc."), **prefixed(pool, "simpool.")}
    both = {role: network(backbone, head(norm=True, dim=64), "module.") for role in ("student", "teacher")}
    torch.save(
        {
            **both,
            "epoch": 100,
            "args": argparse.Namespace(arch="resnet50", gamma=2.0),
            "dino_loss": {"center": randn(1, 12)},
        },
        tmp_path / "r.pth",
    )
    encoder = maskwise.load(tmp_path / "r.pth")
    assert encoder.backbone.kind == "ResNet" and encoder.pooling.gamma == 2.0 and encoder.pooling.min_scope == "batch"
    assert "read as simpool" in capsys.readouterr().err
    with torch.no_grad():
        torch.testing.assert_close(encoder(X).pooled, pooled_by(pool, model.forward_features(X)))
    lines = convert.convert(tmp_path / "r.pth", tmp_path / "again.pth", layout="simpool", weights="teacher")
    assert any("wrote" in line for line in lines)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == backbone.keys() and all(torch.equal(again[key], value) for key, value in backbone.items())


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_tiny"])
def test_simpools_convnext_under_metas_names(name, tmp_path):
    model, pool = random_timm_model(name, **CNX), simpool(24)
    backbone = {**meta(body(model.state_dict(), "head.fc.")), **prefixed(pool, "simpool.")}
    assert {
        "downsample_layers.0.0.weight",
        "stages.2.1.dwconv.weight",
        "stages.3.0.pwconv1.weight",
        "norm.weight",
    } <= backbone.keys()
    torch.save({role: network(backbone, head(dim=24)) for role in ("student", "teacher")}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="does not say which gamma its SimPool had"):
        maskwise.load(tmp_path / "c.pth")
    encoder = maskwise.load(tmp_path / "c.pth", gamma=2.0)
    with torch.no_grad():
        raw = model.forward_features(X)
        norm = model.head.norm
        expected = torch.nn.functional.layer_norm(pooled_by(pool, raw), (24,), norm.weight, norm.bias, 1e-6)
        torch.testing.assert_close(encoder(X).pooled, expected)
    with pytest.raises(UserError, match="not written in these layouts: name a folder"):
        convert.convert(tmp_path / "c.pth", tmp_path / "again.pth", layout="simpool", gamma=2.0)
    with pytest.raises(UserError, match="has no position table"):
        maskwise.load(tmp_path / "c.pth", gamma=2.0, position="size")


def test_supervised_files_under_timms_names(tmp_path):
    """global_pool.pool.* with auxiliary norms in a ResNet; head.global_pool.pool.* with head.norm.* in a ConvNeXt."""
    model, pool = random_timm_model("resnet18", **RES), simpool(16)
    auxiliary = {
        f"layer1.0.bn1.aux_bn.{i}.{key}": torch.ones(8)
        for i in (0, 1)
        for key in ("weight", "bias", "running_mean", "running_var")
    }
    torch.save(
        {
            "epoch": 9,
            "arch": "resnet18",
            "state_dict": {**model.state_dict(), **auxiliary, **prefixed(pool, "global_pool.pool.")},
        },
        tmp_path / "r.pth.tar",
    )
    with torch.no_grad():
        torch.testing.assert_close(
            maskwise.load(tmp_path / "r.pth.tar", gamma=2.0)(X).pooled, pooled_by(pool, model.forward_features(X))
        )
        model, pool = random_timm_model("convnext_small", **CNX), simpool(24)
        averaged = {**model.state_dict(), **prefixed(pool, "head.global_pool.pool.")}
        worse = {key: value + 1 for key, value in averaged.items()}
        torch.save(
            {"epoch": 9, "arch": "convnext_small", "state_dict": worse, "state_dict_ema": averaged},
            tmp_path / "c.pth.tar",
        )
        encoder = maskwise.load(tmp_path / "c.pth.tar", gamma=None)
        assert encoder.norm_order == "after"
        expected = torch.nn.functional.layer_norm(
            pooled_by(pool, model.forward_features(X), None), (24,), model.head.norm.weight, model.head.norm.bias, 1e-6
        )
        torch.testing.assert_close(encoder(X).pooled, expected)


@pytest.mark.parametrize("kind", ["resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_dinos_resnet_of_torchvisions_names_is_averaged(kind, tmp_path):
    arguments = {**RES, "channels": (8, 16, 16, 32), **({"cardinality": 2, "base_width": 32} if "next" in kind else {})}
    model = random_timm_model(kind, **arguments)
    torch.save(body(model.state_dict(), "fc."), tmp_path / "dino_resnet50_pretrain.pth")
    encoder = maskwise.load(tmp_path / "dino_resnet50_pretrain.pth")
    with torch.no_grad():
        torch.testing.assert_close(encoder(X).pooled, model.forward_features(X).mean((2, 3)))
    assert encoder.dim == 128 and "fc.weight" not in encoder.state_dict()


def test_ibots_swin(tmp_path):
    """Patch merging at the end of a stage, index buffers, a mask token, no classifier, as in iBOT's files."""
    model = random_timm_model("swin_tiny_patch4_window7_224", **SWIN, strict_img_size=False)
    state = body(model.state_dict(), "head.")
    backbone = {
        re.sub(r"^layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", key): value
        for key, value in state.items()
    }
    backbone |= {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64),
        "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
    }
    backbone["norm.weight"] = backbone["norm.weight"].clone()
    student = {**backbone, "masked_embed": randn(1, 8)}
    torch.save(
        {"student": network(student, head(dim=64), "module."), "teacher": network(backbone, head(dim=64))},
        tmp_path / "s.pth",
    )
    encoder = maskwise.load(tmp_path / "s.pth")
    assert encoder.norm_order == "before" and not encoder.backbone.has_mask_token
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x).pooled, model.forward_features(x).mean((1, 2)))
    assert torch.equal(
        maskwise.load(tmp_path / "s.pth", weights="student").backbone.mask_token, student["masked_embed"]
    )


EXPORTED = {
    "resnet": ("resnet50", {**RES, "image_size": 64}),
    "convnext": ("convnext_tiny", {**CNX, "image_size": 64}),
    "convnextv2": ("convnextv2_tiny", {**CNX, "image_size": 96, "patch_size": 2}),
    "swin": ("swin_tiny_patch4_window7_224", {**SWIN, "window_size": 4, "image_size": 64}),
}


@pytest.mark.parametrize("family", EXPORTED)
def test_an_exported_folder_opens_in_timm_and_in_maskwise(family, tmp_path):
    torch.manual_seed(0)
    name, arguments = EXPORTED[family]
    backbone = Backbone(name, **arguments)
    encoder = Encoder(backbone, POOLINGS["simpool"](backbone.dim, gamma=2.0)).eval()
    with torch.no_grad():
        for value in encoder.parameters():
            value.add_(torch.rand_like(value) * 0.1)
    lines = []
    write.write(encoder, tmp_path / "out", say=lines.append)
    x = torch.randn(2, 3, *encoder.image_size)
    with torch.no_grad():
        features = encoder(x)
        loaded = maskwise.load(tmp_path / "out")
        assert torch.equal(loaded(x).pooled, features.pooled) and loaded.spec() == encoder.spec()
        theirs = verify.open_timm(tmp_path / "out")
        torch.testing.assert_close(verify.timm_patches(theirs, x), features.patches, rtol=1e-4, atol=1e-4)
    assert any("timm" in line for line in lines), lines


def test_a_small_stem_is_refused(tmp_path):
    backbone = Backbone("resnet18", **RES, small_stem=True, image_size=32)
    with pytest.raises(UserError, match="has no stem for small images"):
        write.write(Encoder(backbone, POOLINGS["gap"](16)), tmp_path / "out", say=lambda line: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, headless, classes",
    [
        ("resnet18", 11_176_512, 12_214_824),
        ("resnet50", 23_508_032, 33_949_736),
        ("convnext_small", 49_454_688, 51_404_872),
    ],
)
def test_parameter_counts_of_the_papers(name, headless, classes):
    """Parameters of the backbone alone, and with SimPool and a classifier of 1000 classes."""
    with torch.device("meta"):
        backbone = Backbone(name)
        assert sum(p.numel() for p in backbone.parameters()) == headless
        encoder = Encoder(backbone, SimPool(backbone.dim, gamma=2.0))
    assert sum(p.numel() for p in encoder.parameters()) + 1000 * (backbone.dim + 1) == classes


@pytest.mark.slow
@pytest.mark.parametrize("family", ["resnet", "convnext", "swin"])
def test_programs_take_any_number_of_images(family):
    name, arguments = EXPORTED[family]
    torch.manual_seed(0)
    backbone = Backbone(name, **arguments)
    encoder = Encoder(backbone, POOLINGS["simpool"](backbone.dim, gamma=2.0)).eval()
    run = programs.trace(encoder).module()
    for count in (1, 4):
        x = torch.randn(count, 3, 64, 64)
        with torch.no_grad():
            for mine, theirs in zip((encoder(x).pooled, encoder(x).patches, encoder(x).attention), run(x), strict=True):
                torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)
