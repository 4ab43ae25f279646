"""A rank that raises, dies, dawdles or never comes: the others end soon, and each cause is told once, in one line."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from maskwise.distributed import world
from maskwise.distributed.world import World, patience, voice
from maskwise.functional.errors import UserError

LOST = (
    "maskwise: a rank of 2 has ended, was cut off or did not answer for {:g} s, so all stop: look for what it said; "
    "the same command continues from the last checkpoint"
)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "1e12"])
def test_a_timeout_is_a_number_of_seconds(monkeypatch, text):
    monkeypatch.setenv("MASKWISE_TIMEOUT", text)
    with pytest.raises(UserError, match=f"MASKWISE_TIMEOUT={text} is no number of seconds above 0"):
        patience()


def test_timeouts(monkeypatch):
    monkeypatch.delenv("MASKWISE_TIMEOUT", raising=False)
    assert patience() == 600
    monkeypatch.setenv("MASKWISE_TIMEOUT", "2.5")
    assert patience() == 2.5


@pytest.mark.parametrize("error", [RuntimeError("[enforce fail at alloc_cpu.cpp] you tried to allocate"), ValueError("3"), KeyError("3")])
def test_a_mistake_of_this_rank_is_no_lost_rank(monkeypatch, error):
    monkeypatch.setattr(World, "close", lambda self: None)
    with pytest.raises(type(error)) as caught, World(0, 2).together():
        raise error
    assert caught.value is error


def test_alone_nobody_is_lost():
    error = RuntimeError("gloo")
    with pytest.raises(RuntimeError) as caught, World().together():
        raise error
    assert caught.value is error


@pytest.fixture
def ranks(monkeypatch):
    """Environment of rank 1 of 2 whose first rank is not there."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(world.socket, "gethostname", lambda: "host")
    monkeypatch.setattr(world, "_store", None)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_rank_tells_its_mistake_when_nobody_can_be_asked(ranks, monkeypatch):
    assert voice("no such folder", wait=0.2) == "rank 1 on host: no such folder"
    monkeypatch.setenv("RANK", "0")
    assert voice("no such folder") == "no such folder"


def test_a_store_behind_a_cut_cable_holds_nobody_up(ranks, monkeypatch):
    class Silent:
        def add(self, key, amount):
            threading.Event().wait()

    monkeypatch.setattr(world, "_store", Silent())
    assert voice("no such folder", wait=0.1) == "rank 1 on host: no such folder"


def test_ranks_tell_a_common_mistake_once(ranks, monkeypatch):
    import datetime

    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=20))
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert voice("no such folder") == "rank 1 on host: no such folder"
    monkeypatch.setenv("RANK", "0")
    assert voice("no such folder") is None and voice("another") == "another"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert voice("no such folder") == "no such folder"


def start(fault, folder, *, timeout=60):
    """Two ranks of a short run, the second one faulty; returns what they said and how they ended, and the seconds since the fault."""
    shared = {
        "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "MASKWISE_TIMEOUT": str(timeout), "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    children = [
        subprocess.Popen([sys.executable, __file__, fault, str(folder)], env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [child.communicate(timeout=300)[1].splitlines() for child in children]
    finally:
        for child in children:
            child.kill()
    since = time.time() - float((folder / "fault").read_text())
    return [[line for line in lines if line.startswith("maskwise: ")] for lines in said], [child.returncode for child in children], since


@pytest.mark.slow
def test_a_rank_that_is_slow_but_in_time_and_then_raises(tmp_path):
    said, ends, since = start("raises", tmp_path)
    assert said == [[LOST.format(60)], [f"maskwise: rank 1 on {socket.gethostname()}: the disk of this node is gone"]]
    assert ends == [2, 2] and since < 30


@pytest.mark.slow
def test_a_rank_that_is_killed(tmp_path):
    said, ends, since = start("dies", tmp_path)
    assert said == [[LOST.format(60)], []] and ends == [2, -signal.SIGKILL] and since < 30


@pytest.mark.slow
def test_a_rank_that_answers_too_late(tmp_path):
    said, ends, since = start("dawdles", tmp_path, timeout=4)
    assert said[0] == [LOST.format(4)] and ends == [2, 2] and 4 <= since < 60


@pytest.mark.slow
def test_a_rank_that_fails_before_it_meets_the_others(tmp_path):
    said, ends, since = start("finds no images", tmp_path, timeout=6)
    assert said == [
        ["maskwise: not all of the 2 ranks came within 6 s: look at what the others say, and whether every machine reaches the first one and runs the same command"],
        [f"maskwise: rank 1 on {socket.gethostname()}: data.path: nowhere does not exist; give the folder that holds the images"],
    ]
    assert ends == [2, 2] and since < 60


def faulty(fault, folder):
    """A rank of a small run; the second one has a fault at its fifth step, or before the first."""
    from maskwise import cli
    from maskwise.engine import loop
    from maskwise.engine.checkpoint import Checkpoints
    from maskwise.engine.journal import Journal
    from tests.engine.tiny_method import Stream, trainer

    if fault == "finds no images":
        path = "nowhere" if os.environ["RANK"] == "1" else pictures(folder)
        if path == "nowhere":
            mark(folder)
        return cli.main(["train", "debug/tiny", "--out", f"{folder}/run", "evaluate.knn_every=0", "data=folder", f"data.path={path}"])

    def at(step):
        if step != 4 or world.rank == 0:
            return
        mark(folder)
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep({"dawdles": 20, "raises": 3}[fault])
        if fault == "raises":
            raise UserError("the disk of this node is gone")

    world, folder = World.start("cpu"), Path(folder)
    try:
        with world.together():
            it, journal = trainer(12, world=world), Journal(folder, 12, quiet=True, tensorboard=False, main=world.is_main)
            loop.fit(it, lambda start: Stream(start, 12, at), lambda batch: (batch.global_crops, batch.local_crops), journal,
                     Checkpoints(folder, world=world), {}, log_every=2, save_every=3)  # fmt: skip
    except UserError as error:
        cli.complain(str(error))
        return 2
    return 0


def mark(folder):
    Path(folder, "fault").write_text(str(time.time()))


def pictures(folder):
    """Eight grey images."""
    import numpy as np

    from maskwise.functional.draw import write_png

    os.makedirs(f"{folder}/images")
    for number in range(8):
        write_png(f"{folder}/images/{number}.png", np.full((40, 40, 3), 20 * number, dtype=np.uint8))
    return f"{folder}/images"


if __name__ == "__main__":
    sys.exit(faulty(*sys.argv[1:]))
