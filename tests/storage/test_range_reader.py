"""Ranges read ahead: the right bytes, at most so many requests in flight, none twice."""

import os
import pickle
import threading

import pytest

from maskwise.storage.range_reader import RangeReader

DATA = {"a": bytes(range(256)), "b": bytes(reversed(range(256)))}


class Counting:
    """A store that counts requests; `gate` holds them back until they may answer."""

    def __init__(self):
        self.asked, self.flying, self.most = [], 0, 0
        self.gate, self.guard = threading.Event(), threading.Lock()
        self.gate.set()

    def __getstate__(self):
        return {}

    def __setstate__(self, state):
        self.__init__()

    def read(self, address, start, size):
        with self.guard:
            self.asked.append((address, start, size))
            self.flying += 1
            self.most = max(self.most, self.flying)
        assert self.gate.wait(20)
        with self.guard:
            self.flying -= 1
        if start == 200:
            raise OSError("injected")
        return DATA[address][start : start + size]


def content(place):
    number, start, size = place
    return DATA["ab"[number]][start : start + size]


def test_expected_ranges_are_read_once_and_in_flight_up_to_the_limit():
    store = Counting()
    reader = RangeReader(["a", "b"], store, reads=4)
    places = [(k % 2, 3 * k, 5) for k in range(30)] + [(0, 0, 5)]  # the first one twice
    store.gate.clear()
    reader.expect(places)
    assert len(reader._started) == 4 and len(reader._waiting) == 26
    store.gate.set()
    for place in places:
        assert reader.read(*place) == content(place) and len(reader._started) <= 4
    assert len(store.asked) == 30 and store.most <= 4 and not reader._started and not reader._uses


def test_unexpected_ranges_and_new_expectations():
    store = Counting()
    reader = RangeReader(["a", "b"], store, reads=2)
    reader.expect([(0, 0, 4), (0, 10, 4), (0, 20, 4)])
    assert reader.read(1, 50, 6) == content((1, 50, 6))
    reader.expect([(1, 1, 4), (1, 2, 4)])
    assert [reader.read(1, k, 4) for k in (2, 1)] == [content((1, 2, 4)), content((1, 1, 4))]
    assert not reader._started and not reader._waiting


def test_an_error_comes_where_its_range_is_read():
    reader = RangeReader(["a"], Counting(), reads=2)
    reader.expect([(0, 0, 4), (0, 200, 4), (0, 8, 4)])
    assert reader.read(0, 0, 4) == content((0, 0, 4))
    with pytest.raises(OSError, match="injected"):
        reader.read(0, 200, 4)
    assert reader.read(0, 8, 4) == content((0, 8, 4))


def test_copies_and_forks_start_without_threads():
    reader = RangeReader(["a"], Counting(), reads=2)
    reader.expect([(0, 0, 4), (0, 4, 4)])
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(0, 4, 4) == content((0, 4, 4)) and not copy._started
    child = os.fork()
    if not child:
        reader._guard.acquire()  # as if another thread had held it
        reader.expect([(0, 8, 4)])
        os._exit(0 if reader.read(0, 8, 4) == content((0, 8, 4)) and reader._process == os.getpid() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_map_keeps_order_and_raises():
    reader = RangeReader(["a"], Counting(), reads=3)
    assert reader.map(lambda k: k * k, list(range(10))) == [k * k for k in range(10)]
    with pytest.raises(ZeroDivisionError):
        reader.map(lambda k: 1 // k, [1, 0, 2])
