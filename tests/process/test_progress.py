import io

import pytest
import torch

from maskwise.evaluation.features.reading import read
from maskwise.process import progress
from maskwise.process.progress import counted, counting, images_read, showing, whole
from support.planted import Pictures, gray


class Terminal(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock in seconds that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.delenv("TERM", raising=False)
    return now


def shown(monkeypatch, clock, terminal, seconds, count=10, title="knn"):
    """Return what `count` steps of `seconds` with 5 images each write."""
    stream = Terminal(terminal)
    monkeypatch.setattr("sys.stderr", stream)
    with showing(title), counting(5 * count) as progress:
        for _ in range(count):
            clock[0] += seconds
            progress.add(5)
    return stream.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch, clock):
    text = shown(monkeypatch, clock, False, seconds=7)
    # Due after 10 s and then every 30 s: at 14, 49 of the steps at 7, 14, ..., 70 s.
    assert text.splitlines() == ["knn, images 10/50  0.71 img/s  eta 0:56", "knn, images 35/50  0.71 img/s  eta 0:21"]


def test_a_short_computation_prints_nothing_into_a_log(monkeypatch, clock):
    assert shown(monkeypatch, clock, False, seconds=0.9) == ""


def test_a_terminal_gets_one_line_that_is_erased(monkeypatch, clock):
    text = shown(monkeypatch, clock, True, seconds=0.25, count=3)
    lines = text.split("\r")
    assert [line.strip() for line in lines] == [
        "",
        "knn, images 5/15  20 img/s  eta 0:00",
        "knn, images 10/15  20 img/s  eta 0:00",
        "knn, images 15/15  20 img/s  eta 0:00",
        "",
        "",
    ]
    assert "\n" not in text
    assert {len(line) for line in lines[1:5]} == {79}  # each covers the one before, and what a training bar left


def test_nothing_is_shown_without_a_title_or_on_other_ranks(monkeypatch, clock):
    assert shown(monkeypatch, clock, True, seconds=60, title=None) == ""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert shown(monkeypatch, clock, True, seconds=60) == ""
    assert shown(monkeypatch, clock, False, seconds=60) == ""
    monkeypatch.setenv("RANK", "0")
    assert shown(monkeypatch, clock, False, seconds=60).startswith("knn, images 5/50")


def test_parts_of_a_loop_count_when_the_next_is_asked_for(monkeypatch, clock):
    stream = Terminal(False)
    monkeypatch.setattr("sys.stderr", stream)
    with showing("linear"):
        for epoch in counted(range(4), 4, "epochs", "epoch"):
            clock[0] += 20 * (epoch < 1)
    assert stream.getvalue() == "linear, epochs 1/4  0.05 epoch/s  eta 1:00\n"


def test_readings_of_one_set_count_together(monkeypatch, clock):
    stream = Terminal(False)
    monkeypatch.setattr("sys.stderr", stream)
    with showing("knn"), whole(100):
        for _ in range(3):
            with images_read(20) as progress:
                clock[0] += 9
                progress.add(20)
        with counting(5, "queries", "query") as other:  # counted apart
            clock[0] += 11
            other.add(1)
    assert stream.getvalue().splitlines() == [
        "knn, images 40/100  2.22 img/s  eta 0:27",
        "knn, queries 1/5  0.09 query/s  eta 0:44",
    ]


def test_images_that_are_read_count_when_the_next_are_asked_for(monkeypatch, clock):
    stream = Terminal(False)
    monkeypatch.setattr("sys.stderr", stream)
    dataset = Pictures([gray(value) for value in range(7)])
    with showing("knn"):
        for _ in read(dataset, lambda image: image, torch.arange(7), 3, {}):
            clock[0] += 40
    assert stream.getvalue().splitlines() == [
        "knn, images 3/7  0.07 img/s  eta 0:53",
        "knn, images 6/7  0.07 img/s  eta 0:13",
        "knn, images 7/7  0.06 img/s  eta 0:00",
    ]
