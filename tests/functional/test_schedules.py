"""Schedules against closed forms and the public logs of DINO and iBOT."""

import math

import pytest

from maskwise.errors import UserError
from maskwise.functional import schedules
from support.temperatures import WARM_UP

A1 = 5338 * 100  # steps of the recipe AttMask-Hint, ViT-S/16, 100 epochs


def a1_lr(step):
    return schedules.cosine(step, A1, 4.6875e-4, 1e-6, warmup=10 * 5338)


def test_learning_rate_of_a1():
    assert a1_lr(0) == 0.0
    assert a1_lr(1) == pytest.approx(8.7815433e-09, rel=1e-8)
    assert a1_lr(53379) == a1_lr(53380) == 4.6875e-4
    assert a1_lr(53381) == pytest.approx(4.687499999949995e-04, rel=1e-15)
    assert a1_lr(A1 - 1) == pytest.approx(1.000000005e-06, rel=5e-10)
    assert a1_lr(A1 // 2) == pytest.approx(2.754869676e-04, rel=2e-10)


def epoch_mean(values, epoch, steps=2502):
    return math.fsum(values(step) for step in range(epoch * steps, (epoch + 1) * steps)) / steps


def test_epoch_means_of_d1():
    """Equal to public logs of DINO and iBOT."""
    lr = lambda step: schedules.cosine(step, 2502 * 100, 1e-3, 1e-6, warmup=10 * 2502)
    wd = lambda step: schedules.cosine(step, 2502 * 100, 0.04, 0.4)
    expected = {0: 4.9982013669611e-05, 1: 1.4998601063192e-04, 9: 9.5001798633039e-04, 10: 9.9989862937860e-04}
    assert {epoch: epoch_mean(lr, epoch) for epoch in expected} == pytest.approx(expected, rel=1e-12)
    expected = {0: 0.04002958960483862, 1: 0.04020716317255341, 9: 0.04796399995320647}
    assert {epoch: epoch_mean(wd, epoch) for epoch in expected} == pytest.approx(expected, rel=1e-12)


def test_weight_decay_and_momentum():
    wd = lambda step: schedules.cosine(step, A1, 0.04, 0.4)
    assert wd(0) == pytest.approx(0.04, rel=1e-15) and wd(A1 // 2) == pytest.approx(0.22) and wd(A1 - 1) < 0.4
    m = lambda step: schedules.cosine(step, A1, 0.996, 1.0)
    assert m(0) == 0.996 and m(A1 // 2) == pytest.approx(0.998, rel=1e-14)
    assert m(3 * A1 // 4) == pytest.approx(0.9994142135623731, rel=1e-14)
    assert 1 - m(A1 - 1) == pytest.approx(3.46e-14, rel=0.01)


def test_class_temperature():
    temperatures = {epoch: schedules.temperature(epoch, 0.04, 0.07, 30) for epoch in WARM_UP}
    assert temperatures == pytest.approx(WARM_UP, abs=5e-7, rel=0)


def test_patch_temperature_with_a_later_start():
    for epoch in range(51):
        assert schedules.temperature(epoch, 0.04, 0.07, 30, hold=50) == 0.04
    assert schedules.temperature(60, 0.04, 0.07, 30, hold=50) == pytest.approx(0.050345, abs=5e-7)
    assert schedules.temperature(79, 0.04, 0.07, 30, hold=50) == pytest.approx(0.07)


def test_warm_ups_of_none_and_of_one():
    assert schedules.temperature(0, 0.04, 0.07, 0) == 0.07
    assert [schedules.temperature(epoch, 0.04, 0.07, 1) for epoch in (0, 1)] == [0.04, 0.07]
    assert [schedules.cosine(step, 10, 1.0, 0.0, warmup=1, warmup_start=0.25) for step in (0, 1)] == [0.25, 1.0]
    assert schedules.cosine(0, 10, 1.0, 0.0) == 1.0
    assert [schedules.cosine(step, 3, 1.0, 0.0, warmup=3) for step in (0, 1, 2, 3)] == [0.0, 0.5, 1.0, 0.0]
    assert schedules.cosine(25, 10, 1.0, 0.5) == 0.5


def test_constant_within_an_epoch():
    """The temperature depends on the epoch alone."""
    assert schedules.temperature(3.99, 0.04, 0.07, 30) == schedules.temperature(3, 0.04, 0.07, 30)


def test_warm_up_longer_than_the_run():
    with pytest.raises(UserError, match="longer than the run"):
        schedules.cosine(0, 10, 1.0, 0.0, warmup=11)


def test_trapezoid_against_its_closed_form():
    """Warm-up, constant, and 1 - sqrt in the last steps; none of it depends on the length before the decay begins."""
    rate = lambda step, total=100, decay=20: schedules.trapezoid(step, total, 3.0, 0.5, decay, warmup=10)
    assert [rate(step) for step in (0, 9, 10, 80)] == [0.0, 3.0, 3.0, 3.0]
    for step in range(80, 101):
        assert rate(step) == pytest.approx(0.5 + 2.5 * (1 - math.sqrt((step - 80) / 20)), rel=1e-15)
    assert rate(85) == pytest.approx(1.75) and rate(100) == rate(130) == 0.5
    assert [rate(step) for step in range(81)] == [rate(step, 300, 60) for step in range(81)]
    assert [rate(step, decay=0) for step in (10, 99, 100)] == [3.0, 3.0, 3.0]
    with pytest.raises(UserError, match="longer than the run of 25"):
        rate(0, 25)


def test_weight_decay_and_momentum_of_a_late_decay():
    momentum = lambda step, total=100: schedules.late_cosine(step, total, 0.996, 1.0, total // 5)
    assert {momentum(step) for step in range(81)} == {0.996} and momentum(100) == 1.0
    for step in range(80, 101):
        assert momentum(step) == pytest.approx(1 - 0.002 * (1 + math.cos(math.pi * (step - 80) / 20)), rel=1e-15)
    assert [momentum(step) for step in range(81)] == [momentum(step, 300) for step in range(81)]
    assert [schedules.late_cosine(step, 100, 0.04, 0.4) for step in (0, 100)] == [0.04, 0.04]
