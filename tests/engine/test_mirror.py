"""The thread that copies a run folder: order of writing, what it leaves out, and its lines."""

import threading

import pytest

from maskwise.engine.mirror import Mirror, complete_steps, contents_of
from maskwise.storage.faults import Lost, Missing

PLACE = "s3://b/run"


class Bucket:
    """A store in memory; `log` lists writes and removals, `gate` holds uploads back, `lost` refuses them."""

    def __init__(self):
        self.files, self.log, self.lost = {}, [], False
        self.gate, self.began = threading.Event(), threading.Event()
        self.gate.set()

    def upload(self, file, address):
        self.began.set()
        assert self.gate.wait(60)
        if self.lost:
            raise Lost("train.mirror: s3://b/run could not be reached for 1 s")
        self.files[address] = file.read_bytes()
        self.log.append(("put", address.removeprefix(PLACE + "/")))

    def remove(self, address):
        self.files.pop(address, None)
        self.log.append(("remove", address.removeprefix(PLACE + "/")))

    def listing(self, address, pattern=None):
        return sorted(name for name in self.files if name.startswith(address))

    def contents(self, address):
        if address not in self.files:
            raise Missing(address)
        return self.files[address]


def checkpoint(folder, step, content="x"):
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    for name in ("encoder.json", "meta.json", "model.safetensors", "optimizer.safetensors"):
        (path / name).write_text(f"{name} {step} {content}")
    return path


@pytest.fixture
def run(tmp_path):
    """A run folder, a bucket, the printed lines, and a function that makes the mirror."""
    folder, bucket, lines = tmp_path / "run", Bucket(), []
    for name in ("recipe.yaml", "run.json", "metrics.jsonl", "reports/knn.json", ".lock", "preempted", ".hidden/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder, bucket, lines, lambda keep=2: Mirror(folder, PLACE + "/", bucket, keep, lines.append)


def test_meta_comes_last_and_goes_first(run):
    folder, bucket, lines, mirror = run
    with mirror(keep=1):
        checkpoint(folder, 2)
    with mirror(keep=1):  # a start finds the newest checkpoint by itself
        pass
    first = [name for kind, name in bucket.log]
    assert first[:4] == ["metrics.jsonl", "reports/knn.json", "run.json", "recipe.yaml"]
    assert lines == [f"mirror: {PLACE} is complete"] * 2
    bucket.log.clear()
    with mirror(keep=1) as third:
        third.checkpoint(checkpoint(folder, 4))
    assert contents_of(bucket, PLACE) == sorted(
        [*first[:4], "checkpoints/last", *(f"checkpoints/step_00000004/{name.name}" for name in files_of(folder, 4))]
    )
    names = [name for kind, name in bucket.log if "step_00000004" in name or "last" in name]
    assert names[-2:] == ["checkpoints/step_00000004/meta.json", "checkpoints/last"]
    removed = [name for kind, name in bucket.log if kind == "remove"]
    assert removed[0] == "checkpoints/step_00000002/meta.json" and len(removed) == 4
    assert bucket.log.index(("put", "checkpoints/last")) < bucket.log.index(("remove", removed[0]))
    assert not list((folder / "checkpoints").glob(".mirror*"))


def files_of(folder, step):
    return list((folder / "checkpoints" / f"step_{step:08d}").iterdir())


def test_checkpoints_that_wait_are_left_out_and_removed_ones_are_copied(run):
    import shutil

    folder, bucket, lines, mirror = run
    bucket.gate.clear()
    with mirror(keep=0) as running:
        for step in (2, 4, 6):
            path = checkpoint(folder, step)
            running.checkpoint(path)  # returns although nothing can be written
            if step == 2:
                assert bucket.began.wait(60)
            shutil.rmtree(path)  # as train.keep does
        bucket.gate.set()
    assert complete_steps(contents_of(bucket, PLACE)) == ["step_00000006", "step_00000002"]
    assert bucket.files[f"{PLACE}/checkpoints/step_00000006/meta.json"] == b"meta.json 6 x"
    assert bucket.files[f"{PLACE}/checkpoints/last"] == b"step_00000006\n"
    assert lines == [f"mirror: {PLACE} is complete"]


def test_failures_are_told_once_and_made_up_for(run):
    folder, bucket, lines, mirror = run
    bucket.lost = True
    told = threading.Event()
    with mirror() as running:
        running.print_line = lambda text: (lines.append(text), told.set())
        running.checkpoint(checkpoint(folder, 2))
        assert told.wait(60)
        told.clear()
        bucket.lost = False
        running.checkpoint(checkpoint(folder, 4))
        assert told.wait(60)
    assert "step_00000002 could not be copied" in lines[0] and "the run continues" in lines[0]
    assert lines[1:] == [f"mirror: {PLACE} can be written again, nothing is missing", f"mirror: {PLACE} is complete"]
    bucket.lost = True
    with mirror() as running:
        running.checkpoint(checkpoint(folder, 6))
    assert lines[-1].startswith(f"mirror: {PLACE} is incomplete: step_00000006 could not be copied")
    assert complete_steps(contents_of(bucket, PLACE)) == ["step_00000004"]


def test_a_checkpoint_of_the_same_step_with_other_contents_is_replaced(run):
    import shutil

    folder, bucket, _, mirror = run
    with mirror() as running:
        running.checkpoint(checkpoint(folder, 2))
    shutil.rmtree(folder / "checkpoints" / "step_00000002")
    checkpoint(folder, 2, "other")
    bucket.log.clear()
    with mirror():
        pass
    touched = [entry for entry in bucket.log if "step_00000002" in entry[1]]
    assert touched[0] == ("remove", "checkpoints/step_00000002/meta.json")
    assert bucket.files[f"{PLACE}/checkpoints/step_00000002/model.safetensors"] == b"model.safetensors 2 other"


def test_ctrl_c_does_not_wait(run):
    folder, bucket, lines, mirror = run
    bucket.gate.clear()
    with pytest.raises(KeyboardInterrupt), mirror() as running:
        running.checkpoint(checkpoint(folder, 2))
        assert bucket.began.wait(60)
        raise KeyboardInterrupt
    assert "is incomplete (stopped while copying)" in lines[-1]
    bucket.gate.set()
    running.thread.join(60)
