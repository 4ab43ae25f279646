"""The loader on tar files of a bucket beside local ones: the files packed, and a miniature of the measurement."""

import pytest

from launch.reproduce import remote
from maskwise.data.datasets.tar import Tar


def test_both_tar_files_hold_both_classes(tmp_path):
    remote.pack(tmp_path, 6)
    images = Tar(tmp_path)
    assert len(images) == 6 and images.classes == ["a", "b"] and sorted(images.labels) == [0, 0, 0, 1, 1, 1]
    assert [len(Tar(tmp_path / f"train-000{k}.tar")) for k in range(2)] == [3, 3]


@pytest.mark.slow
def test_a_bucket_is_slower_by_its_latency(monkeypatch):
    """One read in flight gives at most one image per latency, whatever the machine."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    monkeypatch.setattr(remote, "LATENCIES", (40,))
    monkeypatch.setenv("MASKWISE_CACHE", "")
    measured = remote.main(16, 1)
    (bucket,) = measured["buckets"]
    assert bucket["latency_ms"] == 40 and len(measured["local"]) == 2
    assert 0 < bucket["one_read_in_flight"]["read"] <= 1000 / 40
    assert bucket["sixteen_reads_in_flight"]["read"] > bucket["one_read_in_flight"]["read"]
    assert set(bucket) == {
        *("latency_ms", "one_read_in_flight", "sixteen_reads_in_flight", "filling_the_cache", "from_the_cache")
    }
