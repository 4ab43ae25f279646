"""Collapse alarms: thresholds, texts, raised once and never in a healthy run."""

import math

import pytest

from maskwise.engine import collapse_alarms
from maskwise.engine.collapse_alarms import ALARMS, CollapseAlarms

LN = math.log(1000)
HEALTHY = {
    "cls": 4.0,
    "teacher_entropy": 2.0,
    "teacher_spread": 3.5,
    "patch": 2.0,
    "patch_entropy": 2.0,
    "patch_spread": 4.0,
    "feature_std": 0.6,
    "feature_rank": 3.0,
    "feature_duplicates": 0.0,
    "mask_share": 0.15,
    "mask_agreement": 0.1,
    "teacher_gap": 0.01,
    "momentum": 0.9,
    "skipped": 0,
}
COLLAPSED = {  # kind: the numbers that raise it, just inside the threshold
    "student_equals_teacher": {"teacher_gap": 9e-7},
    "stale_teacher": {"momentum": 0.9999},
    "loss_at_log_k": {"cls": LN * 0.991},
    "uniform_targets": {"teacher_entropy": LN * 0.981},
    "single_prototype": {"teacher_spread": 0.39 * math.log(128)},
    "uniform_patch_targets": {"patch_entropy": LN * 0.981},
    "single_patch_prototype": {"patch_spread": 0.39 * math.log(128)},
    "constant_features": {"feature_std": collapse_alarms.CONSTANT - 0.01},
    "duplicate_features": {"feature_duplicates": collapse_alarms.DUPLICATES + 0.01},
    "rank_collapse": {"feature_rank": collapse_alarms.LOW_RANK - 0.01},
    "identical_masks": {"mask_agreement": collapse_alarms.EQUAL_MASKS + 0.01},
}


def alarms(lines, prototypes=1000, patience=100, **options):
    checks = CollapseAlarms(prototypes, patience=patience, window=5, **{"crops_per_batch": 128, **options})
    return [alarm for line in lines for alarm in checks.check(line)]


def test_every_alarm_has_a_case():
    assert COLLAPSED.keys() == ALARMS.keys()


def test_healthy_run_raises_no_alarm():
    assert alarms({**HEALTHY, "step": 10 * i, "cls": 6.9 - 0.02 * i} for i in range(60)) == []


@pytest.mark.parametrize("kind", COLLAPSED)
def test_each_alarm_is_raised_once_after_its_patience_and_names_a_remedy(kind):
    lines = [{**HEALTHY, **COLLAPSED[kind], "step": 10 * i} for i in range(1, 60)]
    (alarm,) = alarms(lines)
    assert alarm.kind == kind and "{" not in alarm.text and "\n" not in alarm.text
    assert (
        any(f"{section}." in alarm.text for section in ("teacher", "method", "optimizer", "head", "masking"))
        or "look for" in alarm.text
    )
    assert alarms(lines[:9]) == []  # before its patience
    late = [*({**HEALTHY, "step": 10 * i} for i in range(1, 40)), *lines[39:42]]
    assert alarms(late) == [] or kind == "stale_teacher"  # not yet the whole window


def test_one_healthy_record_postpones_an_alarm():
    lines = [{**HEALTHY, **(COLLAPSED["constant_features"] if i % 5 else {}), "step": 10 * i} for i in range(1, 60)]
    assert alarms(lines) == []


def test_records_without_values_raise_no_alarm():
    assert (
        alarms(
            {
                "step": 10 * i,
                "loss": None,
                "cls": None,
                "teacher_entropy": None,
                "feature_std": None,
                "mask_share": 0.0,
                "mask_agreement": 1.0,
            }
            for i in range(1, 60)
        )
        == []
    )


def test_masks_are_ignored_where_nothing_is_masked():
    lines = [
        {**HEALTHY, "step": 10 * i, "mask_share": 0.0, "mask_agreement": 1.0, "patch_spread": 0.0, "patch_entropy": 0.0}
        for i in range(1, 60)
    ]
    assert alarms(lines) == []


def test_prototype_alarm_accounts_for_small_batches():
    lines = [
        {**HEALTHY, "step": 10 * i, "teacher_spread": math.log(8), "patch_spread": math.log(8)} for i in range(1, 60)
    ]
    assert alarms(lines, prototypes=65536, crops_per_batch=8) == []
    assert {alarm.kind for alarm in alarms(lines, prototypes=65536, crops_per_batch=None)} == {
        "single_prototype",
        "single_patch_prototype",
    }


def test_slow_teacher_is_healthy_in_a_long_run():
    slow = [{**HEALTHY, "step": 100 * i, "momentum": 0.9995} for i in range(1, 300)]
    assert alarms(slow, total_steps=100_000) == []
    assert [alarm.kind for alarm in alarms(slow, total_steps=2_000)] == ["stale_teacher"]


def test_skipped_steps_are_reported_at_each_doubling():
    raised = alarms({"step": 10 * (i + 1), "cls": 5.0, "skipped": i} for i in range(9))
    assert [alarm.text.split()[0] for alarm in raised] == ["1", "2", "4", "8"] and {alarm.kind for alarm in raised} == {
        "skipped"
    }
    assert "bad_batches.jsonl" in raised[0].text


def test_method_without_prototypes_has_only_the_skipped_steps_alarm():
    assert alarms(({"step": 100 + i, "loss": 1.0} for i in range(9)), prototypes=None) == []


def test_single_prototype_raises_no_alarm():
    assert (
        alarms(
            ({**HEALTHY, "step": 100 + i, "cls": 0.0, "teacher_entropy": 0.0, "teacher_spread": 0.0} for i in range(9)),
            prototypes=1,
        )
        == []
    )


def test_knn_below_the_untrained_network_is_reported_once_in_the_second_half():
    checks = CollapseAlarms(1000, total_steps=100)
    raised = [
        checks.check_evaluation(step, "knn", {"top1": top1})
        for step, top1 in ((0, 30.0), (25, 20.0), (50, 29.5), (75, 28.9), (100, 20.0))
    ]
    assert [bool(step_alarms) for step_alarms in raised] == [False, False, False, True, False]
    assert raised[3][0].kind == "knn" and "28.9 %" in raised[3][0].text and "30.0 %" in raised[3][0].text
    assert (
        CollapseAlarms(1000, total_steps=100).check_evaluation(100, "knn", {"top1": 1.0}) == []
    )  # the untrained network was not evaluated
    assert checks.check_evaluation(0, "linear", {"top1": 1.0}) == []
