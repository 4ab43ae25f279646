"""Ranks that raise, die, time out or never start: the others end soon, each cause reported once in one line."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from maskwise.cli.console import print_error
from maskwise.distributed import world
from maskwise.distributed.world import World, report_once, timeout
from maskwise.engine.signals import stop_at_once
from maskwise.errors import UserError
from support.pair import free_port

LOST = (
    "maskwise: a rank stopped responding ({:g} s); see its own log above. All 2 ranks stop; "
    "the same command continues from the last checkpoint"
)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "1e12"])
def test_a_timeout_is_a_number_of_seconds(monkeypatch, text):
    monkeypatch.setenv("MASKWISE_TIMEOUT", text)
    with pytest.raises(UserError, match=f"MASKWISE_TIMEOUT={text} is not a number of seconds above 0"):
        timeout()


def test_timeouts(monkeypatch):
    monkeypatch.delenv("MASKWISE_TIMEOUT", raising=False)
    assert timeout() == 600
    monkeypatch.setenv("MASKWISE_TIMEOUT", "2.5")
    assert timeout() == 2.5


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail at alloc_cpu.cpp] you tried to allocate"), ValueError("3"), KeyError("3")]
)
def test_error_of_this_rank_is_not_a_lost_rank(monkeypatch, error):
    monkeypatch.setattr(World, "close", lambda self: None)
    with pytest.raises(type(error)) as caught, World(0, 2).fail_together():
        raise error
    assert caught.value is error


def test_single_process_loses_no_rank():
    error = RuntimeError("gloo")
    with pytest.raises(RuntimeError) as caught, World().fail_together():
        raise error
    assert caught.value is error


@pytest.fixture
def ranks(monkeypatch):
    """Set the environment of rank 1 of 2 whose rank 0 is missing."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(world.socket, "gethostname", lambda: "host")
    monkeypatch.setattr(world, "_store", None)


def test_rank_reports_its_error_without_a_reachable_store(ranks, monkeypatch):
    assert report_once("no such folder", wait=0.2) == "rank 1 on host: no such folder"
    monkeypatch.setenv("RANK", "0")
    assert report_once("no such folder") == "no such folder"


class Silent:
    """A store behind a cut cable."""

    def add(self, key, amount):
        threading.Event().wait()


def test_unreachable_store_delays_no_rank(ranks, monkeypatch):
    monkeypatch.setattr(world, "_store", Silent())
    assert report_once("no such folder", wait=0.1) == "rank 1 on host: no such folder"


def test_common_error_of_all_ranks_is_reported_once(ranks, monkeypatch):
    import datetime

    import torch.distributed as dist

    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=20)
    )
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert report_once("no such folder") == "rank 1 on host: no such folder"
    monkeypatch.setenv("RANK", "0")
    assert report_once("no such folder") is None and report_once("another") == "another"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert report_once("no such folder") == "no such folder"


def test_rank_that_counted_itself_first_prints_its_error_even_if_torchrun_ends_it(ranks, monkeypatch, capsys):
    class Ending:
        """A store that answers after torchrun has sent its signal."""

        def add(self, key, amount):
            os.kill(os.getpid(), signal.SIGTERM)
            return 1

    monkeypatch.setattr(world, "_store", Ending())
    with stop_at_once():
        print_error("no such folder")
    assert capsys.readouterr().err == "maskwise: rank 1 on host: no such folder\n"


def test_rank_without_a_store_leaves_the_error_to_the_first_rank_of_its_node(ranks, monkeypatch):
    monkeypatch.setattr(world, "_store", Silent())
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert report_once("no such folder", wait=0.1, ending=lambda: True) is None
    assert report_once("no such folder", wait=0.1) == "rank 1 on host: no such folder"


def start(fault, folder, *, timeout=60):
    """Run two ranks, the second faulty; returns output, exit statuses and seconds since the fault."""
    shared = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "MASKWISE_TIMEOUT": str(timeout),
        "LOCAL_WORLD_SIZE": "2",
    }
    children = [
        subprocess.Popen(
            [sys.executable, __file__, fault, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        messages = [child.communicate(timeout=300)[1].splitlines() for child in children]
    finally:
        for child in children:
            child.kill()
    since = time.time() - float((folder / "fault").read_text())
    return (
        [[line for line in lines if line.startswith("maskwise: ")] for lines in messages],
        [child.returncode for child in children],
        since,
    )


@pytest.mark.slow
def test_slow_rank_within_the_timeout_that_then_raises(tmp_path):
    messages, ends, since = start("raises", tmp_path)
    assert messages == [
        [LOST.format(60)],
        [
            f"maskwise: rank 1 on {socket.gethostname()}: the disk of this node is gone; "
            "the same command continues from the last checkpoint"
        ],
    ]
    assert ends == [2, 2] and since < 30


@pytest.mark.slow
def test_killed_rank(tmp_path):
    messages, ends, since = start("killed", tmp_path)
    assert messages == [[LOST.format(60)], []] and ends == [2, -signal.SIGKILL] and since < 30


@pytest.mark.slow
def test_rank_beyond_the_timeout(tmp_path):
    messages, ends, since = start("times out", tmp_path, timeout=4)
    assert messages[0] == [LOST.format(4)] and ends == [2, 2] and 4 <= since < 60


@pytest.mark.slow
def test_rank_that_fails_before_the_rendezvous(tmp_path):
    messages, ends, since = start("finds no images", tmp_path, timeout=6)
    assert messages == [
        [
            "maskwise: not all of the 2 ranks joined within 6 s: see the logs of the others, and check that every "
            "machine reaches the first one and runs the same command"
        ],
        [
            f"maskwise: rank 1 on {socket.gethostname()}: data.path: nowhere does not exist; give the folder that "
            "holds the images"
        ],
    ]
    assert ends == [2, 2] and since < 60


def faulty(fault, folder):
    """Run one rank; rank 1 has a fault at its fifth step or before the first."""
    from maskwise import cli
    from maskwise.cli.console import print_error
    from maskwise.engine import loop
    from maskwise.engine.checkpoint import Checkpoints
    from maskwise.engine.run_log import RunLog
    from support.tiny_method import Stream, make_trainer

    if fault == "finds no images":
        path = "nowhere" if os.environ["RANK"] == "1" else make_images(folder)
        if path == "nowhere":
            record_fault_time(folder)
        return cli.main(
            [
                "train",
                "debug/tiny",
                "--out",
                f"{folder}/run",
                "evaluate.knn_every=0",
                "data=folder",
                f"data.path={path}",
            ]
        )

    def at(step):
        if step != 4 or world.rank == 0:
            return
        record_fault_time(folder)
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep({"times out": 20, "raises": 3}[fault])
        if fault == "raises":
            raise UserError("the disk of this node is gone")

    world, folder = World.start("cpu"), Path(folder)
    try:
        with world.fail_together():
            trainer, run_log = (
                make_trainer(12, world=world),
                RunLog(folder, 12, quiet=True, loggers=(), main=world.is_main),
            )
            loop.fit(
                trainer,
                lambda start: Stream(start, 12, at),
                lambda batch: (batch.global_crops, batch.local_crops),
                run_log,
                Checkpoints(folder, world=world),
                {},
                loop.Intervals(log=2, save=3),
            )
    except UserError as error:
        print_error(str(error))
        return 2
    return 0


def record_fault_time(folder):
    Path(folder, "fault").write_text(str(time.time()))


def make_images(folder):
    """Write eight gray images."""
    import numpy as np

    from maskwise.imaging.drawing import write_png

    os.makedirs(f"{folder}/images")
    for number in range(8):
        write_png(f"{folder}/images/{number}.png", np.full((40, 40, 3), 20 * number, dtype=np.uint8))
    return f"{folder}/images"


if __name__ == "__main__":
    sys.exit(faulty(*sys.argv[1:]))
