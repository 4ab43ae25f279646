"""Checkpoints: complete or absent, verified, pruned."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from maskwise.engine import checkpoint
from maskwise.engine.checkpoint import Checkpoints
from maskwise.errors import UserError


def tensors(value):
    shared = torch.full((3, 2), float(value))
    return {
        "student.head.a": shared,
        "student.head.b": shared,
        "center": torch.arange(4.0)[::2],
        "count": torch.tensor(value),
    }


def moments(value):
    return {"exp_avg/student.a": torch.full((2,), float(value)), "step/student.a": torch.tensor(float(value))}


def save(checkpoints, step):
    return checkpoints.save(step, tensors(step), moments(step), {"skipped": 1}, {"name": "tiny"})


def names(folder):
    return sorted(os.listdir(folder / "checkpoints"))


def test_round_trip_with_aliases_and_meta(tmp_path):
    store = Checkpoints(tmp_path, meta={"recipe": "seed: 0", "versions": {"maskwise": "0"}})
    assert store.load_last() is None
    path = save(store, 12)
    assert path.name == "step_00000012" and (tmp_path / "checkpoints" / "last").read_text().strip() == path.name
    loaded = store.load_last()
    assert loaded.step == 12 and loaded.meta["recipe"] == "seed: 0" and loaded.meta["skipped"] == 1
    assert {"torch", "maskwise"} <= loaded.meta["versions"].keys()
    assert set(loaded.meta["files"]) == {"model.safetensors", "optimizer.safetensors", "encoder.json"}
    for key, value in tensors(12).items():
        assert torch.equal(loaded.tensors[key], value)
    assert loaded.optimizer["step/student.a"].shape == () and loaded.tensors["count"].dtype == torch.int64
    assert json.loads((path / "encoder.json").read_text()) == {"name": "tiny"}


def test_only_the_newest_checkpoints_are_retained(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in (2, 4, 6):
        save(store, step)
    assert names(tmp_path) == ["last", "step_00000004", "step_00000006"]


def test_damaged_checkpoint_falls_back_with_one_line(tmp_path):
    messages = []
    store = Checkpoints(tmp_path, print_line=messages.append)
    save(store, 2), save(store, 4)
    file = tmp_path / "checkpoints" / "step_00000004" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert store.load_last().step == 2
    assert messages == [
        "checkpoint damaged (step_00000004: the checksum of model.safetensors is wrong): using step_00000002 instead"
    ]
    save(store, 4)
    assert store.load_last().step == 4 and names(tmp_path) == ["last", "step_00000002", "step_00000004"]


@pytest.mark.parametrize("damage", ["missing", "empty", "meta"])
def test_no_intact_checkpoint_is_a_one_line_error(tmp_path, damage):
    store = Checkpoints(tmp_path)
    path = save(store, 2)
    if damage == "missing":
        (path / "optimizer.safetensors").unlink()
    elif damage == "empty":
        (path / "model.safetensors").write_bytes(b"")
    else:
        (path / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint under .* is sound") as caught:
        store.load_last()
    assert "\n" not in str(caught.value)


def test_leftovers_of_a_kill_are_ignored_and_deleted(tmp_path):
    store = Checkpoints(tmp_path)
    save(store, 2)
    (tmp_path / "checkpoints" / ".writing_step_00000004").mkdir()
    (tmp_path / "checkpoints" / "last").unlink()
    assert store.load_last().step == 2
    save(store, 4)
    assert names(tmp_path) == ["last", "step_00000002", "step_00000004"]


def test_checkpoints_of_later_steps_are_removed(tmp_path):
    store = Checkpoints(tmp_path)
    for step in (2, 4):
        save(store, step)
    (tmp_path / "checkpoints" / "last").write_text("step_00000002\n")
    assert store.load_last().step == 2
    save(store, 3)
    assert names(tmp_path) == ["last", "step_00000002", "step_00000003"]


@pytest.mark.parametrize("call", ["save_file", "sync", "_prune", "rename", "replace"])
def test_interrupted_write_leaves_an_intact_checkpoint(tmp_path, monkeypatch, call):
    store = Checkpoints(tmp_path)
    save(store, 2)

    def stop(*_, **__):
        raise KeyboardInterrupt

    place = {
        "save_file": checkpoint.safetensors.torch,
        "sync": checkpoint,
        "_prune": Checkpoints,
        "rename": os,
        "replace": os,
    }[call]
    with monkeypatch.context() as patch:
        patch.setattr(place, call, stop)
        with pytest.raises(KeyboardInterrupt):
            save(store, 4)
    loaded = store.load_last()
    assert loaded.step in (2, 4) and torch.equal(loaded.tensors["count"], torch.tensor(loaded.step))


def test_full_disk_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="cannot write the checkpoint .*No space left"):
        save(Checkpoints(tmp_path), 2)


def test_sigkill_while_writing_leaves_an_intact_checkpoint(tmp_path):
    child = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        deadline = time.time() + 60
        while not (tmp_path / "checkpoints" / "last").exists() and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    loaded = Checkpoints(tmp_path).load_last()
    assert loaded.step >= 1 and int(loaded.tensors["count"]) == loaded.step


if __name__ == "__main__":
    endless, count = Checkpoints(sys.argv[1]), 0
    while True:
        count += 1
        save(endless, count)
