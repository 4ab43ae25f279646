"""The script for GPUs, in miniature on whatever device is there."""

import json

import pytest

from launch.reproduce import gpu


@pytest.mark.slow
def test_gpu_script_measures_steps_loader_and_training(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert (
        gpu.main(
            [
                "--miniature",
                "--models",
                "ViT-S/16",
                "--batches",
                "2",
                "4",
                "--steps",
                "2",
                "--no-compile",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    rows = json.loads(out.read_text())["rows"]
    assert [row["what"] for row in rows] == ["synthetic"] * 4 + ["loader", "end to end"]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert rows[0]["flops"] > 0 and rows[-1]["parts"]["backward"] > 0
    assert "| end to end | ViT-S/16 | " in capsys.readouterr().out
