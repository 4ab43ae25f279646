"""timm's files: training files with an averaged copy, models pooled as timm pools them, weights in the local cache."""

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file

import maskwise
from maskwise.errors import UserError
from maskwise.export import load
from maskwise.export.convert import convert
from maskwise.nn import Backbone

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
OPTIONS = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def model_of(name="vit_tiny_patch16_224", seed=0, **options):
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SHAPE, "num_classes": 3, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def vector(model):
    model.reset_classifier(0)
    with torch.no_grad():
        return model(X)


def training_file(path, raw, averaged=None, **args):
    """Save a checkpoint as timm's training script does."""
    custom = {key: value for key, value in SHAPE.items() if key != "img_size"}
    args = argparse.Namespace(model="vit_tiny_patch16_224", img_size=32, model_kwargs=custom, lr=1e-3, **args)
    content = {"epoch": 3, "arch": "vit_tiny_patch16_224", "state_dict": raw.state_dict(), "version": 2, "args": args}
    if averaged is not None:
        content["state_dict_ema"] = averaged.state_dict()
    torch.save({**content, "optimizer": {"state": {}, "param_groups": []}, "metric": 71.2}, path)
    return path


@pytest.mark.parametrize("layout", [None, "timm"])
def test_the_averaged_copy_of_a_training_file_is_the_teacher(tmp_path, capfd, layout):
    raw, averaged = model_of(seed=0), model_of(seed=1)
    path = training_file(tmp_path / "model_best.pth.tar", raw, averaged)
    teacher, student = (load.load(path, weights=role, layout=layout) for role in ("teacher", "student"))
    line = capfd.readouterr().err.splitlines()[0]
    torch.testing.assert_close(teacher(X).pooled, vector(averaged), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(student(X).pooled, vector(raw), atol=1e-6, rtol=1e-5)
    assert "read as timm" in line and "classifier and tokens of pretraining 4" in line and "the student 30" in line
    convert(path, tmp_path / "folder")
    assert torch.equal(load.load(tmp_path / "folder", weights="student")(X).pooled, student(X).pooled)


def test_a_training_file_without_an_average_has_one_network(tmp_path, capfd):
    raw = model_of()
    path = training_file(tmp_path / "last.pth.tar", raw, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    encoder = load.load(path)
    torch.testing.assert_close(encoder(X).pooled, vector(raw), atol=1e-6, rtol=1e-5)
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_weights_of_a_backbone_are_those_of_a_training_file(tmp_path):
    raw, averaged = model_of(seed=0), model_of(seed=1)
    path = training_file(tmp_path / "model_best.pth.tar", raw, averaged)
    backbone = Backbone("vit_tiny_patch16_224", weights=path, **OPTIONS)
    assert torch.equal(backbone.pos_embed, averaged.pos_embed)


@pytest.mark.parametrize(
    "name,options",
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
        ("vit_base_patch16_reg4_gap_256", {}),
        ("eva02_tiny_patch14_224", {}),
    ],
)
def test_a_model_is_pooled_as_timm_pools_it(tmp_path, name, options):
    """Without a trained class token, the class token's vector would be a wrong one."""
    model = model_of(name, **options)
    timm.models.save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    wanted = vector(model)
    torch.testing.assert_close(load.load(tmp_path / "folder")(X).pooled, wanted, atol=1e-5, rtol=1e-5)


def test_another_patch_than_the_models_is_refused(tmp_path):
    """timm would resample the patches, and the features would be others."""
    model = timm.create_model("vit_tiny_patch16_224", patch_size=8, img_size=32, num_classes=0)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    options = {"layout": "timm", "name": "vit_tiny_patch16_224", "image_size": 32}
    with pytest.raises(UserError, match="patches of 8 x 8 pixels and vit_tiny_patch16_224 has 16 x 16"):
        load.load(tmp_path / "x.safetensors", **options)
    loaded = load.load(tmp_path / "x.safetensors", patch_size=8, **options)(X).pooled
    with torch.no_grad():
        torch.testing.assert_close(loaded, model.eval()(X), atol=1e-5, rtol=1e-5)


def test_a_timm_name_is_read_from_the_cache_alone(tmp_path, monkeypatch, capfd):
    model = timm.create_model("test_vit", num_classes=7).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repository, file: asked.append((repository, file)) or str(tmp_path / "model.safetensors"),
    )
    encoder = maskwise.load("timm:test_vit.r160_in1k")
    images = torch.randn(2, 3, 160, 160)
    model.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images).pooled, model(images), atol=1e-5, rtol=1e-5)
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]
    assert "classifier and tokens of pretraining 2" in capfd.readouterr().err
    maskwise.export("timm:test_vit.r160_in1k", tmp_path / "exported", say=None)
    torch.testing.assert_close(load.load(tmp_path / "exported")(images).pooled, encoder(images).pooled)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="not in the local cache.*; hub:timm/test_vit.r160_in1k downloads them"):
        maskwise.load("timm:test_vit.r160_in1k")
    with pytest.raises(UserError, match="timm has no model 'test_vti'"):
        maskwise.load("timm:test_vti")
