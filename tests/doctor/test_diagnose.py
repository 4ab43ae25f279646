"""`maskwise doctor RUN` on run folders written for the test: findings and exit status."""

import json

import pytest

from maskwise.cli.main import main
from maskwise.doctor.diagnose import CAUSE_ORDER, diagnose
from maskwise.engine.collapse_alarms import ALARMS
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe

LN = 4.1589  # of 64 prototypes
WELL = {
    "loss": 5.0,
    "cls": 3.0,
    "teacher_entropy": 1.0,
    "teacher_spread": 2.5,
    "patch": 2.0,
    "patch_entropy": 1.0,
    "patch_spread": 2.6,
    "feature_std": 0.6,
    "feature_rank": 3.0,
    "mask_share": 0.15,
    "mask_agreement": 0.02,
    "teacher_gap": 0.01,
    "momentum": 0.9,
    "skipped": 0,
    "img_s": 100.0,
    "data_wait": 0.1,
    "seconds": 1.0,
}
UNHEALTHY = {
    "student_equals_teacher": {"teacher_gap": 0.0},
    "stale_teacher": {"momentum": 1.0},
    "loss_at_log_k": {"cls": LN},
    "uniform_targets": {"teacher_entropy": LN},
    "single_prototype": {"teacher_spread": 0.0},
    "uniform_patch_targets": {"patch_entropy": LN},
    "single_patch_prototype": {"patch_spread": 0.0},
    "constant_features": {"feature_std": 0.0},
    "duplicate_features": {"feature_duplicates": 1.0},
    "rank_collapse": {"feature_rank": 1.0},
    "identical_masks": {"mask_agreement": 1.0},
}
HEALTHY = """\
run          RUN: ibot, masking attmask_hint, vit_tiny_patch16_224, pooling cls
steps        200 of 200, complete
loss         5 at step 10, 5 at step 200
speed        100 img/s, 10 % of the time waiting for data; compute-bound: \
use fewer or smaller crops, a smaller backbone or a faster device; faster loading would save at most 10 % of the time
skipped      0 of 200 steps
checkpoints  none yet
images       all could be read
verdict      healthy"""
UNIFORM = """\
verdict      uniform_targets; also loss_at_log_k
  - uniform_targets: the teacher's entropy has been at its maximum (ln K = 4.16) for 90 steps: \
its targets carry no information. Lower teacher.temp, or raise teacher.momentum \
(since step 100; here teacher.temp is 0.07)
  - loss_at_log_k: the loss has not moved from its maximum (ln K = 4.16) for 90 steps: the model is not learning. \
Lower teacher.temp, raise optimizer.lr or lower optimizer.warmup_epochs \
(since step 100; here teacher.temp is 0.07, optimizer.lr 0.016)"""


@pytest.fixture
def run(tmp_path):
    """A writer of run folders: lines of metrics.jsonl, the recipe's overrides."""

    def write(lines, *overrides):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(read_recipe("debug/tiny", "train.steps=200", *overrides).resolved_yaml())
        (folder / "run.json").write_text(json.dumps({"images": 64, "ranks": 1, "device": "2 CPU cores"}))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write


def logged(*, until=200, **numbers):
    return [{"step": step, **WELL, **numbers} for step in range(10, until + 1, 10)]


def text(folder):
    return diagnose(folder).text().replace(str(folder), "RUN")


def test_a_healthy_run(run):
    folder = run(logged())
    assert text(folder) == HEALTHY and diagnose(folder).findings == []


def test_an_unhealthy_run(run):
    folder = run(logged(teacher_entropy=LN, cls=LN))
    assert text(folder).splitlines()[:7] == HEALTHY.splitlines()[:7]
    assert "\n".join(text(folder).splitlines()[7:]) == UNIFORM


def test_every_alarm_has_an_advice_and_a_case():
    assert set(CAUSE_ORDER) == {*ALARMS, "knn"} and UNHEALTHY.keys() == ALARMS.keys()


@pytest.mark.parametrize("kind", UNHEALTHY)
def test_each_collapse_is_named(run, kind):
    assert diagnose(run(logged(**UNHEALTHY[kind]))).kinds == [kind]


def test_several_alarms_are_listed_from_cause_to_consequence(run):
    everything = {key: value for numbers in UNHEALTHY.values() for key, value in numbers.items()}
    assert diagnose(run(logged(**everything))).kinds == [
        "student_equals_teacher",
        "stale_teacher",
        "constant_features",
        "duplicate_features",
        "rank_collapse",
        "single_prototype",
        "uniform_targets",
        "loss_at_log_k",
        "single_patch_prototype",
        "uniform_patch_targets",
        "identical_masks",
    ]


def test_expired_alarm_is_no_finding(run):
    assert diagnose(run([*logged(until=150, feature_std=0.0), *logged()[15:]])).findings == []


def test_knn_below_the_untrained_network(run):
    reports = [
        {"step": step, "report": "knn", "numbers": {"top1": top1}}
        for step, top1 in ((0, 30.0), (100, 31.0), (150, 33.0), (200, 25.0))
    ]
    folder = run(sorted([*logged(), *reports], key=lambda line: line["step"]))
    assert diagnose(folder).kinds == ["knn"]
    assert "k-NN         30.0 % at step 0, 33.0 % at step 150, 25.0 % at step 200" in text(folder)


def test_skipped_steps_and_the_image_in_all_of_them(run):
    lines = [{**line, "skipped": line["step"] // 20, "loss": None if line["step"] > 190 else 5.0} for line in logged()]
    folder = run(lines)
    bad = [
        {"step": step, "causes": ["loss", "gradient"], "sample_ids": [[17, step, step + 1]]}
        for step in range(20, 201, 20)
    ]
    (folder / "bad_batches.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    diagnosis = diagnose(folder)
    assert diagnosis.kinds == ["skipped"]
    assert "images 17 were in every bad batch" in diagnosis.findings[0].text
    assert "skipped      10 of 200 steps (not finite: loss 10 times, gradient 10 times; see bad_batches.jsonl)" in text(
        folder
    )
    assert "loss         5 at step 10, 5 at step 190" in text(folder)


def test_a_few_skipped_steps_are_healthy(run):
    assert diagnose(run(logged(skipped=2))).findings == []


def test_run_without_finite_steps(run):
    assert "never finite" in text(run(logged(loss=None, cls=None, skipped=200)))


@pytest.mark.parametrize(
    "overrides, waiting, bound, gain",
    [
        ((), 0.4, "compute-bound", "faster loading would save at most 40 % of the time"),
        ((), 0.6, "data-bound", "a faster device would save at most 40 % of the time"),
        (("speed.workers=2",), 0.4, "data-bound", "a faster device would not help"),
        (("speed.workers=2",), 0.01, "compute-bound", "faster loading would not help"),
        (("speed.workers=0",), 0.4, "compute-bound", "faster loading would save at most 40 % of the time"),
    ],
)
def test_data_bound_or_compute_bound(run, overrides, waiting, bound, gain):
    speed = text(run(logged(data_wait=waiting), *overrides)).splitlines()[3]
    assert f"waiting for data; {bound}: " in speed and speed.endswith(gain)


def test_supervised_runs_are_advised_on_their_own_keys(run):
    folder = run(logged())
    recipe = read_recipe("debug/tiny_supervised", "train.steps=200").resolved_yaml()
    (folder / "recipe.yaml").write_text(recipe)
    lines = text(folder).splitlines()
    assert lines[0] == "run          RUN: supervised, vit_tiny_patch16_224, pooling simpool"
    assert "compute-bound: use smaller images (augment.size), a smaller backbone or a faster device; " in lines[3]


def test_progress_of_the_run(run):
    folder = run(logged(until=50))
    assert "50 of 200, running or crashed: the same command continues" in text(folder)
    (folder / "preempted").write_text("50\n")
    assert "50 of 200, interrupted and saved" in text(folder)
    (folder / "bad_images.txt").write_text("a.jpg\ttruncated\nb.jpg\tempty\n")
    assert "images       2 could not be read and were replaced: see RUN/bad_images.txt" in text(folder)
    assert "no step was logged yet" in text(run([]))


def test_damaged_checkpoints_are_reported(run):
    from maskwise.engine.checkpoint import Checkpoints

    folder = run(logged())
    checkpoints = Checkpoints(folder)
    for step in (100, 200):
        checkpoints.save(step, {}, {})
    assert "checkpoints  2, the last at step 200, all intact" in text(folder)
    (folder / "checkpoints" / "step_00000200" / "model.safetensors").write_bytes(b"torn")
    diagnosis = diagnose(folder)
    assert diagnosis.kinds == ["checkpoint"]
    assert "step_00000200: " in diagnosis.findings[0].text
    assert "newest intact one" in diagnosis.findings[0].text


def test_exit_status_of_the_command(run, tmp_path, capsys):
    folder = run(logged())
    assert main(["doctor", str(folder)]) == 0 and "verdict      healthy" in capsys.readouterr().out
    run(logged(feature_std=0.0))
    assert main(["doctor", str(folder)]) == 1 and "verdict      constant_features" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main(["doctor", str(tmp_path / "empty")]) == 2
    assert "is not the folder of a run that has started" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not the folder"):
        diagnose(tmp_path / "nowhere")
