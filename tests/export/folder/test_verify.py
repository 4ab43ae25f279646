"""Verification of exports: relative differences, a tolerance that follows the network, libraries that fail."""

import json

import pytest
import torch

from export.folder.test_folder import build
from maskwise.errors import UserError
from maskwise.export import load, write
from maskwise.export.folder import verify
from maskwise.nn import POOLINGS, Backbone, Encoder


def test_a_library_that_cannot_open_the_export_is_named(tmp_path, monkeypatch):
    def fail(folder):
        raise RuntimeError("no such layer\nmore")

    monkeypatch.setattr(verify, "open_timm", fail)
    with pytest.raises(UserError, match=r"timm [\d.]+ cannot open the export \(no such layer\): nothing was written"):
        write.write(build(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_differences_are_relative_and_infinite_for_nan():
    big, small = torch.tensor([100.0, 1.0]), torch.tensor([5e-5])
    assert verify.max_difference(big, big + 1e-3) == pytest.approx(1e-5, rel=1e-2)
    assert verify.max_difference(small, small + 5e-6) == pytest.approx(0.1, rel=1e-2)
    assert verify.max_difference(big, big * float("nan")) == float("inf")
    assert verify.max_difference(big, big[:1]) == float("inf")
    assert verify.max_difference(big * 0, big * 0) == 0 and verify.Difference("x", 1e-6, 2e-5).largest == 2e-5


def test_the_tolerance_follows_the_rounding_of_the_network():
    """A fresh MobileNetV2 is 1e-5 from its own float64 features, a Vision Transformer below 2e-6."""
    vit = build()
    assert verify.rounding_error(vit).largest < 2e-6
    for largest in (1.5e-5, float("inf")):
        with pytest.raises(UserError, match="differs in x by more than 1.0e-05"):
            verify.require(vit, [verify.Difference("x", largest)])
    torch.manual_seed(0)
    mobile = Encoder(Backbone("mobilenetv2_100"), POOLINGS["gap"](1280)).eval()
    rounding = verify.rounding_error(mobile).largest
    assert 5e-6 < rounding < 3e-5
    assert verify.require(mobile, [verify.Difference("x", 3 * rounding)])[0].library == "rounding of float32"
    with pytest.raises(UserError, match="differs in x"):
        verify.require(mobile, [verify.Difference("x", 5 * rounding)])


def test_a_difference_above_the_tolerance_writes_nothing(tmp_path, monkeypatch):
    write.write(build(), tmp_path / "out")
    before = (tmp_path / "out" / "backbone.safetensors").read_bytes()
    monkeypatch.setattr(verify, "timm_patches", lambda model, images: model.forward_features(images)[:, 1:] + 1e-3)
    with pytest.raises(UserError, match="differs in timm .* nothing was written"):
        write.write(build(init_values=0.1), tmp_path / "out")
    assert (tmp_path / "out" / "backbone.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_epsilon_is_written_for_transformers_and_stated_for_timm(tmp_path):
    """timm's norms have 1e-6: the difference is stated, up to 1e-3."""
    lines = []
    write.write(build(norm_eps=1e-12), tmp_path / "near", say=lines.append)
    assert json.loads((tmp_path / "near" / "config.json").read_text())["layer_norm_eps"] == 1e-12
    assert load.load(tmp_path / "near").norm.eps == 1e-12
    (timm_line,) = (line for line in lines if " timm " in line)
    assert timm_line.endswith("(norm_eps=1e-12, which timm does not have)")
    assert not any("norm_eps" in line for line in lines if "maskwise" in line or "transformers" in line)
    with pytest.raises(UserError, match=r"timm .* by more than 1.0e-03 .*norm_eps=0.1.*: nothing was wr"):
        write.write(build(norm_eps=0.1), tmp_path / "far")
    assert [path.name for path in tmp_path.iterdir()] == ["near"]
