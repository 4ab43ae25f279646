"""Test supervised runs: resume, ranks, workers, evaluations, refused recipes."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import maskwise
from maskwise import build, cli
from maskwise.build.classifiers import classifier_of
from maskwise.engine.run_log import read_metrics
from maskwise.engine.trainer import Trainer
from maskwise.errors import UserError
from runs.test_resume import assert_same
from support import pair

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("data.count=40", "train.epochs=3", "train.save_every=4", "backbone.drop_path=0.2")


def recipe(*overrides, small=SMALL):
    return maskwise.read_recipe("configs/debug/tiny_supervised.yaml", *small, *overrides)


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.manual_seed(1)
    assert maskwise.train(recipe("method.dropout=0.1"), out=folder, quiet=True)["status"] == "complete"
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_interrupted_run_equals_uninterrupted_run(reference_run, tmp_path, monkeypatch, workers):
    step = Trainer.step

    def interrupted(trainer, *arguments, **options):
        if trainer.step_index == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, **options)

    folder, speed = tmp_path / "run", f"speed.workers={workers}"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        result = maskwise.train(recipe("method.dropout=0.1", speed), out=folder, quiet=True)
    assert (result["status"], result["step"]) == ("preempted", 7)
    torch.manual_seed(99)  # what a fresh process has in its generators must not matter
    assert maskwise.train(recipe("method.dropout=0.1", speed), out=folder, quiet=True)["status"] == "complete"
    assert_same(reference_run, folder)


def test_log_reports_and_networks_of_a_run(reference_run):
    reports = [line for line in read_metrics(reference_run / "metrics.jsonl") if "report" in line]
    assert [line["report"] for line in reports] == ["top1"] * 3
    assert (
        set(reports[0]["numbers"]) == {"top1", "top5", "student_top1", "student_top5"}
        and (reference_run / "reports" / "top1_step_00000015.json").is_file()
    )
    average, raw = (maskwise.load(reference_run, weights=weights) for weights in ("teacher", "student"))
    assert any(not torch.equal(a, b) for a, b in zip(average.state_dict().values(), raw.state_dict().values()))
    report = maskwise.evaluate("top1", reference_run)
    assert report.numbers["top1"] == reports[-1]["numbers"]["top1"] and report.protocol["classifier"] == "the run's own"
    assert maskwise.evaluate("masked", reference_run, ratios=[0.0, 0.5]).protocol["classifier"] == "the run's own"


def test_accuracy_equals_a_loop_over_images(reference_run):
    """Run the images one by one through the average and its classifier."""
    chosen = recipe("method.dropout=0.1")
    encoder = maskwise.load(reference_run)
    classifier = classifier_of(reference_run, encoder)
    test, right, five = build.dataset(chosen, "test"), 0, 0
    for i in range(len(test)):
        with torch.no_grad():
            ranked = classifier(encoder.transform(test.image(i))[None])[0].argsort(descending=True).tolist()
        right, five = right + (ranked[0] == int(test.labels[i])), five + (int(test.labels[i]) in ranked[:5])
    numbers = maskwise.evaluate("top1", reference_run).numbers
    assert numbers == {"top1": 100 * right / len(test), "top5": 100 * five / len(test)}


@pytest.mark.slow
def test_encoder_exports_and_starts_another_run(reference_run, tmp_path):
    from maskwise.export import release

    release.export(reference_run, tmp_path / "exported")
    image = build.dataset(recipe(), "test").image(0)
    first, second = (maskwise.load(path) for path in (reference_run, tmp_path / "exported"))
    assert torch.allclose(
        first(first.transform(image)[None]).pooled, second(second.transform(image)[None]).pooled, atol=1e-6
    )
    restarted = build.trainer(recipe(f"method.start_from={reference_run}"), images=40, classes=8)
    for role in ("teacher", "student"):
        mine, theirs = (
            getattr(restarted.method, role).encoder.state_dict(),
            maskwise.load(reference_run, weights=role).state_dict(),
        )
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def test_teacher_is_the_student_without_an_average(tmp_path):
    maskwise.train(recipe("teacher.momentum=null", "train.epochs=1"), out=tmp_path / "run", quiet=True)
    first, second = (
        maskwise.load(tmp_path / "run", weights=weights).state_dict() for weights in ("teacher", "student")
    )
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    [line] = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "report" in line]
    assert set(line["numbers"]) == {"top1", "top5"}


def pictures(root, classes=("cat", "dog"), per_class=6, sides=(40, 52)):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            shade = torch.full((*sides, 3), 40 + 150 * number, dtype=torch.uint8) + torch.randint(
                0, 40, (*sides, 3), dtype=torch.uint8
            )
            Image.fromarray(shade.numpy()).save(root / name / f"{i}.png")
    return root


FOLDER = ("train.batch_size=4", "train.epochs=2", "augment.policy=null", "train.save_every=3")


def test_folder_with_classes_on_the_command_line(tmp_path, capsys):
    pictures(tmp_path / "data" / "train"), pictures(tmp_path / "data" / "val", per_class=3)
    command = [
        "train",
        "debug/tiny_supervised",
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "run"),
        "data.split=train",
        "data.test_split=val",
        *FOLDER,
    ]
    assert cli.main(command) == 0
    assert "supervised, 2 classes" in capsys.readouterr().err
    assert cli.main(["evaluate", "top1", str(tmp_path / "run"), f"test={tmp_path / 'data' / 'val'}"]) == 0
    assert "top5" in capsys.readouterr().out
    (tmp_path / "data" / "val" / "dog").rename(tmp_path / "data" / "val" / "cow")
    assert (
        cli.main(["evaluate", "top1", str(tmp_path / "run")]) == 2
        and "unknown to the classifier" in capsys.readouterr().err
    )


def test_images_without_labels_are_refused_in_one_line(tmp_path, capsys):
    flat = tmp_path / "flat"
    pictures(tmp_path / "data")
    (tmp_path / "data" / "cat").rename(flat)
    assert (
        cli.main(
            [
                "train",
                "debug/tiny_supervised",
                "--data",
                str(flat),
                "--out",
                str(tmp_path / "run"),
                "train.batch_size=4",
                "evaluate.top1_every=0",
            ]
        )
        == 2
    )
    error = capsys.readouterr().err.strip()
    assert (
        "\n" not in error
        and "learns labels: " in error
        and "has images but no subfolders of them; give one subfolder per class, or take a method without" in error
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides, text",
    [
        (("classifier.classes=3",), "classifier.classes=3 and the training images have 8 classes; give 8, or null"),
        (("train.batch_size=5", "data.count=40"), None),
    ],
)
def test_classes_and_pairs_are_checked_before_writing(tmp_path, overrides, text):
    with pytest.raises(UserError, match=text or "cannot be mixed in pairs; give train.batch_size=6"):
        maskwise.train(recipe(*overrides), out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "classes, message",
    [
        (("cat", "cow"), "val/ has class cow, which the training images do not have"),
        (("dog",), "val/ has no images of class cat; give test images of the same classes"),
    ],
)
def test_test_images_of_other_classes_are_refused(tmp_path, classes, message):
    pictures(tmp_path / "train"), pictures(tmp_path / "val", classes=classes)
    with pytest.raises(UserError, match=message):
        maskwise.train(
            recipe(
                "data=folder", f"data.path={tmp_path}", "data.split=train", "data.test_split=val", *FOLDER, small=()
            ),
            out=tmp_path / "run",
            quiet=True,
        )


@pytest.mark.parametrize(
    "overrides, text",
    [
        (("crops.local_number=2",), "crops.local_number: method supervised does not read section crops; leave it out"),
        (("masking=random",), "method supervised does not read section masking"),
        (("augment.splits=2",), "several views of an image are not mixed"),
        (("method.jsd_weight=1",), "compares views of an image, and there is only one"),
        (("method.bce_threshold=0.2",), "is read with method.loss=bce only"),
        (("augment.skip_first=true",), "the first view is the only one"),
        (("optimizer.warmup_lr=1",), "above the peak learning rate 0.001 (optimizer.lr)"),
        (("classifier=linaer",), "no classifier `linaer`; did you mean `linear`?"),
        (("teacher.temp=0.04",), "nothing reads this key"),
        (("augment.size=30",), "30 pixels are not a multiple of the patch size 8"),
        (("speed.checkpointing=blocks", "method.dropout=0.1"), "would drop other tokens"),
    ],
)
def test_impossible_recipes_are_refused(overrides, text, tmp_path):
    with pytest.raises(UserError) as caught:
        build.trainer(recipe(*overrides), images=40, classes=8)
    assert text in str(caught.value)


def test_only_supervised_recipes_have_classifiers():
    with pytest.raises(UserError, match="augment.mixup: method supervised alone reads this section"):
        maskwise.read_recipe("debug/tiny", "augment.mixup=0.2")
    with pytest.raises(UserError, match="teacher.momentum: the teacher learns as the moving average of the student"):
        maskwise.read_recipe("debug/tiny", "teacher.momentum=null")


def test_learning_rates_are_absolute_or_per_images():
    trainer = build.trainer(recipe("optimizer.warmup_epochs=2"), images=40, classes=8)
    assert (
        trainer.schedules.lr(0) == 1e-6
        and trainer.schedules.lr(9) == pytest.approx(1e-3)
        and trainer.schedules.momentum(3) == 0.9
    )
    trainer = build.trainer(recipe("optimizer.lr_per=32", "optimizer.warmup_lr=0"), images=40, classes=8)
    assert trainer.schedules.lr(2) == pytest.approx(1e-3 * 8 / 32)


@pytest.mark.slow
def test_supervised_run_learns_shapes_above_chance(tmp_path):
    """Chance is 12.5 % with eight classes."""
    easy = (
        "data.count=256",
        "data.size=32",
        "augment.policy=null",
        "augment.jitter=0",
        "augment.erasing=0",
        "augment.mixup=0",
        "augment.cutmix=0",
        "augment.scale=[0.6,1]",
    )
    long = (
        "train.epochs=12",
        "train.batch_size=16",
        "backbone.drop_path=0",
        "optimizer.lr=3e-3",
        "evaluate.top1_every=0",
        "train.save_every=1000",
        "evaluate.crop_pct=1.0",
    )
    chosen = recipe(*easy, *long, small=())
    maskwise.train(chosen, out=tmp_path / "run", quiet=True)
    assert maskwise.evaluate("top1", tmp_path / "run").numbers["top1"] > 22


# two ranks


def record(world, accumulate=1):
    """Return losses and weights of six steps."""
    chosen = recipe("backbone.drop_path=0.2", "classifier.dropout=0.2", f"train.accumulate={accumulate}")
    data = build.dataset(chosen)
    trainer, losses = build.trainer(chosen, world, images=len(data), classes=8, precision="fp32"), []
    inputs = build.inputs(chosen, trainer)
    for batch in build.stream(chosen, world, data, 6, 0):
        losses.append(world.all_sum(trainer.step(*inputs(batch), sample_ids=batch.index)["loss"]) / world.size)
    return torch.stack(losses), torch.cat([value.flatten().double() for value in trainer.method.state_dict().values()])


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    from maskwise.distributed.world import World

    ranks = pair.start(__file__, tmp_path)
    losses, weights = record(World(), accumulate=2)
    pair.end(ranks)
    for rank in range(2):
        rank_losses, rank_weights = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(rank_losses, losses, rtol=2e-6, atol=0)
        torch.testing.assert_close(rank_weights, weights, rtol=0, atol=2e-5)


def run_rank():
    from maskwise.distributed.world import World

    world = World.start("cpu")
    torch.save(record(world), Path(sys.argv[1]) / f"{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    run_rank()
