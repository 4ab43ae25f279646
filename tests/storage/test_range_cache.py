"""The cache of ranges: bounded, checked, and shared by processes."""

import os
import random

from maskwise.storage.range_cache import CHECK, RangeCache, total

A, B = ("s3://b/a", "v1"), ("s3://b/b", "v1")


def files(folder):
    return [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]


def test_ranges_come_back_and_other_versions_do_not(tmp_path):
    cache = RangeCache(tmp_path, 10_000, [A, B])
    cache.put(0, 7, b"abc")
    assert cache.get(0, 7, 3) == b"abc" and RangeCache(tmp_path, 10_000, [B, A]).get(1, 7, 3) == b"abc"
    assert cache.get(1, 7, 3) is None and cache.get(0, 7, 2) is None
    assert RangeCache(tmp_path, 10_000, [("s3://b/a", "v2")]).get(0, 7, 3) is None


def test_damaged_and_cut_files_are_not_used(tmp_path):
    cache = RangeCache(tmp_path, 10_000, [A])
    cache.put(0, 0, bytes(100))
    (path,) = files(tmp_path)
    data = bytearray(open(path, "rb").read())
    for damaged in (data[:-1], bytes(len(data)), data[:50] + b"\1" + data[51:], b""):
        with open(path, "wb") as file:
            file.write(damaged)
        assert cache.get(0, 0, 100) is None or damaged == data
    cache.put(0, 0, bytes(100))
    assert cache.get(0, 0, 100) == bytes(100)


def test_the_limit_holds_and_what_is_in_stays(tmp_path):
    draw = random.Random(0)
    cache = RangeCache(tmp_path, 50_000, [A])
    ranges = {k * 2000: draw.randbytes(draw.randrange(1, 1500)) for k in range(300)}
    for start, data in ranges.items():
        cache.put(0, start, data)
        assert total(tmp_path) <= 50_000
    kept = [start for start, data in ranges.items() if cache.get(0, start, len(data)) == data]
    assert kept == list(ranges)[: len(kept)] and total(tmp_path) > 45_000
    assert total(tmp_path) == sum(len(ranges[start]) + CHECK for start in kept)


def test_other_files_make_room(tmp_path):
    RangeCache(tmp_path, 5_000, [A]).put(0, 0, bytes(4_000))
    cache = RangeCache(tmp_path, 5_000, [B])
    cache.put(0, 0, bytes(3_000))
    assert cache.get(0, 0, 3_000) == bytes(3_000) and total(tmp_path) == 3_000 + CHECK


def test_a_disk_that_refuses_is_no_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    cache = RangeCache(blocked, 10_000, [A])
    cache.put(0, 0, b"abc")
    assert cache.get(0, 0, 3) is None and cache.full
