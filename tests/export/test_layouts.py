"""Files in and out: run folders, exports, research files, and what is refused."""

import argparse
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from maskwise.export import folder as exported
from maskwise.export import layouts
from maskwise.functional.errors import UserError
from maskwise.nn import POOLINGS, Backbone, Encoder, ProjectionHead

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def build(pooling="cls", pool={}, **options):
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    return Encoder(Backbone("vit_tiny_patch16_224", **{**shape, **options}), POOLINGS[pooling](64, **pool)).eval()


def same(a, b):
    return torch.equal(a(X).pooled, b(X).pooled) and torch.equal(a(X).attention, b(X).attention)


def research_keys(encoder, prefix=""):
    """An encoder's tensors under the names of the DINO family."""
    named = {}
    for key, value in encoder.state_dict().items():
        key = key.removeprefix("backbone.").replace("pooling.", "simpool.").replace("mask_token", "masked_embed")
        named[prefix + key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = value.clone()
    return named


def research_file(path, student, teacher, **more):
    head = {f"head.{key}": value for key, value in ProjectionHead(64, 8, hidden=8, bottleneck=4).state_dict().items()}
    wrapped = {f"module.{key}": value for key, value in head.items()}
    content = {
        "student": {**research_keys(student, "module.backbone."), **wrapped},
        "teacher": {**research_keys(teacher, "backbone."), **head},
        "optimizer": {"param_groups": [{"lr": np.float64(1e-3)}], "state": {}},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", lr=5e-4, **more),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }
    torch.save(content, path)
    return path


def test_export_round_trip(tmp_path):
    encoder = build("simpool", {"gamma": 2.0, "beta": True}, drop_path=0.1, mask_token=True)
    encoder.crop_pct = 1.0
    exported.write(encoder, tmp_path / "out")
    back = layouts.load(tmp_path / "out")
    assert same(back, encoder) and back.crop_pct == 1.0 and not back.training
    exported.write(build(), tmp_path / "out")  # an earlier export is replaced
    assert same(layouts.load(tmp_path / "out"), build())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_spares_other_folders(tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(UserError, match="something other than an export"):
        exported.write(build(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        exported.write(build(), tmp_path / "file" / "inside")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "photo.jpg"]


def run_folder(folder):
    teacher, student = build(), build(mask_token=True, drop_path=0.1)
    torch.nn.init.normal_(student.norm.weight)
    place = folder / "checkpoints" / "step_00000012"
    place.mkdir(parents=True)
    tensors = {f"teacher.encoder.{key}": value for key, value in teacher.state_dict().items()}
    tensors |= {f"student.encoder.{key}": value for key, value in student.state_dict().items()}
    save_file({**tensors, "teacher.head.mlp.0.weight": torch.zeros(2), "center": torch.zeros(4)}, place / "model.safetensors")
    (place / "encoder.json").write_text(json.dumps(teacher.spec()))
    (folder / "checkpoints" / "last").write_text("step_00000012\n")
    return teacher, student


def test_run_folder(tmp_path):
    teacher, student = run_folder(tmp_path)
    assert same(layouts.load(tmp_path), teacher)
    assert same(layouts.load(tmp_path, weights="student"), student)
    assert same(layouts.load(tmp_path / "checkpoints" / "step_00000012"), teacher)
    moved = layouts.load(tmp_path, image_size=64, position="size", crop_pct=0.9)
    assert moved.transform.size == (64, 64) and moved.backbone.position == "size" and moved.crop_pct == 0.9


def test_run_without_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint yet"):
        layouts.load(tmp_path)


@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}], ids=str)
def test_training_files_of_the_dino_family(tmp_path, options):
    teacher, student = build(**options), build(mask_token=True, **options)
    torch.nn.init.normal_(student.backbone.mask_token)
    path = research_file(tmp_path / "checkpoint.pth", student, teacher)
    assert same(layouts.load(path), teacher)
    loaded = layouts.load(path, weights="student", layout="attmask")
    assert same(loaded, student)
    mask = torch.ones(2, 16, dtype=torch.bool)
    assert torch.equal(loaded(X, mask).pooled, student(X, mask).pooled)
    assert layouts.load(path, num_heads=4).backbone.num_heads == 4
    assert layouts.load(path).backbone.num_heads == 1  # width / 64


def test_teacher_with_ddp_prefix(tmp_path):
    content = {"teacher": research_keys(build(), "module.backbone."), "student": research_keys(build(), "module.backbone.")}
    torch.save(content, tmp_path / "bn.pth")
    assert same(layouts.load(tmp_path / "bn.pth"), build())


def test_backbone_only_files(tmp_path):
    torch.save(research_keys(build()), tmp_path / "flat.pth")
    torch.save({"state_dict": research_keys(build(), "backbone.")}, tmp_path / "nested.pth")
    save_file(research_keys(build()), tmp_path / "flat.safetensors")
    for name in ("flat.pth", "nested.pth", "flat.safetensors"):
        assert same(layouts.load(tmp_path / name), build()), name


@pytest.mark.parametrize("beta", [False, True])
def test_simpool_files(tmp_path, beta):
    encoder = build("simpool", {"gamma": 2.0, "min_scope": "batch", "beta": beta}, class_token=False, position="offset_always")
    path = research_file(tmp_path / "simpool.pth", encoder, encoder, gamma=2.0)
    assert same(layouts.load(path), encoder)
    torch.save(research_keys(encoder), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="does not say which gamma"):
        layouts.load(tmp_path / "bare.pth")
    assert same(layouts.load(tmp_path / "bare.pth", gamma=2.0), encoder)
    assert layouts.load(tmp_path / "bare.pth", gamma=None, min_scope="image").pooling.gamma is None


def test_simpool_table_of_the_first_release(tmp_path):
    encoder = build("simpool", {"gamma": 1.25, "min_scope": "batch"}, class_token=False, position="offset_always")
    state = research_keys(encoder)
    state["pos_embed"] = torch.cat([torch.full((1, 1, 64), 9.0), state["pos_embed"]], dim=1)
    torch.save(state, tmp_path / "old.pth")
    assert same(layouts.load(tmp_path / "old.pth", gamma=1.25), encoder)


def test_supervised_simpool_files(tmp_path):
    state = {key.replace("simpool.", "gp.pool."): value for key, value in research_keys(build("simpool", {"gamma": None}, class_token=False)).items()}
    torch.save({"state_dict": {**state, "head.weight": torch.zeros(3, 64)}}, tmp_path / "supervised.pth.tar")
    encoder = layouts.load(tmp_path / "supervised.pth.tar", gamma=None)
    assert encoder.norm_order == "before" and encoder.backbone.position == "offset"


def test_timm_files(tmp_path):
    import timm

    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3).state_dict(), tmp_path / "timm.safetensors")
    encoder = layouts.load(tmp_path / "timm.safetensors", layout="timm", name="vit_tiny_patch16_224", image_size=32)
    assert encoder(X).pooled.shape == (2, 192)
    with pytest.raises(UserError, match="which model it is of"):
        layouts.load(tmp_path / "timm.safetensors", layout="timm")


def refusals(tmp_path):
    whole = research_keys(build())
    cases = {
        "surplus": ({**whole, "extra.weight": torch.zeros(2)}, {}, "has unknown backbone.extra.weight"),
        "missing": ({k: v for k, v in whole.items() if k != "norm.bias"}, {}, "lacks norm.bias"),
        "wrong key": ({"encoder": whole}, {}, "no teacher, student or state_dict"),
        "no teacher": ({"student": whole}, {}, "holds no teacher; it has student"),
        "other network": ({"conv1.weight": torch.zeros(2)}, {}, "lacks patch_embed.proj.weight"),
        "no simpool": (whole, {"layout": "simpool"}, "no SimPool weights"),
        "no pooling": ({k: v if k != "pos_embed" else v[:, 1:] for k, v in whole.items() if k != "cls_token"}, {}, "nothing to pool with"),
        "odd table": ({k: v if k != "pos_embed" else v[:, :9] for k, v in whole.items()}, {}, "of no square grid"),
        "heads": (whole, {"num_heads": 5}, "does not divide"),
        "gamma": (whole, {"gamma": 2.0}, "belongs to the pooling simpool"),
        "override": (whole, {"depht": 2}, "load takes no depht"),
        "layout": (whole, {"layout": "moco"}, "choose one of dino"),
        "weights": (whole, {"weights": "both"}, "choose teacher or student"),
        "code": ({"teacher": whole, "hook": torch.nn.Linear(1, 1)}, {}, "more than tensors"),
        "list": ([1], {}, "not a dict"),
    }
    for name, (content, options, words) in cases.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        yield name, path, options, words
    yield "nowhere", tmp_path / "nowhere", {}, "does not exist"
    (tmp_path / "empty").mkdir()
    yield "empty", tmp_path / "empty", {}, "neither a run folder nor an exported one"


def test_what_is_refused_ends_in_one_line(tmp_path):
    for name, path, options, words in refusals(tmp_path):
        with pytest.raises(UserError) as caught:
            layouts.load(path, **options)
        text = str(caught.value)
        assert words in text and "\n" not in text, (name, text)
