"""`maskwise doctor RUN` on run folders written for the test: what it says of each, and with which exit status."""

import json

import pytest

from maskwise.cli import main
from maskwise.doctor.diagnosis import ROOTS, diagnose
from maskwise.engine.health import SIGNS
from maskwise.functional.errors import UserError
from maskwise.recipe import read_recipe

LN = 4.1589  # of 64 prototypes
WELL = {
    "loss": 5.0, "cls": 3.0, "teacher_entropy": 1.0, "teacher_spread": 2.5, "patch": 2.0, "patch_entropy": 1.0, "patch_spread": 2.6, "feature_std": 0.6, "feature_rank": 3.0,
    "mask_share": 0.15, "mask_agreement": 0.02, "teacher_gap": 0.01, "momentum": 0.9, "skipped": 0, "img_s": 100.0, "data_wait": 0.1, "seconds": 1.0,
}  # fmt: skip
SICK = {
    "same": {"teacher_gap": 0.0}, "teacher": {"momentum": 1.0}, "stuck": {"cls": LN}, "uniform": {"teacher_entropy": LN}, "point": {"teacher_spread": 0.0},
    "patch_uniform": {"patch_entropy": LN}, "patch_point": {"patch_spread": 0.0}, "flat": {"feature_std": 0.0}, "twins": {"feature_twins": 1.0}, "line": {"feature_rank": 1.0}, "masks": {"mask_agreement": 1.0},
}  # fmt: skip
HEALTHY = """\
run          RUN: ibot, masking attmask_hint, vit_tiny_patch16_224, pooling cls
steps        200 of 200, complete
loss         5 at step 10, 5 at step 200
speed        100 img/s, 10 % of the time waiting for data; compute-bound: fewer or smaller crops, a smaller backbone or a faster device would help; faster loading would not
skipped      0 of 200 steps
checkpoints  none yet
images       all could be read
verdict      healthy"""
UNIFORM = """\
verdict      uniform; also stuck
  - uniform: the teacher's entropy has stood at its ceiling ln K = 4.16 for 90 steps, its targets say nothing: lower teacher.temp, or raise teacher.momentum \
(since step 100; here teacher.temp is 0.07)
  - stuck: the loss has stood at ln K = 4.16 for 90 steps, the student tells nothing apart: lower teacher.temp, raise optimizer.lr or lower optimizer.warmup_epochs \
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


def test_a_sick_run(run):
    folder = run(logged(teacher_entropy=LN, cls=LN))
    assert text(folder).splitlines()[:7] == HEALTHY.splitlines()[:7]
    assert "\n".join(text(folder).splitlines()[7:]) == UNIFORM


def test_every_sign_has_its_place_and_its_case():
    assert set(ROOTS) == {*SIGNS, "knn"} and SICK.keys() == SIGNS.keys()


@pytest.mark.parametrize("kind", SICK)
def test_each_collapse_is_named(run, kind):
    assert diagnose(run(logged(**SICK[kind]))).kinds == [kind]


def test_what_has_passed_is_not_wrong(run):
    assert diagnose(run([*logged(until=150, feature_std=0.0), *logged()[15:]])).findings == []


def test_knn_below_the_untrained_network(run):
    reports = [{"step": step, "report": "knn", "numbers": {"top1": top1}} for step, top1 in ((0, 30.0), (100, 31.0), (150, 33.0), (200, 25.0))]
    folder = run(sorted([*logged(), *reports], key=lambda line: line["step"]))
    assert diagnose(folder).kinds == ["knn"]
    assert "k-NN         30.0 % at step 0, 33.0 % at step 150, 25.0 % at step 200" in text(folder)


def test_steps_left_out_and_the_image_that_was_in_all_of_them(run):
    lines = [{**line, "skipped": line["step"] // 20, "loss": None if line["step"] > 190 else 5.0} for line in logged()]
    folder = run(lines)
    bad = [{"step": step, "causes": ["loss", "gradient"], "sample_ids": [[17, step, step + 1]]} for step in range(20, 201, 20)]
    (folder / "bad_batches.jsonl").write_text("".join(json.dumps(each) + "\n" for each in bad))
    found = diagnose(folder)
    assert found.kinds == ["skipped"] and "images 17 were in every bad batch" in found.findings[0].text
    assert "skipped      10 of 200 steps (not finite: loss 10 times, gradient 10 times; see bad_batches.jsonl)" in text(folder)
    assert "loss         5 at step 10, 5 at step 190" in text(folder)


def test_a_few_steps_left_out_are_no_illness(run):
    assert diagnose(run(logged(skipped=2))).findings == []


def test_nothing_was_ever_finite(run):
    assert "never finite" in text(run(logged(loss=None, cls=None, skipped=200)))


@pytest.mark.parametrize("overrides, waiting, bound", [
    ((), 0.4, "compute-bound"), ((), 0.6, "data-bound"), (("speed.workers=2",), 0.4, "data-bound"), (("speed.workers=0",), 0.4, "compute-bound"),
])  # fmt: skip
def test_data_bound_or_compute_bound(run, overrides, waiting, bound):
    assert f"waiting for data; {bound}: " in text(run(logged(data_wait=waiting), *overrides))


def test_where_the_run_is(run):
    folder = run(logged(until=50))
    assert "50 of 200, running or broken off: the same command continues" in text(folder)
    (folder / "preempted").write_text("50\n")
    assert "50 of 200, interrupted and saved" in text(folder)
    (folder / "bad_images.txt").write_text("a.jpg\ttruncated\nb.jpg\tempty\n")
    assert "images       2 could not be read and were replaced: see RUN/bad_images.txt" in text(folder)
    assert "no step was logged yet" in text(run([]))


def test_checkpoints_are_looked_at(run):
    from maskwise.engine.checkpoint import Checkpoints

    folder = run(logged())
    kept = Checkpoints(folder)
    for step in (100, 200):
        kept.save(step, {}, {})
    assert "checkpoints  2, the last at step 200, all sound" in text(folder)
    (folder / "checkpoints" / "step_00000200" / "model.safetensors").write_bytes(b"torn")
    found = diagnose(folder)
    assert found.kinds == ["checkpoint"] and "step_00000200: " in found.findings[0].text and "newest sound one" in found.findings[0].text


def test_the_command_answers_with_its_exit_status(run, tmp_path, capsys):
    folder = run(logged())
    assert main(["doctor", str(folder)]) == 0 and "verdict      healthy" in capsys.readouterr().out
    run(logged(feature_std=0.0))
    assert main(["doctor", str(folder)]) == 1 and "verdict      flat" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main(["doctor", str(tmp_path / "empty")]) == 2
    assert "is not the folder of a run that has begun" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not the folder"):
        diagnose(tmp_path / "nowhere")
