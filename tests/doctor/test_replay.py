"""`maskwise replay`: the batch that training saw, bit for bit, and the losses of its samples."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maskwise import build, cli
from maskwise.doctor.replay import RunSteps
from maskwise.doctor.replay_sheet import picture, text
from maskwise.engine.run_log import read_metrics
from maskwise.engine.trainer import Trainer
from maskwise.errors import UserError
from maskwise.methods.ibot import IBOT
from maskwise.recipe.reading import read_recipe

# 3 steps per epoch, checkpoints after steps 3 and 6
SMALL = ("data.count=24", "train.epochs=2", "train.log_every=1", "backbone.depth=1", "train.accumulate=2")
SMALL = (*SMALL, "evaluate.knn_every=0", "evaluate.pictures_every=0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, and for each of its steps the tensors that the trainer got, its losses, and the masks."""
    folder, seen, masks = tmp_path_factory.mktemp("replay") / "run", [], []
    step, teacher = Trainer.step, IBOT.teacher_forward

    def recorded(trainer, *tensors, sample_ids, **options):
        copies = [tensor.clone() for tensor in tensors]
        seen.append((*copies, sample_ids, step(trainer, *tensors, sample_ids=sample_ids, **options)))
        return seen[-1][-1]

    def masked(method, *tensors, **options):
        output = teacher(method, *tensors, **options)
        masks.append(output.masks.mask.unflatten(0, (2, -1)))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", recorded)
        patch.setattr(IBOT, "teacher_forward", masked)
        build.train(read_recipe("debug/tiny", *SMALL), out=folder, quiet=True)
    return folder, seen, [torch.cat(masks[i : i + 2], dim=1) for i in range(0, len(masks), 2)]


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of the run in an empty folder."""
    shutil.copytree(trained[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def same_batch(replayed, seen):
    first, second, ids, _ = seen
    assert torch.equal(replayed.batch.first, first) and torch.equal(replayed.batch.second, second)
    assert torch.equal(replayed.batch.sample_ids, ids)


@pytest.mark.parametrize("number, exact, source", [(1, False, 0), (4, False, 3), (6, True, 5), (3, True, 2)])
def test_with_its_own_weights_a_step_is_the_one_of_the_run(trained, run, number, exact, source):
    """Initial weights, a checkpoint, and weights trained in memory from either."""
    _, seen, masks = trained
    found = RunSteps(run, number).replay(exact=exact)
    assert found.weights.exact and found.weights.step == source and found.epoch == (number - 1) // 3
    same_batch(found, seen[number - 1])
    assert torch.equal(found.masks, masks[number - 1])
    outputs, logged = seen[number - 1][-1], read_metrics(run / "metrics.jsonl")[number - 1]
    assert found.logged["step"] == number == logged["step"]
    for name in ("loss", "cls", "patch", "grad_norm"):
        assert found.losses[name] == float(outputs[name]) == logged[name]
    for name in ("loss", "cls", "patch"):
        assert float(found.samples[name].mean()) == pytest.approx(found.losses[name], rel=1e-6)
        assert len(found.samples[name]) == 8
    assert found.samples["patch"][~found.masks.any(dim=-1).any(dim=0)].abs().sum() == 0


def test_other_weights_are_named_and_the_batch_is_the_same(trained, run):
    found = RunSteps(run, 6).replay()
    assert not found.weights.exact and found.weights.step == 3
    same_batch(found, trained[1][5])
    assert found.losses["loss"] != found.logged["loss"]
    assert "weights: after step 3 (run/checkpoints/step_00000003), those of step 6 are not saved" in text(found, 2)
    later = RunSteps(run, 2).replay()
    assert (later.weights.step, later.weights.exact) == (3, False)  # none is saved before it
    same_batch(later, trained[1][1])
    (run / "checkpoints/step_00000003/model.safetensors").write_bytes(b"other")
    damaged = RunSteps(run, 4).replay()
    assert damaged.weights.step == 6 and damaged.notes[0].startswith("checkpoint damaged (step_00000003")


def test_a_step_of_several_ranks_is_replayed_in_one_process(trained, run):
    about = json.loads((run / "run.json").read_text())
    about["starts"][0]["ranks"] = 2
    (run / "run.json").write_text(json.dumps(about))
    steps = RunSteps(run, 4)
    found = steps.replay()
    assert found.ranks == 2 and [len(part) for part in found.batch.ranks] == [4, 4]
    same_batch(found, trained[1][3])
    assert torch.equal(found.masks, trained[2][3])
    assert found.losses["loss"] == pytest.approx(found.logged["loss"], rel=2e-6)
    made, _ = steps.trainer(exact=False)
    assert made.accumulate == 4
    made.accumulate = 2  # as with synchronized batch norm: a micro-batch holds a part of every rank
    assert next(steps.batches(made, 3, 4)).sample_ids.tolist() == [
        trained[1][3][2].tolist()[place] for place in (0, 1, 4, 5, 2, 3, 6, 7)
    ]


def test_bad_batches_and_the_largest_sample(trained, run, capfd):
    with pytest.raises(UserError, match="run lists no bad batches"):
        RunSteps(run, bad=-1)
    entries = [{"step": at, "causes": ["loss"], "sample_ids": [trained[1][at - 1][2].tolist()]} for at in (2, 4)]
    (run / "bad_batches.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises(UserError, match="has the entries 1 to 2; there is no entry 3"):
        RunSteps(run, bad=3)
    assert RunSteps(run, bad=1).step == 2
    assert cli.main(["replay", "run", "--bad", "--json", "--picture", "bad.png"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["step"] == 4 and answer["bad"] == {"step": 4, "causes": ["loss"]} and answer["notes"] == []
    losses = [sample["loss"] for sample in answer["samples"]]
    assert losses == sorted(losses, reverse=True) and answer["largest"] == answer["samples"][0]["image"]
    assert answer["losses"]["loss"] == answer["logged"]["loss"] and Path("bad.png").stat().st_size > 1000
    found = RunSteps(run, 4).replay()
    assert picture(found, 3).shape[0] < picture(found, 4).shape[0]
    with_nan = {"loss": found.samples["loss"].clone()}
    with_nan["loss"][5] = math.nan
    assert replace(found, samples=with_nan).order[0] == 5 != found.order[0]


def test_supervised_runs_and_methods_of_another_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = ("method=supervised", "data.count=16", "train.epochs=1", "train.log_every=1", "augment.mixup=0.8")
    changes = (*changes, "augment.size=32", "evaluate.top1_every=0", "optimizer.warmup_epochs=0", "backbone.depth=1")
    recipe = read_recipe("debug/tiny", *changes)
    build.train(recipe, out="run", quiet=True)
    found = RunSteps("run", 1).replay()
    assert found.masks is None and found.losses["loss"] == found.logged["loss"]
    assert float(found.samples["loss"].mean()) == pytest.approx(found.losses["loss"], rel=1e-6)
    assert picture(found, 2).ndim == 3
    assert "no losses of single samples" in text(replace(found, samples={}), 2)


def test_mistakes_are_one_line(run):
    def refused(*words):
        with pytest.raises(UserError) as caught:
            cli.replaying.replay([str(word) for word in words])
        assert "\n" not in str(caught.value) and not list(Path(".").glob("*.png"))
        return str(caught.value)

    assert refused("run", 7) == "run has the steps 1 to 6; there is no step 7"
    assert "give a STEP or --bad" in refused("run")
    assert "give a STEP or --bad" in refused("run", 2, "--bad", 1)
    assert "is not a run folder" in refused("other", 2)
    about = (run / "run.json").read_text()
    (run / "run.json").write_text(about.replace('"count": 24', '"count": 23'))
    assert "have changed since step 2 was trained on them (24 images, not 23)" in refused("run", 2)
