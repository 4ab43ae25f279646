"""Ten kinds of damaged files through the real loader in a limited child process, and the checks of its results."""

import csv
import hashlib
import io
import sys

import numpy as np
import pytest
from PIL import Image

from launch.reproduce import damage, fuzz


def test_every_kind_and_format_matches_its_name(tmp_path):
    for form in damage.FORMS:
        whole = damage.sound(form, 3, 0)
        assert whole == damage.sound(form, 3, 0) != damage.sound(form, 4, 0)
        with Image.open(io.BytesIO(whole)) as image:
            assert image.format == damage.FORMS[form][1]
            pixels = np.asarray(image)
        for kind, hurt in damage.KINDS.items():
            rng = damage.random.Random(1)
            data, verdict = hurt(whole, form, rng)
            assert verdict in ("readable", "refused", "either")
            assert (data == whole) == (kind == "misnamed"), f"{kind} {form}"
            if kind == "huge":
                try:
                    with Image.open(io.BytesIO(data)) as image:
                        assert image.width * image.height > 100_000_000
                except Image.DecompressionBombError:
                    pass
        assert pixels.std() > 5


def test_expectations_are_written_before_any_image_is_read(tmp_path):
    rows = damage.write(tmp_path, 2, seed=5)
    assert len(rows) == 20 and [row["kind"] for row in rows[:10]] == list(damage.KINDS)
    assert list(csv.DictReader(open(tmp_path / "expectations.csv", newline=""))) == rows
    for row in rows:
        assert hashlib.sha256((tmp_path / row["path"]).read_bytes()).hexdigest() == row["sha256"]
    assert damage.write(tmp_path / "again", 2, seed=5) == rows != damage.write(tmp_path / "other", 2, seed=6)


def test_checker_reports_deviations():
    def ends(**more):
        return [{"index": 0, "verdict": "readable", "pixels": "p", "seconds": 0.1, **more}]

    row = {"path": "a.jpg", "kind": "appended", "verdict": "readable", "base": "b"}
    assert fuzz.unexpected([row], ends(), {"b": "p"}) == []
    assert "other pixels" in fuzz.unexpected([row], ends(), {"b": "q"})[0]
    assert "took 9" in fuzz.unexpected([row], ends(seconds=9), {"b": "p"})[0]
    assert "expected readable" in fuzz.unexpected([row], ends(verdict="refused", reason="cut"), {"b": "p"})[0]
    either = {**row, "kind": "noise", "verdict": "either"}
    assert fuzz.unexpected([either], ends(verdict="refused", reason="cut"), {}) == []
    for verdict in ("hang", "crash (-11)", "ValueError: x"):
        assert verdict in fuzz.unexpected([either], ends(verdict=verdict), {})[0]
    assert "limit of memory" in fuzz.unexpected([either], ends(verdict="refused", reason="MemoryError"), {})[0]


def test_child_that_crashes_or_hangs_is_replaced(tmp_path, monkeypatch):
    script = (
        "import json,os,sys,time\nfor i in range(int(sys.argv[1]), 4):\n    i == 1 and os.abort()\n"
        "    i == 2 and time.sleep(60)\n    print(json.dumps({'index': i, 'verdict': 'readable'}), flush=True)"
    )
    popen = fuzz.subprocess.Popen
    monkeypatch.setattr(
        fuzz.subprocess,
        "Popen",
        lambda command, **options: popen([sys.executable, "-c", script, command[-1]], **options),
    )
    assert [line["verdict"] for line in fuzz.verdicts(tmp_path, 4, seconds=2.0)] == [
        "readable",
        "crash (-6)",
        "hang",
        "readable",
    ]


@pytest.mark.slow
def test_two_thousand_damaged_files_are_handled(tmp_path):
    result = fuzz.run(200, 0, tmp_path)
    assert result["wrong"] == [] and result["files"] == 2000 and result["grown_mib"] < 600
    assert result["readable"] > 400 and result["refused"] > 800
