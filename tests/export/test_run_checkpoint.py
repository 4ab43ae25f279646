"""The checkpoint that a model is read from: checksums compared, damage and lost pointers as in training."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.test_load import build
from maskwise.engine.checkpoint import Checkpoints, read
from maskwise.errors import UserError
from maskwise.export import load, run_checkpoint
from maskwise.export.initial_model import InitialModel
from maskwise.export.release import ExportOptions, provenance_of, training_tensors
from maskwise.export.saved_head import load_head
from maskwise.nn import ProjectionHead

STEPS = ("step_00000004", "step_00000012")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with two checkpoints, whose encoders and heads differ by a factor."""
    monkeypatch.setattr(run_checkpoint, "_printed", set())
    encoder, head = build(), ProjectionHead(64, 8, hidden=8, bottleneck=4)
    for step in (4, 12):
        tensors = {f"teacher.encoder.{key}": value * step for key, value in encoder.state_dict().items()}
        tensors |= {f"teacher.head.{key}": value * step for key, value in head.state_dict().items()}
        Checkpoints(tmp_path / "run").save(step, tensors, {}, encoder_spec=encoder.spec())
    (tmp_path / "run" / "recipe.yaml").write_text("seed: 0\n")
    return tmp_path / "run"


def zero_a_tensor(checkpoint):
    """Zero one tensor in the model's file; its size and all other bytes stay."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    name = "teacher.encoder.backbone.blocks.0.attn.qkv.weight"
    place = file.read_bytes().index(tensors[name].numpy().tobytes())
    with open(file, "r+b") as opened:
        opened.seek(place)
        opened.write(bytes(tensors[name].nbytes))
    assert not load_file(file)[name].any()


def bias(encoder):
    """A weight that differs between the checkpoints."""
    return encoder.norm.weight[0].item()


def test_a_zeroed_tensor_is_noticed_and_the_newest_sound_checkpoint_is_read(run, capsys):
    assert bias(load.load(run)) == 12 and capsys.readouterr().err == ""
    zero_a_tensor(run / "checkpoints" / STEPS[1])
    assert bias(load.load(run)) == 4
    assert capsys.readouterr().err == (
        "checkpoint damaged (step_00000012: the checksum of model.safetensors is wrong): using step_00000004 instead\n"
    )
    zero_a_tensor(run / "checkpoints" / STEPS[0])
    with pytest.raises(UserError, match="no checkpoint under .* is sound") as caught:
        load.load(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("last", "fault"),
    [
        (None, "`last` is missing or unreadable"),
        ("step_00000099\n", "`last` names 'step_00000099', which does not exist"),
    ],
)
def test_a_lost_pointer_is_handled_as_by_training(run, capsys, last, fault):
    pointer = run / "checkpoints" / "last"
    pointer.unlink() if last is None else pointer.write_text(last)
    assert bias(load.load(run)) == 12
    assert capsys.readouterr().err == f"checkpoint damaged ({fault}): using step_00000012 instead\n"
    lines = []
    assert Checkpoints(run, print_line=lines.append).load_last().step == 12
    assert lines == [f"checkpoint damaged ({fault}): using step_00000012 instead"]


def test_every_reader_of_a_run_follows_the_rule_and_prints_it_once(run, capsys):
    zero_a_tensor(run / "checkpoints" / STEPS[1])
    expected = read(run / "checkpoints" / STEPS[0]).tensors["teacher.head.mlp.0.weight"]
    assert torch.equal(load_head(run).state_dict()["mlp.0.weight"], expected)
    assert torch.equal(training_tensors(run, "teacher")["teacher.head.mlp.0.weight"], expected)
    assert provenance_of(run, run / "out", ExportOptions()).step == 4
    initial = InitialModel.open(str(run), backbone="vit_tiny_patch16_224")
    assert initial.source.networks["teacher"]["norm.weight"][0] == 4
    assert capsys.readouterr().err.count("using step_00000004 instead") == 1


@pytest.mark.parametrize(
    "place", ["", "checkpoints", f"checkpoints/{STEPS[0]}", f"checkpoints/{STEPS[0]}/model.safetensors"]
)
def test_each_path_into_a_run_is_recognized(run, capsys, place):
    step = 4 if "step" in place else 12
    assert bias(load.load(run / place)) == step
    assert torch.equal(
        load_head(run / place)(torch.ones(1, 64)),
        load_head(run / "checkpoints" / f"step_{step:08d}")(torch.ones(1, 64)),
    )
    initial = InitialModel.open(str(run / place), backbone="vit_small_patch16_224", gamma=2.0)
    assert initial.source.layout == "run" and initial.source.networks["teacher"]["norm.weight"][0] == step
    provenance = provenance_of(run / place, run / "out", ExportOptions())
    assert (provenance.step, provenance.name) == (step, "run") and "seed: 0" in provenance.recipe
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("place", [STEPS[1], f"{STEPS[1]}/model.safetensors"])
def test_one_damaged_checkpoint_is_refused(run, place):
    checkpoint = run / "checkpoints" / STEPS[1]
    zero_a_tensor(checkpoint)
    with pytest.raises(UserError) as caught:
        load.load(run / "checkpoints" / place)
    assert str(caught.value) == (
        f"{checkpoint} is damaged (the checksum of model.safetensors is wrong): give the run folder, whose newest "
        "sound checkpoint is used, or restore it from a copy"
    )


def test_a_checkpoint_copied_without_its_checksums_is_read(run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("model.safetensors", "encoder.json"):
        shutil.copy(run / "checkpoints" / STEPS[0] / name, copy)
    assert bias(load.load(copy)) == 4


def test_a_model_file_alone_is_named(run, tmp_path):
    file = tmp_path / "weights.safetensors"
    shutil.copy(run / "checkpoints" / STEPS[0] / "model.safetensors", file)
    with pytest.raises(UserError) as caught:
        load.load(file)
    assert str(caught.value) == (
        f"{file} is the model of a maskwise checkpoint without its encoder.json, which describes the network: give the "
        "run folder, or RUN/checkpoints/step_N"
    )


def test_a_checkpoint_replaced_while_it_is_read_is_no_damage(run, capsys, monkeypatch):
    verified = run_checkpoint.verified_in_run

    def training_goes_on(directory):
        if directory.name == STEPS[1]:
            loaded = read(directory)
            Checkpoints(run, keep=1).save(16, loaded.tensors, {}, encoder_spec=build().spec())
            assert not directory.exists()
        return verified(directory)

    monkeypatch.setattr(run_checkpoint, "verified_in_run", training_goes_on)
    assert run_checkpoint.find(run).step == 16
    assert capsys.readouterr().err == ""


def test_checksums_are_compared_once_for_an_unchanged_file(run, monkeypatch):
    run_checkpoint.find(run)
    counted = []
    verify = run_checkpoint.verify
    monkeypatch.setattr(run_checkpoint, "verify", lambda *arguments: counted.append(arguments) or verify(*arguments))
    run_checkpoint.find(run), load.load(run), load_head(run)
    assert counted == []
    file = run / "checkpoints" / STEPS[1] / "model.safetensors"
    save_file({key: value * 2 for key, value in load_file(file).items()}, file)
    assert run_checkpoint.find(run).step == 4 and len(counted) == 2
