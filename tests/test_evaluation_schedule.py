"""Any evaluation scheduled in a recipe: read with care, due when it says, and without a trace in the training."""

import pytest
import torch
from maskwise.engine.journal import read_metrics
from maskwise.evaluation.report import Report
from maskwise.functional.errors import UserError
from maskwise.recipe_evaluations import scheduled
from safetensors.torch import load_file

import maskwise

ALSO = [
    "linear every=1 preset=dino feature=cls2 epochs=2 batch_size=16 limit_train=24 limit_test=16 lr=[0.1,1.0]",
    "logistic limit_train=24",
    "attentive pooling=simpool epochs=2 warmup_epochs=1 batch_size=16 limit_train=16 limit_test=8 every=2",
    "finetune epochs=1 warmup_epochs=0 batch_size=8 repeats=1 limit_train=16 limit_test=8",
    "linear every=2 augment=false epochs=1 feature=patch_mean limit_train=24",
]
SMALL = ("data.count=24", "train.epochs=2", "train.save_every=2", "evaluate.pictures_every=0", "speed.threads=1")
TIMING = {"img_s", "data_wait", "seconds"}


def recipe(*overrides):
    return maskwise.read_recipe("debug/tiny", *SMALL, *overrides)


def also(lines):
    return "evaluate.also=[" + ", ".join(f'"{line}"' for line in lines) + "]"


def state(folder):
    last = folder / "checkpoints" / (folder / "checkpoints" / "last").read_text().strip()
    return {f"{part}/{key}": value for part in ("model", "optimizer") for key, value in load_file(last / f"{part}.safetensors").items()}


def lines(folder, reports):
    return [{key: value for key, value in line.items() if key not in TIMING} for line in read_metrics(folder / "metrics.jsonl") if reports or "report" not in line]


@pytest.fixture(scope="module")
def with_evaluations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with") / "run"
    maskwise.train(recipe(also(ALSO)), out=folder, quiet=True)
    return folder


def test_the_training_is_the_same_bit_for_bit(with_evaluations, tmp_path):
    maskwise.train(recipe("evaluate.knn_every=0"), out=tmp_path / "plain", quiet=True)
    one, two = state(with_evaluations), state(tmp_path / "plain")
    assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())
    assert lines(with_evaluations, False) == lines(tmp_path / "plain", False)


def test_reports_lie_where_they_were_due(with_evaluations):
    names = {path.stem for path in (with_evaluations / "reports").iterdir()}
    due = {"knn": (3, 6), "linear": (3, 6), "logistic": (6,), "attentive": (6,), "finetune": (6,), "linear_2": (6,)}
    assert names == {f"{name}_step_{step:08d}" for name, steps in due.items() for step in steps}
    report = Report.load(with_evaluations / "reports" / "linear_step_00000003.json")
    assert report.protocol["train"] == 24 and report.protocol["test"] == 16 and "top1_lr1" in report.numbers


def test_interrupted_and_continued_is_the_whole(with_evaluations, tmp_path, monkeypatch):
    from maskwise.engine.trainer import Trainer

    step = Trainer.step

    def broken(self, *arguments, **options):
        if self.step_index == 4:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        maskwise.train(recipe(also(ALSO)), out=tmp_path / "run", quiet=True)
    monkeypatch.setattr(Trainer, "step", step)
    torch.manual_seed(99)
    maskwise.train(recipe(also(ALSO)), out=tmp_path / "run", quiet=True)
    one, two = state(with_evaluations), state(tmp_path / "run")
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    plain = lambda folder: [line for line in lines(folder, True)]  # noqa: E731
    assert plain(with_evaluations) == plain(tmp_path / "run")


def test_lines_become_options():
    one, two, three, four = scheduled(["linear every=3 limit_test=5 lr=[0.1,2] augment=false", "linear", "knn k=[1,5]", "logistic penalty=1e-2"])
    assert (one.name, one.every, one.limit_train, one.limit_test, dict(one.options)) == ("linear", 3, None, 5, {"lr": (0.1, 2), "augment": False})
    assert (two.name, two.every, three.name, dict(three.options), dict(four.options)) == ("linear_2", 0, "knn_also", {"k": (1, 5)}, {"penalty": 0.01})
    assert scheduled(None) == []


@pytest.mark.parametrize("line, reason", [
    ("linaer every=1", "no evaluation 'linaer'; did you mean `linear`?"), ("linear evry=1", "linear has no option evry; did you mean `every`?"),
    ("linear every=-1", "every=-1 must be a whole number from 0"), ("linear limit_train=0", "limit_train=0 must be a whole number from 1"), ("knn 5", "`5` is not key=value"),
])
def test_mistakes_are_told_with_their_place(line, reason):
    with pytest.raises(UserError) as told:
        recipe(also([line]))
    assert "evaluate.also" in str(told.value) and reason in str(told.value)


def test_a_resolved_recipe_reads_back(tmp_path):
    first = recipe(also(ALSO))
    (tmp_path / "recipe.yaml").write_text(first.resolved_yaml())
    assert maskwise.read_recipe(tmp_path / "recipe.yaml").evaluate.also == tuple(ALSO) and recipe().evaluate.also is None
