"""Alarms: what they need, that they speak once, what they say."""

import math

from maskwise.engine.health import Health


def alarms(lines, prototypes=1000, patience=100):
    health = Health(prototypes, patience=patience, window=5)
    return [text for line in lines for text in health.check(line)]


def test_a_falling_loss_is_healthy():
    assert alarms({"step": 10 * i, "cls": 6.9 - 0.02 * i, "teacher_entropy": 3.0, "skipped": 0} for i in range(60)) == []


def test_a_loss_stuck_at_ln_k_says_so_once_and_after_its_patience():
    (text,) = alarms({"step": 10 * i, "cls": math.log(1000) + 0.01, "teacher_entropy": 3.0} for i in range(60))
    assert "ln K = 6.91" in text and "teacher.temp" in text
    assert alarms({"step": 10 * i, "cls": math.log(1000)} for i in range(10)) == []


def test_one_prototype_and_no_preference():
    (point,) = alarms({"step": 100 + i, "cls": 0.01, "teacher_entropy": 0.01} for i in range(9))
    assert "one prototype" in point
    assert len(alarms({"step": 100 + i, "cls": 5.0, "teacher_entropy": math.log(1000)} for i in range(9))) == 1


def test_bad_steps_are_told_at_each_doubling():
    texts = alarms({"step": 10 * (i + 1), "cls": 5.0, "skipped": i} for i in range(9))
    assert [text.split()[0] for text in texts] == ["1", "2", "4", "8"]


def test_a_method_without_prototypes_has_only_that_alarm():
    assert alarms(({"step": 100 + i, "loss": 1.0} for i in range(9)), prototypes=None) == []
