"""The soak's judgment on samples made up, and its short form: flat memory, and nothing left behind after Ctrl-C."""

import os
import subprocess
import sys

import pytest

from launch.reproduce import soak


def samples(**growth):
    return [
        {
            "seconds": i,
            "step": 100 * i,
            **{
                key: start + rate * i
                for key, (start, rate) in {"rss_mib": (400.0, 0.0), "handles": (5, 0), **growth}.items()
            },
        }
        for i in range(40)
    ]


def test_growing_samples_are_not_flat():
    assert soak.verdict(samples())["flat"]
    assert soak.verdict(samples(rss_mib=(400.0, 0.2)))["flat"]  # 1 % over the second half
    assert not soak.verdict(samples(rss_mib=(400.0, 1.0)))["flat"]
    assert not soak.verdict(samples(handles=(5, 0.1)))["flat"]
    verdict = soak.verdict(samples(rss_mib=(400.0, 1.0)))
    assert verdict["rss_mib_per_1000_steps"] == pytest.approx(10.0) and verdict[
        "rss_mib_grown_in_second_half"
    ] == pytest.approx(19.0)


def test_descendant_processes_are_listed_without_zombies():
    # which a job in the background is born without
    heeds = "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            heeds + "; subprocess.Popen(['sleep', '60']); print('up', flush=True); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    child.stdout.readline()
    below = soak.descendants(os.getpid())
    assert child.pid in below and len(soak.descendants(child.pid)) == 1 and soak.alive(child.pid)
    ends = soak.ended(child)
    assert ends["processes"] == 2 and ends["processes_left"] == 0 and not soak.alive(child.pid)


def test_recipe_is_valid():
    from maskwise.recipe.reading import read_recipe

    assert read_recipe("debug/tiny", *soak.TINY).train.batch_size == 4


@pytest.mark.slow
def test_the_short_form(tmp_path):
    result = soak.soak(0.2, 300, tmp_path, every=2.0, say=lambda text: None)
    assert result["samples"][-1]["step"] >= 300 and result["verdict"]["flat"], result["verdict"]
    assert result["end"] == {"exit": 0, "processes": 1, "processes_left": 0, "shared_memory_left": []}
    for name, options, ranks in (
        ("workers", ("speed.workers=2",), 1),
        ("ranks", (), 2),
        ("both", ("speed.workers=1",), 2),
    ):
        left = soak.interrupted(tmp_path / name, *options, ranks=ranks, at=20)
        assert (
            left["processes"] > 1
            and left["processes_left"] == 0
            and left["shared_memory_left"] == []
            and left["preempted"]
        ), (name, left)
