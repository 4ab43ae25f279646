"""Checkpoints under fire: killed before every call to the file system, altered in every file, refused by the disk."""

import builtins
import contextlib
import io
import os
import resource
import shutil
import signal
import sys

import pair
import pytest
import torch
from engine.test_checkpoint import moments, names, save, tensors

from maskwise.distributed.world import World
from maskwise.engine import checkpoint
from maskwise.engine.checkpoint import Checkpoints, read
from maskwise.functional.errors import UserError

CALLS = [(os, name) for name in ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")] + [(io, "open"), (checkpoint.safetensors.torch, "save_file")]


def killed_before(call: int, work) -> bool:
    """Do `work` in a child that dies before its call-th call to the file system; False when it ends before that."""
    child = os.fork()
    if not child:
        left = [call]

        def counted(original):
            def counting(*arguments, **options):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            return counting

        for owner, name in CALLS:
            setattr(owner, name, counted(getattr(owner, name)))
        builtins.open = io.open
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def sound(folder, steps):
    """The checkpoint that a start would take, which must be one of these and whole."""
    found = Checkpoints(folder).load_last()
    assert found.step in steps and torch.equal(found.tensors["student.head.a"], torch.full((3, 2), float(found.step)))
    assert torch.equal(found.optimizer["step/student.a"], torch.tensor(float(found.step)))
    return found


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that is there"])
def test_killed_before_every_call_while_saving(tmp_path, again):
    written = 4 if again else 6
    for call in range(1, 200):
        folder = tmp_path / str(call)
        store = Checkpoints(folder, keep=2)
        for step in (2, 4) if call == 1 else ():
            save(store, step)
        if call > 1:
            shutil.copytree(tmp_path / "1" / "before", folder / "checkpoints")
        else:
            shutil.copytree(folder / "checkpoints", folder / "before")
        died = killed_before(call, lambda: save(store, written))
        found = sound(folder, (2, 4, 6))
        assert found.step >= (2 if again else 4), "at most the steps since the last checkpoint are lost"
        if not again:
            assert (folder / "checkpoints" / (folder / "checkpoints" / "last").read_text().strip()).is_dir(), "the pointer moves last"
        store.tidy(found.step)
        assert not [name for name in names(folder) if name.startswith(".")]
        save(store, 6)
        sound(folder, (6,))
        assert len(names(folder)) == 3
        if not died:
            break
    assert 30 < call < 199


def test_killed_before_every_call_while_tidying(tmp_path):
    for call in range(1, 60):
        folder = tmp_path / str(call)
        store = Checkpoints(folder, keep=0)
        for step in (2, 4, 6):
            save(store, step)
        os.rename(folder / "checkpoints" / "step_00000002", folder / "checkpoints" / ".removing_step_00000002")
        (folder / "checkpoints" / ".writing_step_00000008").mkdir()
        store.keep = 1
        died = killed_before(call, lambda: store.tidy(6))
        sound(folder, (6,))
        store.tidy(6)
        assert names(folder) == ["last", "step_00000006"]
        if not died:
            break
    assert 8 < call < 59


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "encoder.json", "meta.json"])
@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing"])
def test_an_altered_file_is_noticed_and_the_one_before_is_used_with_a_word(tmp_path, file, fault):
    said = []
    store = Checkpoints(tmp_path, say=said.append)
    save(store, 2), save(store, 4)
    path = tmp_path / "checkpoints" / "step_00000004" / file
    content = path.read_bytes()
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert store.load_last().step == 2
    (line,) = said
    assert line.startswith("checkpoint damaged (step_00000004: ") and line.endswith("): continuing from step_00000002 instead") and "\n" not in line
    if fault == "missing":
        assert f"{file}: No such file or directory" in line


def test_no_byte_of_meta_json_can_change_what_is_loaded(tmp_path):
    path = save(Checkpoints(tmp_path, meta={"seconds": 12.5}), 4) / "meta.json"
    content, whole = path.read_bytes(), read(path.parent)
    noticed = 0
    for place in range(len(content)):
        for bit in (0, 3):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            try:
                found = read(path.parent)
            except checkpoint.Damaged:
                noticed += 1
                continue
            found.meta.pop("sha256", None)
            assert (found.step, {key: found.meta[key] for key in whole.meta}) == (4, whole.meta)
    assert noticed >= 2 * (len(content) - len('"sha256"'))


@pytest.mark.parametrize("last", [None, "step_00000099\n", "", "../..\n", b"\xff\xfe"], ids=["missing", "names nothing", "empty", "elsewhere", "no text"])
def test_a_pointer_that_points_nowhere_is_told_and_the_newest_is_used(tmp_path, last):
    said = []
    store = Checkpoints(tmp_path, say=said.append)
    save(store, 2), save(store, 4)
    pointer = tmp_path / "checkpoints" / "last"
    pointer.unlink() if last is None else pointer.write_bytes(last if isinstance(last, bytes) else last.encode())
    assert store.load_last().step == 4
    (line,) = said
    assert "`last`" in line and line.endswith("continuing from step_00000004 instead")


def test_a_checkpoint_without_a_seal_is_read_as_before(tmp_path):
    path = save(Checkpoints(tmp_path), 4) / "meta.json"
    text = checkpoint.json.dumps(checkpoint.unsealed(path.read_bytes()), indent=2)
    path.write_text(text)
    assert "sha256" not in checkpoint.json.loads(text) and read(path.parent).step == 4


@contextlib.contextmanager
def small_files():
    """No file of this process may grow beyond 600 bytes, pytest's own log included: to be left before it writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_the_disk_refuses_leaves_the_older_one_and_nothing_half_written(tmp_path):
    store = Checkpoints(tmp_path)
    little = {"count": torch.tensor(2)}
    store.save(2, little, little)
    with small_files(), pytest.raises(UserError, match=r"cannot write the checkpoint .*step_00000004 \(File too large\): raise the limit on file sizes \(ulimit -f\)"):
        store.save(4, {"much": torch.ones(1000)}, moments(4))
    assert names(tmp_path) == ["last", "step_00000002"] and store.load_last().step == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes anywhere")
def test_a_folder_made_read_only_is_named(tmp_path):
    store = Checkpoints(tmp_path)
    save(store, 2)
    (tmp_path / "checkpoints").chmod(0o500)
    with pytest.raises(UserError, match=r"\(Permission denied\): make it writable"):
        save(store, 4)
    (tmp_path / "checkpoints").chmod(0o700)
    assert store.load_last().step == 2


def test_old_checkpoints_that_cannot_be_removed_are_told_and_do_no_harm(tmp_path, monkeypatch):
    said = []
    store = Checkpoints(tmp_path, keep=1, say=said.append)
    save(store, 2)
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda one, two: rename(one, two) if ".writing" in str(one) else (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    save(store, 4)
    assert store.load_last().step == 4 and said == [f"old checkpoints stay under {tmp_path / 'checkpoints'} (Permission denied): remove them by hand"]


def test_a_slow_disk_changes_nothing(tmp_path, monkeypatch):
    import time

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (time.sleep(0.02), fsync(handle)))
    store = Checkpoints(tmp_path)
    save(store, 2), save(store, 4)
    assert store.load_last().step == 4 and names(tmp_path) == ["last", "step_00000002", "step_00000004"]


def test_a_failed_save_is_told_to_every_rank(tmp_path):
    """Rank 0 alone writes and fails; rank 1 must not wait for it."""
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    told = [out.strip() for out, _ in pair.end(pair.start(__file__, tmp_path))]
    assert told[0].startswith("cannot write the checkpoint") and "(Not a directory)" in told[0] and told[1].startswith("rank 0 cannot write the checkpoint")


if __name__ == "__main__":
    world = World.start("cpu")
    try:
        Checkpoints(sys.argv[1], world=world).save(2, tensors(2), moments(2))
    except UserError as error:
        print(error)
    world.close()
