"""Alarms: what they need, that they speak once, what they say, and that lines of a run that is well never raise one."""

import math

import pytest

from maskwise.engine import health
from maskwise.engine.health import SIGNS, Health

LN = math.log(1000)
WELL = {
    "cls": 4.0, "teacher_entropy": 2.0, "teacher_spread": 3.5, "patch": 2.0, "patch_entropy": 2.0, "patch_spread": 4.0, "feature_std": 0.6, "feature_rank": 3.0, "feature_twins": 0.0,
    "mask_share": 0.15, "mask_agreement": 0.1, "teacher_gap": 0.01, "momentum": 0.9, "skipped": 0,
}  # fmt: skip
SICK = {  # kind: the numbers that raise it, just inside the threshold
    "same": {"teacher_gap": 9e-7},
    "teacher": {"momentum": 0.9999},
    "stuck": {"cls": LN * 0.991},
    "uniform": {"teacher_entropy": LN * 0.981},
    "point": {"teacher_spread": 0.39 * math.log(128)},
    "patch_uniform": {"patch_entropy": LN * 0.981},
    "patch_point": {"patch_spread": 0.39 * math.log(128)},
    "flat": {"feature_std": health.FLAT - 0.01},
    "twins": {"feature_twins": health.TWINS + 0.01},
    "line": {"feature_rank": health.LINE - 0.01},
    "masks": {"mask_agreement": health.EQUAL_MASKS + 0.01},
}


def alarms(lines, prototypes=1000, patience=100, **options):
    judge = Health(prototypes, patience=patience, window=5, **{"rows": 128, **options})
    return [alarm for line in lines for alarm in judge.check(line)]


def test_every_sign_has_its_case():
    assert SICK.keys() == SIGNS.keys()


def test_a_healthy_run_raises_nothing():
    assert alarms({**WELL, "step": 10 * i, "cls": 6.9 - 0.02 * i} for i in range(60)) == []


@pytest.mark.parametrize("kind", SICK)
def test_each_sign_speaks_once_after_its_patience_and_names_a_remedy(kind):
    lines = [{**WELL, **SICK[kind], "step": 10 * i} for i in range(1, 60)]
    (alarm,) = alarms(lines)
    assert alarm.kind == kind and "{" not in alarm.text and "\n" not in alarm.text
    assert any(f"{section}." in alarm.text for section in ("teacher", "method", "optimizer", "head", "masking")) or "look for" in alarm.text
    assert alarms(lines[:9]) == []  # before its patience
    late = [*({**WELL, "step": 10 * i} for i in range(1, 40)), *lines[39:42]]
    assert alarms(late) == [] or kind == "teacher"  # not yet the whole window


def test_one_line_that_looks_well_puts_an_alarm_off():
    lines = [{**WELL, **(SICK["flat"] if i % 5 else {}), "step": 10 * i} for i in range(1, 60)]
    assert alarms(lines) == []


def test_a_line_without_a_sign_or_with_no_number_raises_none():
    assert alarms({"step": 10 * i, "loss": None, "cls": None, "teacher_entropy": None, "feature_std": None, "mask_share": 0.0, "mask_agreement": 1.0} for i in range(1, 60)) == []


def test_what_is_masked_nowhere_is_not_judged():
    lines = [{**WELL, "step": 10 * i, "mask_share": 0.0, "mask_agreement": 1.0, "patch_spread": 0.0, "patch_entropy": 0.0} for i in range(1, 60)]
    assert alarms(lines) == []


def test_a_small_batch_cannot_show_many_prototypes():
    lines = [{**WELL, "step": 10 * i, "teacher_spread": math.log(8), "patch_spread": math.log(8)} for i in range(1, 60)]
    assert alarms(lines, prototypes=65536, rows=8) == []
    assert {alarm.kind for alarm in alarms(lines, prototypes=65536, rows=None)} == {"point", "patch_point"}


def test_a_teacher_with_a_long_memory_is_well_in_a_long_run():
    slow = [{**WELL, "step": 100 * i, "momentum": 0.9995} for i in range(1, 300)]
    assert alarms(slow, total_steps=100_000) == []
    assert [alarm.kind for alarm in alarms(slow, total_steps=2_000)] == ["teacher"]


def test_bad_steps_are_told_at_each_doubling():
    told = alarms({"step": 10 * (i + 1), "cls": 5.0, "skipped": i} for i in range(9))
    assert [alarm.text.split()[0] for alarm in told] == ["1", "2", "4", "8"] and {alarm.kind for alarm in told} == {"skipped"}
    assert "bad_batches.jsonl" in told[0].text


def test_a_method_without_prototypes_has_only_that_alarm():
    assert alarms(({"step": 100 + i, "loss": 1.0} for i in range(9)), prototypes=None) == []


def test_a_single_prototype_is_no_choice():
    assert alarms(({**WELL, "step": 100 + i, "cls": 0.0, "teacher_entropy": 0.0, "teacher_spread": 0.0} for i in range(9)), prototypes=1) == []


def test_knn_below_the_untrained_network_speaks_once_in_the_second_half():
    judge = Health(1000, total_steps=100)
    told = [judge.judge(step, "knn", {"top1": top1}) for step, top1 in ((0, 30.0), (25, 20.0), (50, 29.5), (75, 28.9), (100, 20.0))]
    assert [bool(each) for each in told] == [False, False, False, True, False]
    assert told[3][0].kind == "knn" and "28.9 %" in told[3][0].text and "30.0 %" in told[3][0].text
    assert Health(1000, total_steps=100).judge(100, "knn", {"top1": 1.0}) == []  # nobody knows the untrained network's
    assert judge.judge(0, "linear", {"top1": 1.0}) == []
