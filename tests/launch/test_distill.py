"""The comparison of distillation with training alone, in miniature: equal time, and what the JSON holds."""

import json

import pytest

import maskwise
from launch.reproduce import distill

SIZES = ("backbone.patch_size=8", "backbone.embed_dim=48", "backbone.depth=1", "backbone.num_heads=3")
IMAGES = ("data=shapes", "data.count=32", "data.size=40", "crops.global_size=32", "crops.local_number=0")
TRAIN = ("masking=none", "train.batch_size=8", "optimizer.warmup_epochs=0", "train.precision=fp32")


def test_both_are_trained_for_the_minutes_and_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        distill, "seconds_per_step", lambda recipe, overrides, folder: 1.0 if "distill" in recipe else 0.5
    )
    teacher = "support.tiny_teacher:TinyTeacher"
    words = [teacher, "distill/vitt16", "debug/tiny", *IMAGES, *SIZES, *TRAIN]
    words += ["--minutes", "0.05", "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "distill.json")]
    assert distill.main(words) == 0
    found = json.loads((tmp_path / "distill.json").read_text())
    assert found["runs"]["distill"]["steps"] == 3 and found["runs"]["alone"]["steps"] == 6
    assert found["images"]["train"] == 32 and found["parameters"]["distill"] == found["parameters"]["alone"]
    top1 = found["knn_top1_k20"]
    data = maskwise.read_recipe(tmp_path / "runs" / "alone")
    assert data.method.name == "ibot" and set(top1) == {
        *("distill", "alone", "teacher", "untrained", "pixels", "whitened_pixels")
    }
    assert top1["distill"] != pytest.approx(top1["teacher"]) or top1["alone"] != pytest.approx(top1["teacher"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["knn_top1_k20"] == top1
    before = (tmp_path / "runs" / "distill" / "metrics.jsonl").read_bytes()
    assert distill.main(words) == 0, "complete runs are not repeated"
    assert (tmp_path / "runs" / "distill" / "metrics.jsonl").read_bytes() == before


def test_the_pace_is_that_of_the_later_steps(tmp_path, monkeypatch):
    steps = [{"step": i, "seconds": 10.0 + 2 * i} for i in range(1, 7)] + [
        {"step": 6 + i, "seconds": 22.0 + 0.5 * i} for i in range(1, 7)
    ]
    monkeypatch.setattr(distill.maskwise, "train", lambda *given, **options: None)
    monkeypatch.setattr(distill, "lines", lambda folder: steps)
    assert distill.seconds_per_step("debug/tiny", [], tmp_path) == pytest.approx(0.5)
