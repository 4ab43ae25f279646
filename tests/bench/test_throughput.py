"""Images per second, with a clock by hand."""

import time

import pytest
import torch

from maskwise.bench import throughput
from maskwise.bench.throughput import images_per_second


class Clock:
    """A clock that a call moves on by the next of the given durations."""

    def __init__(self, *durations):
        self.now, self.durations, self.shapes = 100.0, list(durations), []

    def __call__(self, images):
        self.now += self.durations.pop(0)
        self.shapes.append(tuple(images.shape))


def test_the_median_call_after_a_warm_up_counts(monkeypatch):
    clock = Clock(9.0, 7.0, 0.5, 0.2, 0.25, 0.4, 8.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    # two calls of warm-up; .5 + .2 + .25 + .4 s reach 1.3 s, and the median of these is .325 s
    assert images_per_second(clock, (6, 8), 13, torch.device("cpu"), 1.3) == pytest.approx(13 / 0.325)
    assert clock.durations == [8.0] and set(clock.shapes) == {(13, 3, 6, 8)}


def test_slow_networks_are_timed_three_times(monkeypatch):
    clock = Clock(9.0, 7.0, 5.0, 3.0, 4.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    assert images_per_second(clock, (6, 6), 2, torch.device("cpu"), 0.0) == pytest.approx(2 / 4.0)
    assert not clock.durations and throughput.FEWEST == 3
