"""Programs that run without maskwise: ONNX in onnxruntime and torch.export, at any batch size, equal to the encoder."""

import importlib.util

import pytest
import torch

from maskwise.errors import UserError
from maskwise.export import write
from maskwise.export.folder import programs, verify
from maskwise.nn import POOLINGS, Backbone, Encoder

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx is not installed",
)


def build(pooling="cls", **options):
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return Encoder(
        Backbone(options.pop("name", "vit_tiny_patch16_224"), **{**shape, **options}), POOLINGS[pooling](32)
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "pooling, options", [("cls", {"reg_tokens": 1}), ("simpool", {"class_token": False})], ids=["cls", "simpool"]
)
def test_torch_export(pooling, options, tmp_path):
    encoder = build(pooling, **options)
    (line,) = programs.write(encoder, tmp_path, "pt2")
    assert "encoder.pt2" in line and "attention" in line
    run = torch.export.load(tmp_path / "encoder.pt2").module()
    x = torch.randn(5, 3, 40, 24)
    features, outputs = encoder(x), run(x)
    for expected, output in zip((features.pooled, features.patches, features.attention), outputs, strict=True):
        assert (expected - output).abs().max() < 1e-5


@needs_onnx
@pytest.mark.slow
def test_onnx_with_attention_and_any_batch(tmp_path):
    import onnx

    encoder = build("simpool", class_token=False)
    programs.write(encoder, tmp_path, "onnx-attention")
    model = onnx.load(tmp_path / "onnx" / "model_attention.onnx")
    onnx.checker.check_model(model)
    assert {opset.domain: opset.version for opset in model.opset_import}[""] == programs.OPSET
    assert [output.name for output in model.graph.output] == ["pooled", "patches", "attention"]
    assert shape_of(model.graph.input[0]) == ["batch", 3, "height", "width"]
    expected = [["batch", 32], ["batch", "patches", 32], ["batch", 1, "patches"]]
    assert [shape_of(output) for output in model.graph.output] == expected
    assert not any(entry.metadata_props or entry.doc_string for entry in (*model.graph.node, *model.graph.value_info))
    run = programs.open_onnx(tmp_path / "onnx" / "model_attention.onnx")
    for count, size in ((1, (32, 32)), (4, (24, 56))):
        x = torch.randn(count, 3, *size)
        features, outputs = encoder(x), run(x)
        assert (features.pooled - outputs[0]).abs().max() < 1e-5 and (
            features.attention - outputs[2]
        ).abs().max() < 1e-6


def shape_of(value):
    """Return the names and sizes of an ONNX value's dimensions."""
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_dimensions_of_a_patch_of_one_pixel():
    names = programs.dimension_names(programs.trace(build(image_size=4, patch_size=1), attention=False))
    assert sorted(names.values()) == ["batch", "height", "patches", "width"]


@needs_onnx
@pytest.mark.slow
def test_dimensions_of_a_fixed_size(tmp_path):
    import onnx

    programs.export_onnx(build(name="vit_small_patch16_dinov3"), tmp_path / "rotary.onnx")
    graph = onnx.load(tmp_path / "rotary.onnx").graph
    assert [shape_of(value) for value in (*graph.input, *graph.output)] == [
        ["batch", 3, 32, 32],
        ["batch", 32],
        ["batch", 16, 32],
    ]


def test_programs_hold_no_source_locations():
    program = programs.trace(build(), attention=False)
    nodes = [
        node for module in program.graph_module.modules() for node in getattr(module, "graph", program.graph).nodes
    ]
    assert nodes and not any("stack_trace" in node.meta for node in nodes)


@needs_onnx
@pytest.mark.slow
def test_programs_are_in_the_exported_folder(tmp_path):
    lines = []
    write.write(build(), tmp_path / "out", onnx=("onnx", "pt2"), say=lines.append)
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file() and (tmp_path / "out" / "encoder.pt2").is_file()
    assert sum("onnxruntime" in line or "torch.export" in line for line in lines) == 2
    assert len(programs.open_onnx(tmp_path / "out" / "onnx" / "model.onnx")(torch.randn(2, 3, 32, 32))) == 2


def test_a_rotary_model_keeps_its_size(tmp_path):
    encoder = build(name="vit_small_patch16_dinov3")
    program = programs.trace(encoder, attention=False)
    assert not programs.any_size(program)
    x = torch.randn(2, 3, 32, 32)
    assert (program.module()(x)[0] - encoder(x).pooled).abs().max() < 1e-5
    encoder(torch.randn(1, 3, 48, 48))  # tracing left no state in the encoder


def test_a_program_that_differs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        programs, "compare", lambda encoder, run, library, attention, sizes: verify.Difference(library, 1e-3, None)
    )
    with pytest.raises(UserError, match="differs in torch.export"):
        programs.write(build(), tmp_path, "pt2")


def test_without_onnx_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="ONNX needs onnx and onnxscript, not installed here"):
        write.write(build(), tmp_path / "out", onnx=("onnx",))
    assert not list(tmp_path.iterdir())


def test_a_pooling_without_attention(monkeypatch):
    encoder = build()
    encoder.pooling.gives_attention = False
    with pytest.raises(UserError, match="gives no attention"):
        programs.trace(encoder, attention=True)
