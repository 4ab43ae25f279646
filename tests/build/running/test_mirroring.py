"""A run's copy in a bucket: complete at the end, continued on a fresh machine bit for bit, never half a checkpoint."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import maskwise
from maskwise.errors import UserError
from maskwise.storage import store as requests
from support import pair
from support.object_store import KEYS, running_store
from support.run_contents import last_checkpoint, tensors, untimed_lines

pytest.importorskip("moto", reason="moto is not installed: pip install 'moto[s3]' flask flask-cors")
pytest.importorskip("s3fs", reason="s3fs is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
TINY = str(Path(__file__).parents[3] / "configs" / "debug" / "tiny.yaml")
SMALL = (
    "data.count=24",
    "train.epochs=2",
    "train.save_every=2",
    "evaluate.knn_every=1",
    "evaluate.baselines=false",
    "evaluate.pictures_every=0",
    "evaluate.limit_bank=16",
    "speed.remote_timeout=0.5",
)  # 6 steps


@pytest.fixture(scope="module")
def bucket():
    with running_store("runs") as (proxy, client):
        requests._forget()
        yield proxy, client
    requests._forget()


@pytest.fixture
def place(bucket, request, monkeypatch):
    """An address of the test's own, the proxy and the client; pauses without length."""
    proxy, client = bucket
    proxy.reset()
    monkeypatch.setattr(requests.Patience, "pause", lambda patience, failures: 0.001)
    return f"s3://runs/{request.node.name.replace('[', '_').replace(']', '')}", proxy, client


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread):
    """A run without interruption and without a mirror."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    maskwise.train(maskwise.read_recipe(TINY, *SMALL), out=folder, quiet=True)
    return folder


def train(folder, address, *more):
    return maskwise.train(maskwise.read_recipe(TINY, *SMALL, f"train.mirror={address}", *more), out=folder)


def keys(client, address):
    prefix = address.removeprefix("s3://runs/") + "/"
    found = client.list_objects_v2(Bucket="runs", Prefix=prefix).get("Contents", [])
    return {item["Key"].removeprefix(prefix) for item in found}


def same_runs(one, other):
    here, there = tensors(one), tensors(other)
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
    assert untimed_lines(one) == untimed_lines(other)
    reports = sorted(path.name for path in (one / "reports").iterdir())
    assert reports == sorted(path.name for path in (other / "reports").iterdir()) and reports
    for name in reports:
        here, there = (json.loads((run / "reports" / name).read_text())["numbers"] for run in (one, other))
        assert here == there, name


def test_complete_at_the_end_and_equal_to_the_folder(place, whole, tmp_path, capsys):
    address, _, client = place
    train(tmp_path / "run", address)
    assert capsys.readouterr().err.strip().endswith(f"mirror: {address} is complete")
    same_runs(tmp_path / "run", whole)
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert keys(client, address) == files and not any("/." in f"/{name}" for name in files)
    for name in files:
        body = client.get_object(Bucket="runs", Key=f"{address.removeprefix('s3://runs/')}/{name}")["Body"].read()
        assert body == (tmp_path / "run" / name).read_bytes(), name
    for text in (*files, *(f"{path}" for path in files)):
        content = (tmp_path / "run" / text).read_bytes()
        assert not any(secret.encode() in content for secret in KEYS.values()), text
    # the same command again fetches and copies nothing new
    train(tmp_path / "run", address)
    assert "complete" in capsys.readouterr().err and keys(client, address) == files
    # a fresh machine finds the finished run
    assert train(tmp_path / "fresh", address)["status"] == "complete"
    same_runs(tmp_path / "fresh", whole)


def stop_after(step, monkeypatch):
    """Ask the run to stop after a step, as SIGTERM does."""
    from maskwise.engine.trainer import Trainer

    plain = Trainer.step

    def stopping(trainer, *inputs, **options):
        outputs = plain(trainer, *inputs, **options)
        if trainer.step_index == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return outputs

    monkeypatch.setattr(Trainer, "step", stopping)
    return lambda: monkeypatch.setattr(Trainer, "step", plain)


def test_a_fresh_machine_continues_bit_for_bit(place, whole, tmp_path, monkeypatch, capsys):
    address, _, client = place
    back = stop_after(3, monkeypatch)
    assert train(tmp_path / "first", address)["status"] == "preempted"
    back()
    assert f"mirror: {address} is complete" in capsys.readouterr().err
    shutil.copytree(tmp_path / "first", tmp_path / "stale")
    shutil.rmtree(tmp_path / "first")
    assert train(tmp_path / "second", address)["status"] == "complete"
    text = capsys.readouterr().err
    assert f"mirror: step_00000003 of {address} is now in {tmp_path / 'second'}" in text and "continuing" in text
    same_runs(tmp_path / "second", whole)
    assert [start["step"] for start in json.loads((tmp_path / "second" / "run.json").read_text())["starts"]] == [0, 3]
    # the first machine, back with its earlier state, takes the later one
    assert train(tmp_path / "stale", address)["step"] == 6
    assert "mirror: step_00000006" in capsys.readouterr().err
    same_runs(tmp_path / "stale", whole)


@pytest.mark.slow
def test_half_written_and_damaged_checkpoints_are_not_taken(place, whole, tmp_path, monkeypatch, capsys):
    address, _, client = place
    back = stop_after(4, monkeypatch)
    train(tmp_path / "first", address)
    back()
    prefix = address.removeprefix("s3://runs/")
    assert {name.split("/")[1] for name in keys(client, address) if name.startswith("checkpoints/step")} == {
        "step_00000002",
        "step_00000004",
    }
    client.delete_object(Bucket="runs", Key=f"{prefix}/checkpoints/step_00000004/meta.json")
    train(tmp_path / "second", address)
    assert "mirror: step_00000002 of" in capsys.readouterr().err
    same_runs(tmp_path / "second", whole)
    last = f"{prefix}/checkpoints/step_00000006/model.safetensors"
    client.put_object(Bucket="runs", Key=last, Body=b"damaged")
    train(tmp_path / "third", address)
    text = capsys.readouterr().err
    assert "step_00000006: the checksum of model.safetensors is wrong): using step_00000004 instead" in text
    same_runs(tmp_path / "third", whole)
    for step in (4, 6):
        client.put_object(Bucket="runs", Key=f"{prefix}/checkpoints/step_{step:08d}/model.safetensors", Body=b"x")
    with pytest.raises(UserError, match=f"train.mirror: no checkpoint in {address} is sound"):
        train(tmp_path / "fourth", address)
    assert not (tmp_path / "fourth").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_other_runs_and_recipes_are_refused(place, tmp_path):
    address, _, client = place
    train(tmp_path / "one", address, "train.epochs=1")
    before = keys(client, address)
    with pytest.raises(UserError, match=f"{address} was trained with .*train.epochs=1, not 2.*another train.mirror"):
        train(tmp_path / "two", address)
    assert not (tmp_path / "two").exists()
    maskwise.train(maskwise.read_recipe(TINY, *SMALL, "seed=5"), out=tmp_path / "three", quiet=True)
    with pytest.raises(UserError, match="holds another run than"):
        train(tmp_path / "three", address, "seed=5")
    assert keys(client, address) == before


@pytest.mark.parametrize(
    "address, words",
    [
        ("s3://no-bucket-here/run", "there is no bucket s3://no-bucket-here"),
        ("https://host/run", "cannot be written over HTTP"),
        ("s3://KEY:SECRET@runs/x", "holds a user name or key"),
        ("gs://bucket/run", "gs:// needs the package gcsfs; pip install gcsfs"),
    ],
)
def test_addresses_that_cannot_be_used_end_before_anything_is_written(place, tmp_path, address, words):
    if address.startswith("gs"):
        try:
            import gcsfs  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("gcsfs is installed")
    with pytest.raises(UserError, match=words) as caught:
        train(tmp_path / "run", address)
    assert "SECRET" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_storage_that_is_lost_never_stops_the_run(place, whole, tmp_path, capsys):
    address, proxy, client = place
    proxy.fault = lambda method, path, number: "cut" if method == "PUT" else None
    assert train(tmp_path / "run", address)["status"] == "complete"
    text = capsys.readouterr().err
    assert "could not be reached for 0.5 s" in text
    assert f"mirror: {address} is incomplete: step_00000006 could not be copied" in text
    assert not any(secret in text for secret in KEYS.values()) and "X-Amz" not in text
    same_runs(tmp_path / "run", whole)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*.safetensors"))
    proxy.reset()
    assert train(tmp_path / "run", address)["status"] == "complete"
    assert f"mirror: {address} is complete" in capsys.readouterr().err
    assert train(tmp_path / "fresh", address)["step"] == 6
    same_runs(tmp_path / "fresh", whole)


@pytest.mark.slow
def test_a_step_never_waits_for_the_mirror(place, tmp_path, monkeypatch):
    """Uploads are held back until the last step is done: the run gets there nevertheless."""
    import threading

    from maskwise.engine import mirror
    from maskwise.engine.run_log import RunLog

    address, _, client = place
    finished, plain = threading.Event(), mirror.Store.upload
    seen = []

    def upload(store, file, place):
        seen.append(finished.wait(600))
        plain(store, file, place)

    close = RunLog.close
    monkeypatch.setattr(mirror.Store, "upload", upload)
    monkeypatch.setattr(RunLog, "close", lambda run_log: (close(run_log), finished.set()))
    train(tmp_path / "run", address, "train.keep=1")
    assert all(seen) and "checkpoints/step_00000006/meta.json" in keys(client, address)
    assert {name.split("/")[1] for name in keys(client, address) if "step_" in name and "checkpoints" in name} == {
        "step_00000006"
    }


def killed_in_upload(folder, address, point):
    """Train in a child that is killed once a file of this name is in the bucket."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    plain = requests.Store.upload

    def upload(store, file, place):
        plain(store, file, place)
        if place.endswith(point):
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        requests.Store.upload = upload
        train(folder, address)
    finally:
        os._exit(1)


@pytest.mark.slow
def test_killed_during_an_upload(place, whole, tmp_path, capsys):
    address, _, client = place
    assert killed_in_upload(tmp_path / "first", address, "step_00000004/optimizer.safetensors") == -signal.SIGKILL
    assert "checkpoints/step_00000004/meta.json" not in keys(client, address)
    train(tmp_path / "second", address)
    assert "mirror: step_00000002 of" in capsys.readouterr().err
    same_runs(tmp_path / "second", whole)
    # the machine that was killed comes back: the mirror has passed it
    train(tmp_path / "first", address)
    assert "mirror: step_00000006 of" in capsys.readouterr().err
    same_runs(tmp_path / "first", whole)


RUN = """
import sys, maskwise
recipe = maskwise.read_recipe(%r, *%r, "train.mirror=" + sys.argv[2])
print(maskwise.train(recipe, out=sys.argv[1])["status"])
"""


@pytest.mark.slow
def test_two_ranks_continue_from_the_mirror(place, tmp_path):
    address, _, client = place
    script = tmp_path / "run.py"
    script.write_text(RUN % (TINY, (*SMALL, "speed.workers=1")))
    pair.end(pair.start("-u", script, tmp_path / "whole", address))
    prefix = address.removeprefix("s3://runs/")
    client.delete_object(Bucket="runs", Key=f"{prefix}/checkpoints/step_00000006/meta.json")
    outputs = pair.end(pair.start("-u", script, tmp_path / "second", address))
    assert [out.split()[-1] for out, _ in outputs] == ["complete"] * 2
    assert [("step_00000004 of" in err, "is complete" in err) for _, err in outputs] == [(True, True), (False, False)]
    same_runs(tmp_path / "second", tmp_path / "whole")
    assert last_checkpoint(tmp_path / "second").name == "step_00000006"
