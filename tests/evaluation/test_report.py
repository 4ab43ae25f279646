"""Report files: written whole or not at all."""

import os

import pytest

from maskwise.evaluation.report import Report


def test_interrupted_save_keeps_the_earlier_report(tmp_path, monkeypatch):
    def stop(source, target):
        raise KeyboardInterrupt

    Report({"top1": 1.0}, {}, "", {}).save(tmp_path / "knn.json")
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        Report({"top1": 2.0}, {}, "", {}).save(tmp_path / "knn.json")
    assert Report.load(tmp_path / "knn.json").numbers == {"top1": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["knn.json"]
