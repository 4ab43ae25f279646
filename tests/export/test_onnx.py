"""Programs without this library: ONNX in onnxruntime and torch.export, any batch, beside the encoder."""

import importlib.util

import pytest
import torch

from maskwise.export import check, folder, onnx
from maskwise.functional.errors import UserError
from maskwise.nn import POOLINGS, Backbone, Encoder

needs_onnx = pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="onnx is not installed")


def build(pooling="cls", **options):
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return Encoder(Backbone(options.pop("name", "vit_tiny_patch16_224"), **{**shape, **options}), POOLINGS[pooling](32)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("pooling, options", [("cls", {"reg_tokens": 1}), ("simpool", {"class_token": False})], ids=["cls", "simpool"])
def test_torch_export(pooling, options, tmp_path):
    encoder = build(pooling, **options)
    (line,) = onnx.write(encoder, tmp_path, "pt2")
    assert "encoder.pt2" in line and "attention" in line
    run = torch.export.load(tmp_path / "encoder.pt2").module()
    x = torch.randn(5, 3, 40, 24)
    wanted, got = encoder(x), run(x)
    for one, other in zip((wanted.pooled, wanted.patches, wanted.attention), got, strict=True):
        assert (one - other).abs().max() < 1e-5


@needs_onnx
@pytest.mark.slow
def test_onnx_with_attention_and_any_batch(tmp_path):
    import onnx as library

    encoder = build("simpool", class_token=False)
    onnx.write(encoder, tmp_path, "onnx-attention")
    model = library.load(tmp_path / "onnx" / "model_attention.onnx")
    library.checker.check_model(model)
    assert {each.domain: each.version for each in model.opset_import}[""] == onnx.OPSET
    assert [each.name for each in model.graph.output] == ["pooled", "patches", "attention"]
    batch, channels, height, width = model.graph.input[0].type.tensor_type.shape.dim
    assert channels.dim_value == 3 and all(each.dim_param and not each.dim_value for each in (batch, height, width))
    run = onnx.opened(tmp_path / "onnx" / "model_attention.onnx")
    for count, size in ((1, (32, 32)), (4, (24, 56))):
        x = torch.randn(count, 3, *size)
        wanted, got = encoder(x), run(x)
        assert (wanted.pooled - got[0]).abs().max() < 1e-5 and (wanted.attention - got[2]).abs().max() < 1e-6


@needs_onnx
@pytest.mark.slow
def test_programs_lie_in_the_exported_folder(tmp_path):
    lines = []
    folder.write(build(), tmp_path / "out", onnx=("onnx", "pt2"), say=lines.append)
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file() and (tmp_path / "out" / "encoder.pt2").is_file()
    assert sum("onnxruntime" in line or "torch.export" in line for line in lines) == 2
    assert len(onnx.opened(tmp_path / "out" / "onnx" / "model.onnx")(torch.randn(2, 3, 32, 32))) == 2


def test_a_rotary_model_keeps_its_size(tmp_path):
    encoder = build(name="vit_small_patch16_dinov3")
    program = onnx.exported(encoder, attention=False)
    assert not onnx.any_size(program)
    x = torch.randn(2, 3, 32, 32)
    assert (program.module()(x)[0] - encoder(x).pooled).abs().max() < 1e-5
    encoder(torch.randn(1, 3, 48, 48))  # tracing left nothing behind


def test_a_program_that_differs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "compare", lambda encoder, run, library, attention, sizes: check.Difference(library, 1e-3, None))
    with pytest.raises(UserError, match="differs in torch.export"):
        onnx.write(build(), tmp_path, "pt2")


def test_without_onnx_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="ONNX needs onnx and onnxscript, not installed here"):
        folder.write(build(), tmp_path / "out", onnx=("onnx",))
    assert not list(tmp_path.iterdir())


def test_attention_that_there_is_none_of(monkeypatch):
    encoder = build()
    encoder.pooling.gives_attention = False
    with pytest.raises(UserError, match="gives no attention"):
        onnx.exported(encoder, attention=True)
