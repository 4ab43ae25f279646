"""Kill runs 30 times at random and once at each named point (long form: tests/support/kills.py --kills 200)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "support"


def kills(tmp_path, *arguments):
    """Run the kill harness in its own process, since it forks and no other thread may exist then."""
    result = tmp_path / "kills.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result_of_process = subprocess.run(
        [sys.executable, str(HERE / "kills.py"), "--json", str(result), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result_of_process.returncode == 0, result_of_process.stdout[-3000:] + result_of_process.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.mark.slow
def test_thirty_kills_at_random_moments_and_one_at_each_point(tmp_path):
    counted = kills(tmp_path, "--kills", "30")
    assert (
        counted["random_kills"] == 30 and sum(counted["caught"].values()) == 30 and counted["runs_finished_equal"] >= 3
    )
    expected = (
        "file opened",
        "half written",
        "before fsync",
        "before rename",
        "after rename, before the pointer",
        "while pruning",
        "while evaluating",
        "metrics.jsonl in the middle of a line",
        "TensorBoard in the middle of a record",
    )
    assert len(counted["points"]) >= 25 and all(any(name in point for point in counted["points"]) for name in expected)


def test_phase_of_a_kill_is_read_from_what_it_left(tmp_path):
    """The lock is no trace of a kill: it lies in every run."""
    from support import kills as harness

    assert harness.interrupted_phase(tmp_path) == "while starting"
    for name in ("metrics.jsonl", ".lock"):
        (tmp_path / name).touch()
    assert harness.interrupted_phase(tmp_path) == "while training, evaluating or starting again"
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / ".knn_step_2").touch()
    assert harness.interrupted_phase(tmp_path) == "while writing a report, a picture or the run's record"
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    assert harness.interrupted_phase(tmp_path) == "between rename and pointer"
    (tmp_path / "checkpoints" / ".writing_step_00000004").mkdir()
    assert harness.interrupted_phase(tmp_path) == "while writing a checkpoint"


def test_harness_detects_a_difference(tmp_path, monkeypatch):
    """One weight, one line, one file left over: each is found."""
    from support import kills as harness

    folder = tmp_path / "run"
    for name, text in {
        "metrics.jsonl": '{"step": 2, "loss": 1.0, "seconds": 1}\n',
        "checkpoints/step_00000002/model.safetensors": "abc",
        "recipe.yaml": "seed: 0",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(harness, "curves", lambda folder: {})
    expected = harness.content(folder)
    harness.assert_same(expected, folder)
    (folder / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0, "seconds": 9}\n')
    harness.assert_same(expected, folder)
    for name, text in {
        "metrics.jsonl": '{"step": 2, "loss": 1.1}\n',
        "checkpoints/step_00000002/model.safetensors": "abd",
        ".last": "",
    }.items():
        before = (folder / name).read_text() if (folder / name).exists() else None
        (folder / name).write_text(text)
        with pytest.raises(AssertionError, match=name):
            harness.assert_same(expected, folder)
        (folder / name).unlink() if before is None else (folder / name).write_text(before)
