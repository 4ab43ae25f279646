"""Checkpoints under faults: killed before every call to the file system, altered files, failed writes."""

import builtins
import contextlib
import io
import os
import resource
import shutil
import signal
import sys

import pytest
import torch

from engine.test_checkpoint import moments, names, save, tensors
from maskwise.distributed.world import World
from maskwise.engine import checkpoint
from maskwise.engine.checkpoint import Checkpoints, read
from maskwise.errors import UserError
from support import pair

CALLS = [(os, name) for name in ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")] + [
    (io, "open"),
    (checkpoint.safetensors.torch, "save_file"),
]


def killed_before(call: int, work) -> bool:
    """Run `work` in a child killed before its call-th file system call; False if it ends before that."""
    child = os.fork()
    if not child:
        remaining = [call]

        def counted(original):
            def counting(*arguments, **options):
                remaining[0] -= 1
                if remaining[0] == 0:
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


def assert_intact(folder, steps):
    """Load the newest checkpoint; its step must be one of `steps` and its content complete."""
    loaded = Checkpoints(folder).load_last()
    assert loaded.step in steps and torch.equal(
        loaded.tensors["student.head.a"], torch.full((3, 2), float(loaded.step))
    )
    assert torch.equal(loaded.optimizer["step/student.a"], torch.tensor(float(loaded.step)))
    return loaded


@pytest.mark.parametrize("existing", [False, True], ids=["a new step", "an existing step"])
def test_killed_before_every_call_while_saving(tmp_path, existing):
    written = 4 if existing else 6
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
        loaded = assert_intact(folder, (2, 4, 6))
        assert loaded.step >= (2 if existing else 4), "at most the steps since the last checkpoint are lost"
        if not existing:
            assert (folder / "checkpoints" / (folder / "checkpoints" / "last").read_text().strip()).is_dir(), (
                "the pointer moves last"
            )
        store.remove_stale(loaded.step)
        assert not [name for name in names(folder) if name.startswith(".")]
        save(store, 6)
        assert_intact(folder, (6,))
        assert len(names(folder)) == 3
        if not died:
            break
    assert 30 < call < 199


def test_killed_before_every_call_while_deleting(tmp_path):
    for call in range(1, 60):
        folder = tmp_path / str(call)
        store = Checkpoints(folder, keep=0)
        for step in (2, 4, 6):
            save(store, step)
        os.rename(folder / "checkpoints" / "step_00000002", folder / "checkpoints" / ".removing_step_00000002")
        (folder / "checkpoints" / ".writing_step_00000008").mkdir()
        store.keep = 1
        died = killed_before(call, lambda: store.remove_stale(6))
        assert_intact(folder, (6,))
        store.remove_stale(6)
        assert names(folder) == ["last", "step_00000006"]
        if not died:
            break
    assert 8 < call < 59


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "encoder.json", "meta.json"])
@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing"])
def test_altered_file_is_detected_and_previous_checkpoint_used_with_warning(tmp_path, file, fault):
    messages = []
    store = Checkpoints(tmp_path, print_line=messages.append)
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
    (line,) = messages
    assert (
        line.startswith("checkpoint damaged (step_00000004: ")
        and line.endswith("): using step_00000002 instead")
        and "\n" not in line
    )
    if fault == "missing":
        assert f"{file}: No such file or directory" in line


def test_any_changed_byte_of_meta_json_is_detected(tmp_path):
    path = save(Checkpoints(tmp_path, meta={"seconds": 12.5}), 4) / "meta.json"
    content, original = path.read_bytes(), read(path.parent)
    detected = 0
    for position in range(len(content)):
        for bit in (0, 3):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
            try:
                loaded = read(path.parent)
            except checkpoint.Damaged:
                detected += 1
                continue
            loaded.meta.pop("sha256", None)
            assert (loaded.step, {key: loaded.meta[key] for key in original.meta}) == (4, original.meta)
    assert detected >= 2 * (len(content) - len('"sha256"'))


@pytest.mark.parametrize(
    "last",
    [None, "step_00000099\n", "", "../..\n", b"\xff\xfe"],
    ids=["missing", "names nothing", "empty", "elsewhere", "no text"],
)
def test_invalid_pointer_is_reported_and_newest_checkpoint_used(tmp_path, last):
    messages = []
    store = Checkpoints(tmp_path, print_line=messages.append)
    save(store, 2), save(store, 4)
    pointer = tmp_path / "checkpoints" / "last"
    pointer.unlink() if last is None else pointer.write_bytes(last if isinstance(last, bytes) else last.encode())
    assert store.load_last().step == 4
    (line,) = messages
    assert "`last`" in line and line.endswith("using step_00000004 instead")


def test_checkpoint_without_seal_loads(tmp_path):
    path = save(Checkpoints(tmp_path), 4) / "meta.json"
    text = checkpoint.json.dumps(checkpoint.verify_checksum(path.read_bytes()), indent=2)
    path.write_text(text)
    assert "sha256" not in checkpoint.json.loads(text) and read(path.parent).step == 4


@contextlib.contextmanager
def small_files():
    """Limit files of this process to 600 bytes; exit before pytest writes its own log."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_failed_write_leaves_previous_checkpoint_and_no_partial_files(tmp_path):
    store = Checkpoints(tmp_path)
    little = {"count": torch.tensor(2)}
    store.save(2, little, little)
    with (
        small_files(),
        pytest.raises(
            UserError,
            match=r"cannot write the checkpoint .*step_00000004 \(File too large\): "
            r"raise the limit on file sizes \(ulimit -f\)",
        ),
    ):
        store.save(4, {"much": torch.ones(1000)}, moments(4))
    assert names(tmp_path) == ["last", "step_00000002"] and store.load_last().step == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes anywhere")
def test_read_only_folder_is_named_in_error(tmp_path):
    store = Checkpoints(tmp_path)
    save(store, 2)
    (tmp_path / "checkpoints").chmod(0o500)
    with pytest.raises(UserError, match=r"\(Permission denied\): make it writable"):
        save(store, 4)
    (tmp_path / "checkpoints").chmod(0o700)
    assert store.load_last().step == 2


def test_undeletable_old_checkpoints_are_reported_and_harmless(tmp_path, monkeypatch):
    messages = []
    store = Checkpoints(tmp_path, keep=1, print_line=messages.append)
    save(store, 2)
    rename = os.rename
    monkeypatch.setattr(
        os,
        "rename",
        lambda source, target: (
            rename(source, target)
            if ".writing" in str(source)
            else (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
        ),
    )
    save(store, 4)
    assert store.load_last().step == 4 and messages == [
        f"old checkpoints stay under {tmp_path / 'checkpoints'} (Permission denied): remove them by hand"
    ]


def test_slow_disk_changes_no_checkpoint(tmp_path, monkeypatch):
    import time

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (time.sleep(0.02), fsync(handle)))
    store = Checkpoints(tmp_path)
    save(store, 2), save(store, 4)
    assert store.load_last().step == 4 and names(tmp_path) == ["last", "step_00000002", "step_00000004"]


def test_failed_save_is_reported_on_every_rank(tmp_path):
    """Rank 0 alone writes and fails; rank 1 must not wait for it."""
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    outputs = [out.strip() for out, _ in pair.end(pair.start(__file__, tmp_path))]
    assert (
        outputs[0].startswith("cannot write the checkpoint")
        and "(Not a directory)" in outputs[0]
        and outputs[1].startswith("rank 0 cannot write the checkpoint")
    )


if __name__ == "__main__":
    world = World.start("cpu")
    try:
        Checkpoints(sys.argv[1], world=world).save(2, tensors(2), moments(2))
    except UserError as error:
        print(error)
    world.close()
