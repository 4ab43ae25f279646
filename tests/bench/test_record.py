"""The record at the head of a file of results, and the committed files."""

import json
from pathlib import Path

import pytest

from maskwise.bench import record
from maskwise.cli.main import main

RESULTS = Path(__file__).parents[2] / "docs" / "results"
FILES = sorted(RESULTS.glob("*.json"))
KNOWN = {
    "command": "maskwise bench knn",
    "commit": "0123456789ab",
    "clean": True,
    "date": "2026-11-29",
    "seed": 0,
    "hardware": "AMD EPYC, 2 cores",
    "threads": 1,
    "torch": "2.14.1",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_committed_results_have_a_record(path):
    assert record.mistakes(record.read(path)) == []


@pytest.mark.parametrize(
    "change, mistake",
    [
        ({"clean": "yes"}, "record.clean is 'yes'"),
        ({"commit": "0123456789ab+"}, "record.commit holds '0123456789ab+', not a commit's hexadecimal name"),
        ({"date": "2026-11-29 13:50:16"}, "record.date is '2026-11-29 13:50:16', not YYYY-MM-DD"),
        ({"threads": True}, "record.threads is True"),
        ({"seconds": 3.0}, "record.seconds is no field of a record; what was measured stands beside `record`"),
        ({"commit": None}, "record.clean is known and record.commit is not"),
    ],
)
def test_mistakes_in_a_record(change, mistake, tmp_path):
    assert record.mistakes({"record": KNOWN, "top1": 1.0}) == []
    assert record.mistakes({"record": {**KNOWN, **change}, "top1": 1.0}) == [mistake]
    with pytest.raises(ValueError, match="record"):
        record.write(tmp_path / "a.json", {"record": {**KNOWN, **change}, "top1": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_field_that_is_missing_or_a_result_without_a_record():
    without = {name: value for name, value in KNOWN.items() if name != "seed"}
    assert record.mistakes({"record": without, "a": 1}) == ["record.seed is missing (null where it is not known)"]
    assert record.mistakes({"a": 1, "record": KNOWN}) == ["its first key is not `record`"]
    assert record.mistakes({"record": KNOWN}) == ["nothing was measured"]


def test_written_records_come_first_and_are_read_back(tmp_path):
    record.write(tmp_path / "a.json", {"top1": 4.5, "record": KNOWN})
    assert list(json.loads((tmp_path / "a.json").read_text())) == ["record", "top1"]
    assert record.read(tmp_path / "a.json") == {"record": KNOWN, "top1": 4.5}


def test_commits_of_changed_and_unchanged_files():
    assert record.checkout("0123456789ab+") == {"commit": "0123456789ab", "clean": False}
    assert record.checkout("0123456789ab") == {"commit": "0123456789ab", "clean": True}
    assert record.checkout(None) == {"commit": None, "clean": None}


def test_parts_measured_at_several_commits():
    later = {**KNOWN, "commit": "fedcba987654", "date": "2026-11-30"}
    assert record.continued(KNOWN, KNOWN) == KNOWN
    both = record.continued(KNOWN, later)
    assert both == {**later, "commit": ["0123456789ab", "fedcba987654"], "clean": True}
    assert record.continued(both, {**KNOWN, "clean": False})["clean"] is False
    assert record.continued({**KNOWN, "clean": False}, later)["clean"] is False
    assert record.continued(both, {**KNOWN, "clean": None})["clean"] is None
    assert record.continued(both, KNOWN)["commit"] == ["0123456789ab", "fedcba987654"]


def test_commands_lose_folders_of_the_machine():
    command = "maskwise train /home/me/a.yaml --out /tmp/runs/b data.path=/data/photos key=1/2 launch/x.py"
    assert record.without_folders(command) == ("maskwise train a.yaml --out b data.path=photos key=1/2 launch/x.py")


def test_every_benchmark_writes_the_format(tmp_path, capsys):
    arguments = ["--bank", "50", "--queries", "20", "--width", "8", "--k", "1", "--device", "cpu"]
    assert main(["bench", "knn", *arguments, "--json", str(tmp_path / "knn.json")]) == 0
    result = record.read(tmp_path / "knn.json")
    assert record.mistakes(result) == [] and result["record"]["seed"] == 0 and result["bank"] == 50
    assert result["record"]["hardware"] in capsys.readouterr().out
