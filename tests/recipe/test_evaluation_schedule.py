"""Test evaluations scheduled in a recipe: parsing, due times, no effect on training."""

import pytest
import torch

import maskwise
from data.benchmark_sets.test_benchmark_sets import voc_on_disk
from maskwise.build.inputs import labeled_test, own_tests
from maskwise.errors import UserError
from maskwise.evaluation.report import Report
from maskwise.recipe.evaluation_schedule import scheduled
from support.run_contents import tensors, untimed_lines

ALSO = [
    "linear every=1 preset=dino feature=cls2 epochs=2 batch_size=16 limit_train=24 limit_test=16 lr=[0.1,1.0]",
    "logistic limit_train=24",
    "attentive pooling=simpool epochs=2 warmup_epochs=1 batch_size=16 limit_train=16 limit_test=8 every=2",
    "finetune epochs=1 warmup_epochs=0 batch_size=8 repeats=1 limit_train=16 limit_test=8",
    "linear every=2 augment=false epochs=1 feature=patch_mean limit_train=24",
]
SMALL = ("data.count=24", "train.epochs=2", "train.save_every=2", "evaluate.pictures_every=0", "speed.threads=1")


def recipe(*overrides):
    return maskwise.read_recipe("debug/tiny", *SMALL, *overrides)


def also(lines):
    return "evaluate.also=[" + ", ".join(f'"{line}"' for line in lines) + "]"


def without_reports(run):
    return [line for line in untimed_lines(run) if "report" not in line]


@pytest.fixture(scope="module")
def with_evaluations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with") / "run"
    maskwise.train(recipe(also(ALSO)), out=folder, quiet=True)
    return folder


def test_training_is_bit_equal_with_evaluations(with_evaluations, tmp_path):
    maskwise.train(recipe("evaluate.knn_every=0"), out=tmp_path / "plain", quiet=True)
    first, second = tensors(with_evaluations), tensors(tmp_path / "plain")
    assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())
    assert without_reports(with_evaluations) == without_reports(tmp_path / "plain")


def test_reports_are_written_when_due(with_evaluations):
    names = {path.stem for path in (with_evaluations / "reports").iterdir()}
    due = {"knn": (3, 6), "linear": (3, 6), "logistic": (6,), "attentive": (6,), "finetune": (6,), "linear_2": (6,)}
    assert names == {f"{name}_step_{step:08d}" for name, steps in due.items() for step in steps} | {"baselines"}
    report = Report.load(with_evaluations / "reports" / "linear_step_00000003.json")
    assert report.protocol["train"] == 24 and report.protocol["test"] == 16 and "top1_lr1" in report.numbers


def test_continued_run_equals_uninterrupted_run(with_evaluations, tmp_path, monkeypatch):
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
    first, second = tensors(with_evaluations), tensors(tmp_path / "run")
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert untimed_lines(with_evaluations) == untimed_lines(tmp_path / "run")


def test_lines_are_parsed_into_options():
    first, second, third, fourth = scheduled(
        ["linear every=3 limit_test=5 lr=[0.1,2] augment=false", "linear", "knn k=[1,5]", "logistic penalty=1e-2"]
    )
    assert (first.name, first.every, first.limit_train, first.limit_test, dict(first.options)) == (
        "linear",
        3,
        None,
        5,
        {"lr": (0.1, 2), "augment": False},
    )
    assert (second.name, second.every, third.name, dict(third.options), dict(fourth.options)) == (
        "linear_2",
        0,
        "knn_also",
        {"k": (1, 5)},
        {"penalty": 0.01},
    )
    assert scheduled(None) == []


def test_quotes_enclose_blanks():
    [line] = scheduled(["linear 'save=my probes #2/head.pt' every=2 lr=[0.1,2]"])
    assert (line.every, dict(line.options)) == (2, {"save": "my probes #2/head.pt", "lr": (0.1, 2)})
    with pytest.raises(UserError, match="has a quotation mark without its pair"):
        scheduled(["linear save='a"])


def test_old_option_names_are_read():
    [line] = scheduled(["logistic normalise=true"])
    assert line.options == {"normalize": True}


@pytest.mark.parametrize(
    "line, reason",
    [
        ("linaer every=1", "no evaluation 'linaer'; did you mean `linear`?"),
        ("linear evry=1", "linear has no option evry; did you mean `every`?"),
        ("linear every=-1", "every=-1 must be a whole number from 0"),
        ("linear limit_train=0", "limit_train=0 must be a whole number from 1"),
        ("knn 5", "`5` is not key=value"),
    ],
)
def test_errors_name_their_place(line, reason):
    with pytest.raises(UserError) as caught:
        recipe(also([line]))
    assert "evaluate.also" in str(caught.value) and reason in str(caught.value)


def test_resolved_recipe_reads_back(tmp_path):
    first = recipe(also(ALSO))
    (tmp_path / "recipe.yaml").write_text(first.resolved_yaml())
    assert (
        maskwise.read_recipe(tmp_path / "recipe.yaml").evaluate.also == tuple(ALSO) and recipe().evaluate.also is None
    )


def test_masks_on_objects_are_followed_over_training_on_the_images_of_the_recipe_and_on_others(tmp_path):
    voc_on_disk(tmp_path / "voc")
    lines = [
        "mask_overlap every=1 limit_test=8 maskings=[attmask_high,random]",
        f"mask_overlap test={tmp_path / 'voc'} maskings=block",
        f"discovery every=1 test={tmp_path / 'voc'} methods=lost",
    ]
    folder = tmp_path / "run"
    maskwise.train(recipe("evaluate.knn_every=0", also(lines)), out=folder, quiet=True)
    reports = {path.stem: Report.load(path) for path in (folder / "reports").iterdir()}
    assert set(reports) == {
        "mask_overlap_step_00000003",
        "mask_overlap_step_00000006",
        "mask_overlap_2_step_00000006",
        "discovery_step_00000003",
        "discovery_step_00000006",
    }
    own, other = reports["mask_overlap_step_00000003"], reports["mask_overlap_2_step_00000006"]
    assert (
        own.protocol["images"] == 8 and own.protocol["ground_truth"] == "masks" and "attmask_high_recall" in own.numbers
    )
    assert other.protocol["images"] == 1 and other.protocol["ground_truth"] == "boxes" and "block" in other.numbers
    assert reports["discovery_step_00000003"].protocol["images"] == 1
    assert '"attmask_high_recall"' in (folder / "metrics.jsonl").read_text()


def test_lines_with_test_images_of_their_own_need_none_of_the_recipe(tmp_path):
    voc_on_disk(tmp_path)
    images = tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages"
    own = ("data.name=folder", f"data.path={images}", "data.split=null", "data.test_split=null", "evaluate.knn_every=0")
    small = ("train.epochs=1", "evaluate.pictures_every=0", "speed.threads=1")
    read = maskwise.read_recipe("debug/tiny", *small, *own, also([f"mask_overlap test={tmp_path}"]))
    assert scheduled(read.evaluate.also)[0].test == str(tmp_path)
    assert labeled_test(read, None) is None and list(own_tests(read)) == [("mask_overlap", str(tmp_path))]
    with pytest.raises(UserError, match="leave it out"):
        maskwise.read_recipe("debug/tiny", *small, *own, also(["mask_overlap"]))
    empty = tmp_path / "VOCdevkit" / "VOC2007" / "Annotations"
    wrong = maskwise.read_recipe("debug/tiny", *SMALL, also([f"localization test={empty}"]))
    with pytest.raises(UserError, match="has no layout that it reads"):
        own_tests(wrong)
    with pytest.raises(UserError, match="only .*discovery.* read images of their own"):
        maskwise.read_recipe("debug/tiny", *SMALL, also([f"knn test={empty}"]))
