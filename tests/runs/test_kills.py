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
