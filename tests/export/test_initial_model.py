"""Continuing from a model: what is loaded, what is refused, head warm-up, exact resume, two ranks."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import maskwise
from maskwise import build
from maskwise.engine.run_log import read_metrics
from maskwise.engine.trainer import Trainer
from maskwise.errors import UserError
from maskwise.export import initial_model, load
from maskwise.export.convert import convert
from support import pair
from support.research_files import dinov2, head, network, prefixed, simpool, training_file, vit
from support.run_contents import tensors, untimed_lines

IBOT = (
    "backbone.embed_dim=64",
    "backbone.num_heads=1",
    "head.prototypes=12",
    "head.hidden=16",
    "head.bottleneck=8",
    "data.count=16",
    "train.batch_size=4",
    "teacher.warmup_temp_epochs=0",
    "evaluate.knn_every=0",
    "evaluate.pictures_every=0",
    "train.save_every=2",
)


def recipe(path, *overrides):
    return maskwise.read_recipe("configs/debug/tiny.yaml", *IBOT, f"method.start_from={path}", *overrides)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Training files of iBOT and of DINO (one network, no head), small, with other weights in student and teacher."""
    folder = tmp_path_factory.mktemp("start")
    torch.save(training_file("ibot"), folder / "ibot.pth")
    torch.manual_seed(1)
    torch.save(vit(), folder / "backbone.pth")
    return folder


def test_student_teacher_heads_and_centers_are_loaded(files):
    content = training_file("ibot")
    model = build.trainer(recipe(files / "ibot.pth"), images=16).method
    for role, front in (("student", "module."), ("teacher", "")):
        network = getattr(model, role)
        assert torch.equal(network.encoder.backbone.pos_embed, content[role][f"{front}backbone.pos_embed"])
        assert torch.equal(network.head.last_layer.weight_v, content[role][f"{front}head.last_layer.weight_v"])
    assert torch.equal(model.student.encoder.backbone.mask_token, content["student"]["module.backbone.masked_embed"])
    assert torch.equal(model.center, content["ibot_loss"]["center"][0]) and torch.equal(
        model.patch_center, content["ibot_loss"]["center2"][0, 0]
    )
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval().teacher.encoder(x).pooled, load.load(files / "ibot.pth", num_heads=1)(x).pooled)


def test_a_single_network_is_loaded_into_both(files):
    trainer = build.trainer(recipe(files / "backbone.pth"), images=16)
    student, teacher = trainer.method.student, trainer.method.teacher
    own = torch.load(files / "backbone.pth", weights_only=True)
    assert torch.equal(student.encoder.backbone.pos_embed, own["pos_embed"]) and torch.equal(
        teacher.encoder.backbone.pos_embed, own["pos_embed"]
    )
    for ours, theirs in zip(student.head.parameters(), teacher.head.parameters()):
        assert torch.equal(ours, theirs)
    assert trainer.freeze_steps == round(0.2 * 2 * 4), "a fresh head warms up for a fifth of a short run"
    assert build.trainer(recipe(files / "ibot.pth"), images=16).freeze_steps == 0, "a kept head needs no warm-up"


def test_a_teacher_alone_is_loaded_into_the_student(files, tmp_path):
    content = training_file("ibot")
    torch.save({"teacher": content["teacher"]}, tmp_path / "teacher.pth")
    model = build.trainer(recipe(tmp_path / "teacher.pth"), images=16).method
    assert torch.equal(model.student.head.last_layer.weight_v, content["teacher"]["head.last_layer.weight_v"])
    assert torch.equal(model.student.encoder.backbone.mask_token, torch.zeros(1, 64)), (
        "the mask token starts at zero, as always"
    )


def test_only_the_head_is_trained_in_its_warmup(files):
    trainer = build.trainer(
        recipe(files / "backbone.pth", "method.head_warmup_epochs=1", "optimizer.freeze_last_layer=0"), images=16
    )
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert all(id(parameter) in held for parameter in trainer.method.parameters() if parameter.requires_grad), (
        "no group has lost a parameter"
    )
    assert trainer.freeze_steps == 4
    trainer.schedules = dataclasses.replace(trainer.schedules, lr=lambda step: 1e-3)
    global_crops, local_crops = torch.randn(8, 3, 32, 32), torch.randn(8, 3, 16, 16)
    for step in range(5):
        before = {name: parameter.detach().clone() for name, parameter in trainer.method.student.named_parameters()}
        trainer.step(global_crops, local_crops)
        moved = {
            name
            for name, parameter in trainer.method.student.named_parameters()
            if not torch.equal(parameter, before[name])
        }
        if step < 4:
            assert moved == {name for name in before if name.startswith("head.")}
            encoders = (trainer.method.student.encoder, trainer.method.teacher.encoder)
            assert torch.equal(
                encoders[0].backbone.blocks[0].attn.qkv.weight, encoders[1].backbone.blocks[0].attn.qkv.weight
            )
        else:
            assert {
                "encoder.norm.weight",
                "encoder.backbone.pos_embed",
                "encoder.backbone.blocks.1.mlp.fc2.weight",
            } <= moved


def test_a_fresh_pooling_warms_up_with_the_head(files, tmp_path):
    """From a class token to SimPool: token and position are left out, the fresh pooling is trained from step 0."""
    options = ("pooling=simpool", "method.head_warmup_epochs=1", "optimizer.freeze_last_layer=0")
    trainer = build.trainer(recipe(files / "ibot.pth", *options), images=16)
    backbone = trainer.method.student.encoder.backbone
    assert backbone.cls_token is None and torch.equal(
        backbone.pos_embed, training_file("ibot")["student"]["module.backbone.pos_embed"][:, 1:]
    )
    trainer.schedules = dataclasses.replace(trainer.schedules, lr=lambda step: 1e-3)
    before = {name: parameter.detach().clone() for name, parameter in trainer.method.student.named_parameters()}
    trainer.step(torch.randn(8, 3, 32, 32), torch.randn(8, 3, 16, 16))
    trainer.step(torch.randn(8, 3, 32, 32), torch.randn(8, 3, 16, 16))
    moved = {
        name.partition(".")[0] + "." + name.split(".")[1]
        for name, value in trainer.method.student.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert (
        "encoder.pooling" in moved
        and "encoder.backbone" not in moved
        and any(name.startswith("head.") for name in moved)
    )


@pytest.mark.parametrize("at", [1, 4])
def test_resume_is_exact_across_the_warmup_without_the_file(files, tmp_path, monkeypatch, at):
    made = tmp_path / "start.pth"
    made.write_bytes((files / "backbone.pth").read_bytes())
    config = recipe(made, "method.head_warmup_epochs=0.75")
    assert maskwise.train(config, out=tmp_path / "whole", quiet=True)["status"] == "complete"
    step = Trainer.step

    def interrupted(trainer, *arguments, **options):
        if trainer.step_index == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert maskwise.train(config, out=tmp_path / "run", quiet=True)["status"] == "preempted"
    made.unlink()
    torch.manual_seed(99)
    assert maskwise.train(config, out=tmp_path / "run", quiet=True)["status"] == "complete"
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "run")
    assert whole.keys() == resumed.keys()
    assert not [key for key in whole if not torch.equal(whole[key], resumed[key])]
    assert untimed_lines(tmp_path / "whole") == untimed_lines(tmp_path / "run")


def test_run_json_records_the_loaded_keys(files, tmp_path, capfd):
    import hashlib

    maskwise.train(recipe(files / "ibot.pth", "train.epochs=1"), out=tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())["start"]
    assert about["sha256"] == hashlib.sha256((files / "ibot.pth").read_bytes()).hexdigest() and about["file"] == str(
        files / "ibot.pth"
    )
    assert (
        about["head"] == "kept"
        and about["missing"] == []
        and about["matched"]["student"] == 31
        and about["matched"]["centers"] == 2
    )
    assert {"optimizer", "epoch", "args", "fp16_scaler"} == set(about["unused"]["other entries of the file"])
    output = capfd.readouterr().err
    assert "tensors matched" in output and "missing: none" in output and "projection head: kept" in output


def test_the_first_report_is_the_start_models_own(files, tmp_path):
    options = (
        "evaluate.knn_every=1",
        "evaluate.k=[3]",
        "train.epochs=1",
        "evaluate.limit_bank=null",
        "train.precision=fp32",
    )
    config = recipe(files / "ibot.pth", *options)
    maskwise.train(config, out=tmp_path / "run", quiet=True)
    first = next(line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "report" in line)
    encoder = load.load(files / "ibot.pth", crop_pct=config.evaluate.crop_pct, num_heads=1)
    own = maskwise.evaluate("knn", encoder, train=build.dataset(config), test=build.dataset(config, "test"), k=(3,))
    assert first["step"] == 0 and first["numbers"] == own.numbers


def test_statistics_and_position_table_are_the_start_models(tmp_path):
    """Input statistics and a larger position table are kept; the table is resampled for each crop."""
    torch.manual_seed(0)
    torch.save(vit(grid=6), tmp_path / "large.pth")
    convert(
        tmp_path / "large.pth",
        tmp_path / "large",
        mean=[0.5, 0.5, 0.5],
        std=[0.5, 0.5, 0.5],
        position="size",
        num_heads=1,
    )
    model = build.trainer(recipe(tmp_path / "large"), images=16).method
    for role in (model.student, model.teacher):
        assert role.encoder.mean == role.encoder.std == (0.5, 0.5, 0.5)
        assert role.encoder.backbone.pos_embed.shape == (1, 37, 64) and role.encoder.backbone.position == "size"
    with pytest.raises(UserError, match="position table of 48 x 48"):
        build.trainer(recipe(tmp_path / "large", "backbone.image_size=32"), images=16)


def refusals(files, tmp_path):
    torch.manual_seed(0)
    torch.save(network(vit(), head(prototypes=20), "module."), tmp_path / "other_head.pth")
    torch.save(vit(cls=False) | prefixed(simpool(), "simpool."), tmp_path / "simpool.pth")
    torch.save({"encoder": vit()}, tmp_path / "wrong_key.pth")
    ibot = files / "ibot.pth"
    yield (ibot, "backbone.embed_dim=48", "backbone.num_heads=3"), "embed_dim 64 there and 48 here"
    yield (ibot, "backbone.depth=3"), "set backbone.depth=2"
    yield (ibot, "backbone.patch_size=16"), "patch_size 8 there and 16 here"
    yield (ibot, "head.prototypes=20"), "set head.prototypes=12 to keep it, or method.start_head=fresh"
    yield (tmp_path / "other_head.pth",), "prototypes 20 there and 12 here"
    yield (tmp_path / "simpool.pth",), "no class token"
    yield (tmp_path / "wrong_key.pth",), "no teacher, student or state_dict"
    yield (tmp_path / "nowhere.pth",), "does not exist"
    yield ("vit_tiny_patch16_224.augreg_in21k",), "not in the local cache"
    yield ("timm:vit_tiny_patch16_224.unknown_tag",), "no pretrained weights"


def test_a_mismatch_is_refused_with_the_reason(files, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for (path, *overrides), words in refusals(files, tmp_path):
        with pytest.raises(UserError) as caught:
            build.trainer(recipe(path, *overrides), images=16)
        assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    fresh = build.trainer(recipe(tmp_path / "other_head.pth", "method.start_head=fresh"), images=16)
    assert fresh.freeze_steps > 0


def test_conflicting_recipes_are_refused(files):
    tiny = ("configs/debug/tiny.yaml",)
    for overrides, words in (
        (("method.head_warmup_epochs=1",), "nothing to continue from"),
        (("method.start_head=fresh",), "nothing to continue from"),
        ((f"method.start_from={files / 'ibot.pth'}", "method.head_warmup_epochs=2"), "leaves nothing of the run"),
        ((f"method.start_from={files / 'ibot.pth'}", "backbone.weights=x.pth"), "leave backbone.weights out"),
    ):
        with pytest.raises(UserError, match=words):
            maskwise.read_recipe(*tiny, *overrides)


def test_a_timm_name_comes_from_the_cache_and_a_hub_name_from_the_hub(tmp_path, monkeypatch):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    cached = tmp_path / "model.safetensors"
    from safetensors.torch import save_file

    save_file(model.state_dict(), cached)
    requests = []
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repository, file: requests.append((repository, file)) or str(cached),
    )
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no network\nat all"))
    )
    initial = initial_model.InitialModel.open("timm:vit_tiny_patch16_224.augreg_in21k", backbone="")
    assert requests == [("timm/vit_tiny_patch16_224.augreg_in21k", "model.safetensors")]
    assert initial.spec["mean"] == [0.5, 0.5, 0.5], "the statistics of the tag's training"
    assert sorted(initial.source.unused["classifier and tokens of pretraining"]) == ["head.bias", "head.weight"]
    with pytest.raises(UserError, match=r"me/name is no local path, and cannot be downloaded from the Hub .no network"):
        initial_model.InitialModel.open("hub:me/name", backbone="")


def test_a_changed_start_file_is_refused_before_the_first_checkpoint(files, tmp_path):
    made = tmp_path / "start.pth"
    made.write_bytes((files / "backbone.pth").read_bytes())
    config = recipe(made)
    known = {"start": {"sha256": "0" * 64}}
    with pytest.raises(UserError, match="has changed since"):
        build.initial_model(config, tmp_path, known)


@pytest.mark.parametrize("name", ["ibot_vits16", "dino_vits16", "fresh_head_vits16", "dinov2_vits14"])
def test_the_recipes_continue_in_miniature(tmp_path, name):
    """Each recipe of configs/continue with a small file of its kind: kept or fresh head, and one step."""
    sizes = (
        "backbone.embed_dim=64",
        "backbone.depth=2",
        "backbone.num_heads=1",
        "backbone.patch_size=8",
        "head.hidden=16",
        "head.bottleneck=8",
    )
    crops = (
        "crops.global_size=32",
        "crops.local_size=16",
        "head.prototypes=12",
        "data=shapes",
        "data.count=16",
        "data.size=40",
        "train.batch_size=4",
    )
    if name == "dinov2_vits14":
        torch.manual_seed(0)
        content = dinov2()
    else:
        content = (
            training_file("dino")
            if name == "dino_vits16"
            else training_file("ibot")
            if name == "ibot_vits16"
            else vit()
        )
    torch.save(content, tmp_path / "file.pth")
    config = maskwise.read_recipe(
        f"continue/{name}",
        *sizes,
        *crops,
        f"method.start_from={tmp_path / 'file.pth'}",
        "evaluate.knn_every=0",
        "optimizer.min_lr=0",
    )
    trainer = build.trainer(config, images=16, precision="fp32")
    assert trainer.freeze_steps == (0 if name in ("ibot_vits16", "dino_vits16") else 8)
    assert bool(trainer.step(torch.randn(8, 3, 32, 32), torch.randn(40, 3, 16, 16))["ok"])


@pytest.mark.slow
def test_two_ranks_start_and_warm_up(files, tmp_path):
    """Two ranks load the file and train through the head warm-up with the losses of one process."""
    words = [
        *IBOT,
        f"method.start_from={files / 'backbone.pth'}",
        "method.head_warmup_epochs=1",
        "train.epochs=3",
        "train.steps=8",
        "train.save_every=4",
    ]
    ends = pair.end(pair.start("-m", "maskwise", "train", "debug/tiny", "--out", tmp_path / "run", *words), 600)
    assert "encoder frozen for the first 4 of 8 steps (head warm-up)" in ends[0][1] and not ends[1][1]
    maskwise.train(maskwise.read_recipe("debug/tiny", *words), out=tmp_path / "alone", quiet=True)
    losses = [[line["loss"] for line in untimed_lines(tmp_path / name) if "loss" in line] for name in ("run", "alone")]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    frozen = load_file(tmp_path / "run" / "checkpoints" / "step_00000004" / "model.safetensors")
    own = torch.load(files / "backbone.pth", weights_only=True)
    for role in ("student", "teacher"):
        key = f"{role}.encoder.backbone.pos_embed"
        assert torch.equal(frozen[key], own["pos_embed"])
        assert not torch.equal(tensors(tmp_path / "run")[f"model/{key}"], own["pos_embed"])


def test_a_classifier_of_the_start_file_is_reported(tmp_path):
    """Every key of the file is matched or named: a supervised classifier is left out."""
    torch.manual_seed(0)
    tensors = {**vit(), "head.weight": torch.zeros(3, 64), "head.bias": torch.zeros(3)}
    torch.save(tensors, tmp_path / "supervised.pth")
    config = recipe(tmp_path / "supervised.pth")
    start = build.initial_model(config)
    build.trainer(config, images=16, start=start)
    assert start.matching.unused == {"classifier": ["head.weight", "head.bias"]}
    assert start.matching.matched["teacher"] == len(tensors) - 2


def test_heads_of_a_published_size_are_known_and_others_are_the_recipes(tmp_path):
    """A recipe that says another number keeps it; one that says nothing gets that of the published network."""
    with torch.device("meta"):
        tensors = vit(dim=384, depth=12, patch=16, grid=2)
    torch.save({key: torch.ones(value.shape) for key, value in tensors.items()}, tmp_path / "vits.pth")
    start = initial_model.InitialModel.open(str(tmp_path / "vits.pth"), backbone="vit_small_patch16_224")
    assert start.spec["backbone"]["num_heads"] == 6
    for said, heads in (({}, 6), ({"num_heads": 12}, 12)):
        own = maskwise.nn.Backbone("vit_small_patch16_224", image_size=32, **said)
        start = initial_model.InitialModel.open(str(tmp_path / "vits.pth"), backbone="vit_small_patch16_224")
        start._check_backbone(own)
        assert start.spec["backbone"]["num_heads"] == own.num_heads == heads
