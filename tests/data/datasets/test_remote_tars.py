"""Tar files in object storage and on a web server: bit-equal to local ones, in any process, whatever fails between."""

import asyncio
import gc
import os
import random
import re
import sys
import threading

import pytest
import torch

from data.datasets.test_tar import CROPS, pack, png
from maskwise.data.datasets.remote_tars import cache_file
from maskwise.data.datasets.subset import Subset
from maskwise.data.datasets.tar import Tar
from maskwise.data.loader import batches
from maskwise.errors import UserError
from maskwise.storage import store as requests
from maskwise.storage.options import RemoteOptions
from support.object_store import file_server, running_store

pytest.importorskip("moto", reason="moto is not installed: pip install 'moto[s3]' flask flask-cors")
pytest.importorskip("s3fs", reason="s3fs is not installed")
IMAGES = 24


@pytest.fixture(scope="module")
def bucket():
    with running_store() as (proxy, client):
        requests._forget()
        yield proxy, client
    requests._forget()


@pytest.fixture
def sets(bucket, tmp_path, monkeypatch):
    """Three tar files on disk and in the bucket, an empty cache folder, pauses without length."""
    proxy, client = bucket
    proxy.reset()
    monkeypatch.setenv("MASKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(requests.Patience, "pause", lambda patience, failures: 0.001)
    for shard in range(3):
        files = {f"{c}/{shard}{k}.png": png(10 * shard + k, (12 + k, 9)) for c in "vu" for k in range(4)}
        path = pack(tmp_path / "sets" / f"p-{shard:02d}.tar", {**files, "readme.txt": b"x" * 3000})
        client.upload_file(str(path), "images", f"sets/{path.name}")
    return proxy, client, tmp_path / "sets"


def same(one, other):
    assert len(one) == len(other) == IMAGES and one.contents() == other.contents()
    assert one.fingerprint() == other.fingerprint() and torch.equal(one.labels, other.labels)
    assert one.classes == other.classes
    assert [(one.name(k), one.source(k)) for k in range(IMAGES)] == [
        (other.name(k), other.source(k)) for k in range(IMAGES)
    ]


@pytest.mark.parametrize(
    "path", ["s3://images/sets", "s3://images/sets/p-*.tar", "s3://images/sets/p-{00..02}.tar", "file://{}"]
)
def test_equal_to_local_files(sets, path):
    _, _, folder = sets
    same(Tar(folder), Tar(path.format(folder) if "file" in path else path))


def test_a_split_and_one_file(sets):
    _, _, folder = sets
    assert Tar("s3://images", split="sets").fingerprint() == Tar(folder).fingerprint()
    assert Tar("s3://images/sets/p-01.tar").fingerprint() == Tar(folder / "p-01.tar").fingerprint()
    with pytest.raises(UserError, match="data.split needs a folder"):
        Tar("s3://images/sets/p-01.tar", split="x")


def test_labels_of_cls_members_come_with_the_index(sets):
    proxy, client, folder = sets
    files = {}
    for k, label in enumerate((2, 0, 1)):
        files |= {f"{k}.png": png(k), f"{k}.cls": f"{label}\n".encode()}
    client.upload_file(str(pack(folder / "c.tar", files)), "images", "c.tar")
    before = len(proxy.requests)
    assert Tar("s3://images/c.tar").labels.tolist() == [2, 0, 1] == Tar(folder / "c.tar").labels.tolist()
    assert len(proxy.requests) - before == 2  # HEAD, and one range with all headers and labels


def test_the_index_is_read_once_and_again_when_the_file_changes(sets, tmp_path):
    proxy, client, folder = sets
    Tar("s3://images/sets")
    proxy.reset()
    data = Tar("s3://images/sets")
    assert {method for method, path, _ in proxy.requests if path.endswith(".tar")} == {"HEAD"}
    # the same size, another content: only the ETag tells
    changed = {f"{c}/{k}.png": png(90 + k, (12 + k, 9)) for c in "uv" for k in range(4)}
    path = pack(folder / "p-01.tar", {**changed, "readme.txt": b"y" * 3000})
    client.upload_file(str(path), "images", "sets/p-01.tar")
    proxy.reset()
    again = Tar("s3://images/sets")
    ranges = [path for method, path, found in proxy.requests if method == "GET" and found]
    assert {os.path.basename(path) for path in ranges} == {"p-01.tar"}
    assert again.fingerprint() == Tar(folder).fingerprint() != data.fingerprint()
    for damaged in (b"", b"PK\3\4 no array"):
        cache_file(tmp_path / "cache", "s3://images/sets/p-02.tar").write_bytes(damaged)
        assert Tar("s3://images/sets").fingerprint() == again.fingerprint()


def test_images_are_read_by_ranges_and_once_with_the_cache(sets):
    proxy, _, folder = sets
    data, plain = Tar("s3://images/sets"), Tar(folder)
    proxy.reset()
    for _ in range(2):
        assert [data.source(k) for k in range(IMAGES)] == [plain.source(k) for k in range(IMAGES)]
    expected = [f"bytes={start}-{start + size - 1}" for _, start, size in data.places.tolist()]
    assert [found for _, _, found in proxy.requests] == expected
    small = Tar("s3://images/sets", remote=RemoteOptions(cache=1e-6))
    proxy.reset()
    small.source(0), small.source(0)
    assert small.remote.cache.limit == 1074
    none = Tar("s3://images/sets", remote=RemoteOptions(cache=0))
    proxy.reset()
    none.source(0), none.source(0)
    assert none.remote.cache is None and len(proxy.requests) == 2


def same_batches(ours, theirs):
    count = 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.global_crops, other.global_crops) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.local_crops, other.local_crops) and torch.equal(one.index, other.index)
        assert one.corrupt == other.corrupt == {}
        count += 1
    return count


@pytest.mark.parametrize("workers, world, start", [(0, 1, 0), (2, 2, 3)])
def test_batches_of_any_workers_ranks_and_start_equal_those_of_local_files(sets, workers, world, start):
    _, _, folder = sets
    plain = Tar(folder)
    rows = list(range(IMAGES - 1, -1, -1))  # a subset passes its rows on
    for rank in range(world):
        data = Subset(Tar("s3://images/sets"), rows)
        data.source(0)  # this process has used its filesystem before the workers are forked
        options = dict(batch_size=6, total_steps=6, start_step=start, cache="none", rank=rank, world_size=world)
        ours = batches(data, CROPS, workers=workers, **options)
        assert same_batches(ours, batches(Subset(plain, rows), CROPS, **options)) == 6 - start


def test_several_reads_are_in_flight(sets):
    proxy, _, folder = sets
    data = Tar("s3://images/sets", remote=RemoteOptions(reads=5, cache=0))
    proxy.reset()
    five = threading.Event()

    def held(method, path, number):
        if proxy.flying >= 5:
            five.set()
        assert five.wait(120)

    proxy.fault = held
    for _ in batches(data, CROPS, batch_size=24, total_steps=1, cache="none"):
        pass
    assert proxy.most == 5 and len(proxy.requests) == IMAGES


def drawn(number, *kinds):
    """A fault for a third of the requests, drawn by their number: a period could hit the same request of each try."""
    draw = random.Random(number)
    return draw.choice(kinds) if draw.random() < 0.35 else None


FAULTS = {
    "500": lambda method, path, number: drawn(number, "500"),
    "cut": lambda method, path, number: drawn(number, "cut"),
    "short": lambda method, path, number: drawn(number, "short"),
    "mixed": lambda method, path, number: drawn(number, "500", "cut", "short", "late"),
}


@pytest.mark.parametrize(
    "kind, workers", [("mixed", 0), *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in FAULTS)]
)
def test_faults_change_nothing(sets, kind, workers):
    proxy, _, folder = sets
    plain = Tar(folder)
    proxy.fault = FAULTS[kind]
    data = Tar("s3://images/sets", remote=RemoteOptions(reads=4, cache=0))
    options = dict(batch_size=8, total_steps=3, cache="none")
    assert same_batches(batches(data, CROPS, workers=workers, **options), batches(plain, CROPS, **options)) == 3
    assert sum(FAULTS[kind](*request[:2], number) is not None for number, request in enumerate(proxy.requests)) > 5
    same(data, plain)


def test_a_lost_bucket_and_a_removed_file_end_in_one_line(sets):
    proxy, client, _ = sets
    data = Tar("s3://images/sets", remote=RemoteOptions(timeout=0.3, cache=0))
    proxy.fault = lambda *request: "cut"
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^data.path: s3://images/sets/p-0\d.tar could not be reached for 0.3 s"):
            list(batches(data, CROPS, batch_size=8, total_steps=2, cache="none", workers=workers))
    proxy.fault = lambda *request: "403"
    data.remote.store = requests.Store("data.path", requests.Patience(60))
    data.expect([])  # what was being read is given up
    with pytest.raises(UserError, match=r"no permission to read it \(AccessDenied\)"):
        data.source(0)
    proxy.reset()
    client.delete_object(Bucket="images", Key="sets/p-00.tar")
    with pytest.raises(UserError, match="p-00.tar does not exist"):
        data.source(0)


@pytest.mark.parametrize(
    "path, words",
    [
        ("s3://images/none.tar", "s3://images/none.tar does not exist"),
        ("s3://no-bucket-here/x.tar", "there is no bucket s3://no-bucket-here"),
        ("s3://images/empty", "no .tar files in s3://images/empty"),
        ("ftp://host/x.tar", "unknown protocol ftp://"),
        ("s3://images/text.tar", "is not a valid tar file"),
        ("http://127.0.0.1:9/*.tar", "cannot be listed over HTTP"),
    ],
)
def test_addresses_without_images_give_one_line(sets, path, words):
    _, client, _ = sets
    client.put_object(Bucket="images", Key="text.tar", Body=b"no" * 600)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        Tar(path, remote=RemoteOptions(timeout=0.1))
    assert str(caught.value).startswith("data.path: ") and "\n" not in str(caught.value)


def test_missing_credentials_and_packages_are_named(sets, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    requests._forget()
    with pytest.raises(UserError, match="no credentials for s3://images; set AWS_ACCESS_KEY_ID"):
        Tar("s3://images/sets/p-00.tar")
    requests._forget()
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="s3:// needs the package s3fs; pip install s3fs"):
        Tar("s3://images/sets/p-00.tar")
    monkeypatch.undo()
    requests._forget()


def test_a_web_server_with_ranges_and_one_without(sets):
    _, _, folder = sets
    with file_server(folder) as proxy:
        proxy.fault = FAULTS["mixed"]
        data = Tar(proxy.url + "/p-{00..02}.tar", remote=RemoteOptions(cache=0))
        same(data, Tar(folder))
        with pytest.raises(UserError, match="none.tar does not exist"):
            Tar(proxy.url + "/none.tar")
    with file_server(folder, whole=True) as proxy, pytest.raises(UserError, match="does not serve ranges"):
        Tar(proxy.url + "/p-00.tar").source(3)


def test_datasets_of_local_files_say_what_storage_is_read_as(sets):
    from maskwise.data.datasets import DATASETS

    for kind in ("folder", "list"):
        with pytest.raises(UserError, match="s3:/+images/sets is in object storage, which is read as tar files"):
            DATASETS[kind]("s3://images/sets")


def test_a_forked_process_leaves_the_connections_of_its_parent_alone(bucket):
    """Its garbage is collected in its own event loop, where s3fs closes what was inherited."""
    proxy, client = bucket
    proxy.reset()
    client.put_object(Bucket="images", Key="forked.bin", Body=b"0123456789")
    store = requests.Store("data.path")
    assert store.read("s3://images/forked.bin", 2, 3) == b"234"
    child = os.fork()
    if not child:
        import fsspec.asyn

        store.read("s3://images/forked.bin", 0, 1)
        asyncio.run_coroutine_threadsafe(collected(), fsspec.asyn.get_loop()).result()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    before = len(proxy.requests)
    assert store.read("s3://images/forked.bin", 5, 2) == b"56"
    assert len(proxy.requests) == before + 1, "the first request was lost, after 30 seconds"
    client.delete_object(Bucket="images", Key="forked.bin")


async def collected():
    """Collect garbage, and let what it has started end."""
    gc.collect()
    await asyncio.sleep(0.01)
