"""launch/slurm.sbatch on a real Slurm cluster of one node, with two gloo ranks per job.

Jobs that were interrupted end with the checkpoints, reports and metrics of the same recipe on two ranks without Slurm.
Interruptions come before a given step (support/paused_rank.py). Slurm sends the signal of the time limit itself; the
limit of the running job is shortened, since an early signal would meet ranks that are still importing torch. Where
Slurm is absent and cannot be installed, all skip with the reason.
"""

import contextlib
import json
import sys
from pathlib import Path

import pytest

from support import kills, pair
from support.slurm_cluster import ENDED, Cluster, Refused, install

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("data.count=24", "train.epochs=4", "train.save_every=2", "evaluate.knn_every=2", "evaluate.baselines=false")
RECIPES = {"ibot": ("debug/tiny",), "supervised": ("debug/tiny_supervised",)}
RANKS = ("--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=60", "--signal=USR1@600")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    try:
        install()
    except Refused as reason:
        pytest.skip(f"Slurm cannot be installed: {reason}")
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(Cluster())
        except Refused as reason:
            pytest.skip(f"Slurm cannot be started: {reason}")
        yield running


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Contents of a run of each recipe by two ranks without Slurm and without launch scripts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    pairs = [
        pair.start("-m", "maskwise", "train", *recipe, "--out", folder / name, *OPTIONS)
        for name, recipe in RECIPES.items()
    ]
    try:
        for ranks in pairs:
            pair.end(ranks, 1200)
    finally:
        for rank in sum(pairs, []):
            rank.kill()
            rank.wait()
    return {name: contents(folder / name) for name in RECIPES}


@pytest.fixture
def submit(cluster, tmp_path):
    """Submit launch/slurm.sbatch with words and options of sbatch; returns the number of the job."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/support/paused_rank.py" "$@"\n')
    python.chmod(0o755)
    jobs = []

    def submit(*words, options=(), python=python, **variables):
        variables |= {"MASKWISE_PYTHON": str(python), "MASKWISE_HOME": str(ROOT), "OMP_NUM_THREADS": "1"}
        log = f"--output={cluster.folder}/job_%j.log"
        command = [
            "sbatch",
            "--parsable",
            *RANKS,
            log,
            *options,
            str(ROOT / "launch" / "slurm.sbatch"),
            *map(str, words),
        ]
        jobs.append(cluster.run(*command, PAUSED=str(tmp_path / "paused"), **variables))
        return jobs[-1]

    yield submit
    cluster.run("scancel", "--quiet", *jobs)


def contents(run):
    """What two runs have in common if one equals the other."""
    found = kills.content(run)
    del found["run.json"]["command"]  # it names the run folder
    return found


def assert_same(expected, run):
    actual = contents(run)
    assert expected.keys() == actual.keys(), sorted(expected.keys() ^ actual.keys())
    different = [name for name in expected if expected[name] != actual[name]]
    assert not different, f"{different} differ"


def wait_for_pause(cluster, job, tmp_path, start=0):
    """Wait until both ranks of a start wait before their step."""

    def paused():
        assert cluster.state(job) not in ENDED, cluster.logs()
        return all((tmp_path / f"paused.{start}.{rank}").exists() for rank in range(2))

    cluster.wait(paused, f"start {start} of job {job} pauses")


def test_run_survives_time_limit_requeue_and_cancellation(cluster, submit, undisturbed, tmp_path):
    """Slurm's signal before the time limit, `scontrol requeue`, `scancel` and the same command again, in this order."""
    run = tmp_path / "run"
    words = (*RECIPES["ibot"], "--out", run, *OPTIONS)
    job = submit(*words, PAUSE_AT="3,6,9")
    wait_for_pause(cluster, job, tmp_path)
    cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+620")  # the signal is due 600 s before
    cluster.wait(lambda: cluster.field(job, "Restarts") == "1" or cluster.state(job) in ENDED, f"job {job} is requeued")
    assert cluster.field(job, "Restarts") == "1", cluster.logs()
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    wait_for_pause(cluster, job, tmp_path, start=1)
    assert not (run / "preempted").exists() and "TIME LIMIT" not in (cluster.folder / f"job_{job}.log").read_text()
    cluster.run("scontrol", "requeue", job)

    wait_for_pause(cluster, job, tmp_path, start=2)
    cluster.run("scancel", job)
    assert cluster.wait_until_ended(job) == "CANCELLED" and cluster.field(job, "Restarts") == "2"
    assert int((run / "preempted").read_text()) == 10

    again = submit(*words)
    assert cluster.wait_until_ended(again) == "COMPLETED", cluster.logs()
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 4, 7, 10]
    assert_same(undisturbed["ibot"], run)


def test_array_of_two_recipes_of_which_one_is_interrupted(cluster, submit, undisturbed, tmp_path):
    """The second task, whose number is that of the array, is signaled; the first must not be requeued with it."""
    lines = [f"{recipe} --out '{tmp_path}/{name}'\n" for name, (recipe,) in RECIPES.items()]
    (tmp_path / "runs.txt").write_text("".join(lines))
    job = submit(f"@{tmp_path}/runs.txt", *OPTIONS, options=["--array=1-2"], PAUSE_AT="3", PAUSE_TASK="2")
    wait_for_pause(cluster, f"{job}_2", tmp_path)
    cluster.run("scancel", "--signal=USR1", f"{job}_2")
    for task in (2, 1):
        assert cluster.wait_until_ended(f"{job}_{task}") == "COMPLETED", cluster.logs()
        assert cluster.field(f"{job}_{task}", "Restarts") == str(task - 1)
    for name in RECIPES:
        assert_same(undisturbed[name], tmp_path / name)


DEAF_PYTHON = """#!/usr/bin/env bash
trap "" USR1
trap 'touch "$RUN/preempted"; exit 0' TERM
touch "$RUN/started"
if [ -n "${SLURM_RESTART_COUNT:-}" ]; then exit 0; fi
while true; do sleep 0.1; done
"""


def test_run_that_saves_after_the_time_limit_is_requeued(cluster, submit, tmp_path):
    """A step or an evaluation longer than the signal's lead: Slurm ends the job, and the run saves at SIGTERM."""
    python = tmp_path / "deaf_python"
    python.write_text(DEAF_PYTHON)
    python.chmod(0o755)
    job = submit("debug/tiny", "--out", tmp_path, python=python, RUN=str(tmp_path))
    cluster.wait((tmp_path / "started").exists, "the ranks start")
    cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+1")
    assert cluster.wait_until_ended(job) == "COMPLETED", cluster.logs()
    assert cluster.field(job, "Restarts") == "1"
    assert "TIME LIMIT" in (cluster.folder / f"job_{job}.log").read_text()
