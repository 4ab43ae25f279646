"""The lock of a run folder: held by one process, named to others, gone with its holder."""

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys

import pytest

from maskwise import build, cli
from maskwise.engine import run_lock
from maskwise.engine.checkpoint import Checkpoints
from maskwise.engine.run_lock import RunLock, check_free
from maskwise.engine.run_log import RunLog
from maskwise.errors import UserError

HOLDER = """
import sys
from maskwise.engine.run_lock import RunLock
lock = RunLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def taken(folder, pid):
    return (
        f"another maskwise (pid {pid} on {socket.gethostname()}) is writing into {folder}: wait for its end, stop it, "
        "or give another --out"
    )


def test_second_writer_is_refused_with_the_first_ones_name(tmp_path, holder):
    for refused in (RunLock(tmp_path).acquire, lambda: check_free(tmp_path)):
        with pytest.raises(UserError) as caught:
            refused()
        assert str(caught.value) == taken(tmp_path, holder.pid)
    holder.communicate()  # it ends normally
    check_free(tmp_path)
    assert RunLock(tmp_path).acquire() == ""


def test_lock_of_a_killed_process_is_free_and_no_line_is_printed_on_the_same_host(tmp_path, holder):
    holder.kill()
    holder.wait()
    check_free(tmp_path)
    with RunLock(tmp_path) as lock:
        assert lock.acquire() == ""
        assert (tmp_path / ".lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}\n"


def test_nothing_stays_after_the_end(tmp_path):
    with RunLock(tmp_path) as lock:
        lock.acquire()
        assert lock.is_ours()
    assert list(tmp_path.iterdir()) == [] and not lock.is_ours()
    lock.release()
    check_free(tmp_path), check_free(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_children_do_not_hold_the_lock(tmp_path):
    """A data worker may outlive a killed run for some seconds."""
    with RunLock(tmp_path) as lock:
        lock.acquire()
        started, ended = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            os.write(started[1], b"1")
            os.close(ended[1])
            os.read(ended[0], 1)
            os._exit(lock.handle is not None)
        os.read(started[0], 1)
        os.close(lock.handle)  # as the kernel does at kill -9
        lock.handle = None
        try:
            check_free(tmp_path)
        finally:
            os.close(ended[1])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_killed_writer_on_another_host_is_named(tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text("pid 17 on node2\n")
    with RunLock(tmp_path) as lock:
        assert lock.acquire() == (
            f"{tmp_path} was last written by maskwise (pid 17 on node2), which was killed: if that machine shares this "
            "disk, make sure that it has ended"
        )


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def refuse(handle, kind):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    check_free(tmp_path)
    with RunLock(tmp_path) as lock:
        assert lock.acquire() == (
            f"cannot tell whether another maskwise writes into {tmp_path} (its file system has no locks: "
            f"{os.strerror(number)}): make sure that none does"
        )
        lock.check()


def test_file_that_the_last_holder_removes_meanwhile_is_not_locked(tmp_path, monkeypatch):
    lock, opened = RunLock(tmp_path), []
    original = run_lock._lock

    def removed(handle, kind, folder, option):
        if not opened:
            os.unlink(tmp_path / ".lock")
        opened.append(handle)
        original(handle, kind, folder, option)

    monkeypatch.setattr(run_lock, "_lock", removed)
    assert lock.acquire() == "" and len(opened) == 2 and lock.is_ours()
    lock.release()


@pytest.fixture
def replaced(tmp_path):
    """The lock of a folder that was removed and made again by another start; yields (lock, folder)."""
    folder = tmp_path / "run"
    folder.mkdir()
    with RunLock(folder) as lock:
        lock.acquire()
        shutil.rmtree(folder)
        folder.mkdir()
        with RunLock(folder) as other:
            other.acquire()
            yield lock, folder


def test_replaced_folder_gets_no_checkpoint_or_picture_of_the_old_run(replaced, capsys):
    lock, folder = replaced
    gone = f"the run folder {folder} was removed or replaced while this run was writing into it: put it back"
    with pytest.raises(UserError) as caught:
        Checkpoints(folder, lock=lock).save(2, {}, {})
    assert str(caught.value) == gone
    run_log = RunLog(folder, 4, loggers=(), lock=lock)
    run_log.preempted(2)
    assert capsys.readouterr().err.splitlines()[0] == f"{gone}; tried again later, the run continues"
    assert sorted(os.listdir(folder)) == [".lock"]
    lock.release()
    assert sorted(os.listdir(folder)) == [".lock"], "the other's lock stays"


def test_removed_folder_is_not_made_again(tmp_path):
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run") as lock:
        lock.acquire()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(UserError, match="was removed or replaced while this run was writing into it: put it back"):
            Checkpoints(tmp_path / "run", lock=lock).save(2, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_moved_folder_is_written_again_after_it_came_back(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with RunLock(folder) as lock:
        lock.acquire()
        folder.rename(tmp_path / "moved")
        with pytest.raises(UserError):
            Checkpoints(folder, lock=lock).save(2, {}, {})
        (tmp_path / "moved").rename(folder)
        assert Checkpoints(folder, lock=lock).save(2, {}, {}).is_dir()


SMALL = ("data.count=16", "train.epochs=1", "teacher.warmup_temp_epochs=1", "evaluate.knn_every=0")


def test_second_run_in_a_folder_is_refused_and_changes_nothing(tmp_path, capfd, holder):
    before = (tmp_path / ".lock").read_text()
    assert cli.main(["train", "debug/tiny", "--out", str(tmp_path), *SMALL]) == 2
    assert capfd.readouterr() == ("", f"maskwise: {taken(tmp_path, holder.pid)}\n")
    assert os.listdir(tmp_path) == [".lock"] and (tmp_path / ".lock").read_text() == before


def test_run_holds_its_lock_to_the_end(tmp_path, capfd, monkeypatch):
    folder, seen = tmp_path / "run", []

    def fit(*arguments, **options):
        seen.append((folder / ".lock").read_text())
        with pytest.raises(UserError):
            check_free(folder)
        return {"status": "complete", "step": 2, "skipped": 0}

    monkeypatch.setattr(build.running.run, "fit", fit)
    assert cli.main(["train", "debug/tiny", "--out", str(folder), *SMALL]) == 0
    assert seen == [f"pid {os.getpid()} on {socket.gethostname()}\n"] and not (folder / ".lock").exists()
