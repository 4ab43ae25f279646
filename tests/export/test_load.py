"""Loading: run folders, exports, research files, and refusals."""

import argparse

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from maskwise.engine.checkpoint import Checkpoints
from maskwise.errors import UserError
from maskwise.export import load, write
from maskwise.nn import POOLINGS, Backbone, Encoder, ProjectionHead

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def build(pooling="cls", pool=None, **options):
    pool = pool or {}
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    return Encoder(Backbone("vit_tiny_patch16_224", **{**shape, **options}), POOLINGS[pooling](64, **pool)).eval()


def same(a, b):
    return torch.equal(a(X).pooled, b(X).pooled) and torch.equal(a(X).attention, b(X).attention)


def research_keys(encoder, prefix=""):
    """Return an encoder's tensors under the DINO family's names."""
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
    write.write(encoder, tmp_path / "out")
    back = load.load(tmp_path / "out")
    assert same(back, encoder) and back.crop_pct == 1.0 and not back.training
    write.write(build(), tmp_path / "out")  # an earlier export is replaced
    assert same(load.load(tmp_path / "out"), build())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_does_not_replace_other_folders(tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(UserError, match="something other than an export"):
        write.write(build(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        write.write(build(), tmp_path / "file" / "inside")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "photo.jpg"]


def run_folder(folder, step=12):
    teacher, student = build(), build(mask_token=True, drop_path=0.1)
    torch.nn.init.normal_(student.norm.weight)
    tensors = {f"teacher.encoder.{key}": value for key, value in teacher.state_dict().items()}
    tensors |= {f"student.encoder.{key}": value for key, value in student.state_dict().items()}
    tensors |= {"teacher.head.mlp.0.weight": torch.zeros(2), "center": torch.zeros(4)}
    Checkpoints(folder).save(step, tensors, {}, encoder_spec=teacher.spec())
    return teacher, student


def test_run_folder(tmp_path):
    teacher, student = run_folder(tmp_path)
    assert same(load.load(tmp_path), teacher)
    assert same(load.load(tmp_path, weights="student"), student)
    assert same(load.load(tmp_path / "checkpoints" / "step_00000012"), teacher)
    overridden = load.load(tmp_path, image_size=64, position="size", crop_pct=0.9)
    assert (
        overridden.transform.size == (64, 64) and overridden.backbone.position == "size" and overridden.crop_pct == 0.9
    )


def test_run_without_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint yet"):
        load.load(tmp_path)


@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}], ids=str)
def test_training_files_of_the_dino_family(tmp_path, options):
    teacher, student = build(**options), build(mask_token=True, **options)
    torch.nn.init.normal_(student.backbone.mask_token)
    path = research_file(tmp_path / "checkpoint.pth", student, teacher)
    assert same(load.load(path, num_heads=1), teacher)
    loaded = load.load(path, weights="student", layout="attmask", num_heads=1)
    assert same(loaded, student)
    mask = torch.ones(2, 16, dtype=torch.bool)
    assert torch.equal(loaded(X, mask).pooled, student(X, mask).pooled)
    assert load.load(path, num_heads=4).backbone.num_heads == 4
    with pytest.raises(UserError, match=r"width 64, depth 2.* give num_heads="):
        load.load(path)


def test_teacher_with_ddp_prefix(tmp_path):
    content = {
        "teacher": research_keys(build(), "module.backbone."),
        "student": research_keys(build(), "module.backbone."),
    }
    torch.save(content, tmp_path / "bn.pth")
    assert same(load.load(tmp_path / "bn.pth", num_heads=1), build())


def test_backbone_only_files(tmp_path):
    torch.save(research_keys(build()), tmp_path / "flat.pth")
    torch.save({"state_dict": research_keys(build(), "backbone.")}, tmp_path / "nested.pth")
    save_file(research_keys(build()), tmp_path / "flat.safetensors")
    for name in ("flat.pth", "nested.pth", "flat.safetensors"):
        assert same(load.load(tmp_path / name, num_heads=1), build()), name


@pytest.mark.parametrize("beta", [False, True])
def test_simpool_files(tmp_path, beta):
    encoder = build(
        "simpool", {"gamma": 2.0, "min_scope": "batch", "beta": beta}, class_token=False, position="offset_always"
    )
    path = research_file(tmp_path / "simpool.pth", encoder, encoder, gamma=2.0)
    assert same(load.load(path, num_heads=1), encoder)
    torch.save(research_keys(encoder), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="does not say which gamma"):
        load.load(tmp_path / "bare.pth")
    assert same(load.load(tmp_path / "bare.pth", gamma=2.0, num_heads=1), encoder)
    assert load.load(tmp_path / "bare.pth", gamma=None, min_scope="image", num_heads=1).pooling.gamma is None


def test_simpool_table_of_the_first_release(tmp_path):
    encoder = build("simpool", {"gamma": 1.25, "min_scope": "batch"}, class_token=False, position="offset_always")
    state = research_keys(encoder)
    state["pos_embed"] = torch.cat([torch.full((1, 1, 64), 9.0), state["pos_embed"]], dim=1)
    torch.save(state, tmp_path / "old.pth")
    assert same(load.load(tmp_path / "old.pth", gamma=1.25, num_heads=1), encoder)


def test_supervised_simpool_files(tmp_path):
    state = {
        key.replace("simpool.", "gp.pool."): value
        for key, value in research_keys(build("simpool", {"gamma": None}, class_token=False)).items()
    }
    torch.save({"state_dict": {**state, "head.weight": torch.zeros(3, 64)}}, tmp_path / "supervised.pth.tar")
    encoder = load.load(tmp_path / "supervised.pth.tar", gamma=None, num_heads=1)
    assert encoder.norm_order == "before" and encoder.backbone.position == "offset"


def test_timm_files(tmp_path):
    import timm

    torch.manual_seed(0)
    save_file(
        timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3).state_dict(),
        tmp_path / "timm.safetensors",
    )
    encoder = load.load(tmp_path / "timm.safetensors", layout="timm", name="vit_tiny_patch16_224", image_size=32)
    assert encoder(X).pooled.shape == (2, 192)
    with pytest.raises(UserError, match="which model it is of"):
        load.load(tmp_path / "timm.safetensors", layout="timm")


def refusals(tmp_path):
    whole = research_keys(build())
    cases = {
        "surplus": ({**whole, "extra.weight": torch.zeros(2)}, {}, "has unknown backbone.extra.weight"),
        "missing": ({k: v for k, v in whole.items() if k != "norm.bias"}, {}, "lacks norm.bias"),
        "wrong key": ({"encoder": whole}, {}, "no teacher, student or state_dict"),
        "no teacher": ({"student": whole}, {}, "holds no teacher; it has student"),
        "other network": ({"conv1.weight": torch.zeros(2)}, {}, "lacks patch_embed.proj.weight"),
        "no simpool": (whole, {"layout": "simpool"}, "no SimPool weights"),
        "no pooling": (
            {k: v if k != "pos_embed" else v[:, 1:] for k, v in whole.items() if k != "cls_token"},
            {},
            "nothing to pool with",
        ),
        "odd table": ({k: v if k != "pos_embed" else v[:, :9] for k, v in whole.items()}, {}, "not a square grid"),
        "heads": (whole, {"num_heads": 5}, "does not divide"),
        "gamma": (whole, {"gamma": 2.0, "num_heads": 1}, "belongs to the pooling simpool"),
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


def test_refusals_are_one_line(tmp_path):
    for name, path, options, words in refusals(tmp_path):
        with pytest.raises(UserError) as caught:
            load.load(path, **options)
        text = str(caught.value)
        assert words in text and "\n" not in text, (name, text)


def test_overrides_without_effect_are_refused(tmp_path):
    """A run stores its network: num_heads=1 would load the same encoder without a word."""
    run_folder(tmp_path / "run")
    write.write(build(), tmp_path / "export")
    torch.save(research_keys(build()), tmp_path / "dino.pth")
    resnet = {f"layer{i}.0.conv1.weight": torch.zeros(4, 4, 3, 3) for i in (1, 2)} | {
        "conv1.weight": torch.zeros(4, 3, 7, 7)
    }
    resnet |= {f"layer{i}.0.conv2.weight": torch.zeros(4, 4, 3, 3) for i in (1, 2)}
    torch.save(resnet, tmp_path / "resnet.pth")
    surplus = {"name": "vit_small_patch16_224", "num_heads": 1, "patch_size": 8, "class_token": True, "alias": "a=b"}
    for key, value in {**surplus, "pooling_heads": 2}.items():
        for path in (tmp_path / "run", tmp_path / "export", tmp_path / "export" / "backbone.safetensors"):
            with pytest.raises(UserError, match=f"{key} has no effect on it: leave {key} out"):
                load.load(path, **{key: value})
    for key in ("name", "patch_size", "class_token"):
        with pytest.raises(UserError, match=f"{key} has no effect on it"):
            load.load(tmp_path / "dino.pth", num_heads=1, **{key: surplus[key]})
    with pytest.raises(UserError, match="pooling_heads has no effect on it"):
        load.load(tmp_path / "dino.pth", num_heads=1, pooling_heads=2)
    with pytest.raises(UserError, match="num_heads has no effect on it"):
        load.load(tmp_path / "resnet.pth", num_heads=1)
    with pytest.raises(UserError, match=r"mean=\[0.5\]: the encoder takes 3 channels"):
        load.load(tmp_path / "run", mean=[0.5])


def test_the_report_names_a_classifier_that_is_left_out(tmp_path, capfd):
    """torchvision's supervised ResNet: fc.weight and fc.bias are not read."""
    import timm

    model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=5).eval()
    torch.save(model.state_dict(), tmp_path / "supervised.pth")
    encoder = load.load(tmp_path / "supervised.pth")
    line = capfd.readouterr().err.strip()
    assert line.endswith("missing: none; unused: classifier 2")
    assert f"{len(model.state_dict()) - 2} tensors matched" in line
    model.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(encoder(X).pooled, model(X), atol=1e-6, rtol=1e-5)


def test_a_published_size_has_its_own_heads_and_another_asks(tmp_path):
    """MAE's ViT-H/14 has 16 heads where its width divides into 20 of 64; an unknown width of 48 is not one head."""
    from maskwise.export.formats import dino_family
    from support.research_files import vit

    def spec(width, depth, patch=14, project=""):
        with torch.device("meta"):
            tensors = vit(dim=width, depth=depth, patch=patch, grid=2)
        tensors["pos_embed"] = torch.ones(1, 5, width)
        return dino_family.transformer_spec(tensors, {}, {}, "after", {}, tmp_path, project)["backbone"]["num_heads"]

    assert spec(1280, 32) == 16 and spec(1408, 40) == 16 and spec(384, 12) == 6
    assert spec(48, 12) is None and spec(1280, 12) is None
    torch.save(vit(dim=48), tmp_path / "ibot.pth")
    with pytest.raises(UserError, match=r"width 48, depth 2.* give num_heads=\.\.\., as it was trained"):
        load.load(tmp_path / "ibot.pth")
    assert load.load(tmp_path / "ibot.pth", num_heads=3).backbone.num_heads == 3
