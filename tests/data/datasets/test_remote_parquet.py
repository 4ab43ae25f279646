"""Parquet files in a bucket: equal to the same files on a disk, read by row groups, from any process."""

import pickle

import pytest
import torch

from data.datasets.test_tar import CROPS, png
from maskwise.data.datasets.huggingface import HuggingFace
from maskwise.data.datasets.remote_parquet import of_split
from maskwise.data.loader import batches
from maskwise.errors import UserError
from maskwise.storage import store as requests
from maskwise.storage.options import RemoteOptions
from support.object_store import file_server, running_store

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("moto", reason="moto is not installed: pip install 'moto[s3]' flask flask-cors")
pytest.importorskip("s3fs", reason="s3fs is not installed")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two Parquet files of training images and one of test images, on disk and in the bucket."""
    folder = tmp_path_factory.mktemp("sets")
    patch = pytest.MonkeyPatch()
    patch.setenv("MASKWISE_CACHE", str(folder / "cache"))
    patch.setattr(requests.Patience, "pause", lambda patience, failures: 0.001)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["u", "v"])})
    with running_store() as (proxy, client):
        requests._forget()
        for name, first, count in (("train-00000", 0, 11), ("train-00001", 11, 8), ("test-00000", 30, 5)):
            rows = range(first, first + count)
            images = [{"bytes": png(k, (9 + k % 5, 8)), "path": f"{k}.png"} for k in rows]
            table = datasets.Dataset.from_dict({"image": images, "label": [k % 2 for k in rows]}, features=features)
            file = folder / "set" / "data" / f"{name}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            table.to_parquet(file, batch_size=4)
            client.upload_file(str(file), "images", f"set/data/{file.name}")
        yield proxy, folder / "set"
    requests._forget()
    patch.undo()


def same(one, other):
    assert len(one) == len(other) and torch.equal(one.labels, other.labels) and one.classes == other.classes
    assert one.contents() == other.contents()
    assert all(one._stored(k) == other._stored(k) for k in range(len(one)))


def test_equal_to_the_same_files_on_disk(sets):
    proxy, folder = sets
    proxy.reset()
    remote = HuggingFace("s3://images/set")
    assert len(remote) == 19 and len(remote.table.groups) == 5
    same(remote, HuggingFace(folder))
    same(HuggingFace("s3://images/set", split="test"), HuggingFace(folder, split="test"))
    some = HuggingFace("s3://images/set/data/train-*.parquet", classes=["v"], per_class=3)
    same(some, HuggingFace(folder, classes=["v"], per_class=3))
    same(pickle.loads(pickle.dumps(remote)), remote)
    one = HuggingFace("s3://images/set", remote=RemoteOptions(cache=0))
    proxy.reset()
    assert one._stored(12) == remote._stored(12)
    ranges = [found.removeprefix("bytes=").split("-") for _, _, found in proxy.requests]
    size = (folder / "data" / "train-00001.parquet").stat().st_size
    assert 0 < sum(int(last) - int(first) + 1 for first, last in ranges) < 0.7 * size  # one of two row groups


def test_batches_of_workers_equal_local_ones_under_faults(sets):
    proxy, folder = sets
    proxy.reset()
    remote = HuggingFace("s3://images/set", remote=RemoteOptions(cache=0))
    proxy.fault = lambda method, path, number: (None, None, "500", "short", None, "cut", None)[number % 7]
    options = dict(batch_size=6, total_steps=3, cache="none")
    pairs = zip(
        batches(remote, CROPS, workers=1, **options), batches(HuggingFace(folder), CROPS, **options), strict=True
    )
    for one, other in pairs:
        assert torch.equal(one.global_crops, other.global_crops) and torch.equal(one.labels, other.labels)
        assert one.corrupt == {}


def test_mistakes_give_one_line(sets):
    _, folder = sets
    (folder / "data" / "text.parquet").write_text("no")
    for path, options, words in (
        ("s3://images/none", {}, "no .parquet files in s3://images/none"),
        ("s3://images/set", {"split": "val"}, "no .parquet files of split 'val'"),
        ("s3://images/set", {"config": "x"}, "data.config chooses"),
        ("s3://images/none.parquet", {}, "none.parquet does not exist"),
        ("http://127.0.0.1:9/set", {}, "cannot be listed over HTTP"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            HuggingFace(path, **options)
        assert "\n" not in str(caught.value)
    with file_server(folder / "data") as proxy:
        assert len(HuggingFace(f"{proxy.url}/test-00000.parquet")) == 5
        with pytest.raises(UserError, match="is not a Parquet file"):
            HuggingFace(f"{proxy.url}/text.parquet")


def test_splits_by_folders_and_names():
    files = ["a/train/x.parquet", "a/test-0.parquet", "a/training.parquet", "a/test.parquet"]
    assert of_split("a", files, None) == files[:1] and of_split("a/", files, "test") == [files[1], files[3]]
    assert of_split("a", files[1:2], None) == files[1:2]
