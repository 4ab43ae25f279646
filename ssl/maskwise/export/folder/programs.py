"""Programs that run without maskwise: ONNX (onnxruntime and others) and torch.export."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from maskwise.engine.atomic_file import write_error
from maskwise.errors import UserError
from maskwise.export.folder.verify import Difference, library_version, max_difference, require
from maskwise.nn.encoder import Encoder

OPSET = 18
FILES = {"onnx": "onnx/model.onnx", "onnx-attention": "onnx/model_attention.onnx", "pt2": "encoder.pt2"}
OUTPUTS = ("pooled", "patches", "attention")
EXTERNAL_DATA_BYTES = 1.5e9  # weights above this size go to a file of their own: protobuf's limit is 2 GB


class Program(nn.Module):
    """An encoder as a function of images: pooled [B, D], patches [B, N, D] and optionally attention [B, H, N]."""

    def __init__(self, encoder: Encoder, attention: bool):
        super().__init__()
        self.encoder, self.attention = encoder, attention

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of float, normalized images [B, 3, H, W]."""
        features = self.encoder(images, attention=self.attention)
        if self.attention:
            return features.pooled, features.patches, features.attention
        return features.pooled, features.patches


def export_onnx(encoder: Encoder, path: Path, *, attention: bool = False) -> bool:
    """Write an ONNX program (opset 18) with a free batch size: images [B, 3, H, W] -> pooled, patches (, attention).

    Returns whether H and W are free multiples of the patch size; else they are fixed at the encoder's image size.
    Raises UserError without onnx and onnxscript, and for the attention of a pooling without attention.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}, not installed here: pip install 'maskwise[onnx]'")
    program = trace(encoder, attention)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    with quiet():
        try:
            model = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=list(OUTPUTS[: 2 + attention]),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f"ONNX (opset {OPSET}) cannot hold this encoder: {str(error).splitlines()[0]}") from None
        tidy_onnx(model.model, dimension_names(program))
        model.save(str(path), external_data=size > EXTERNAL_DATA_BYTES)
    return any_size(program)


def trace(encoder: Encoder, attention: bool = True) -> torch.export.ExportedProgram:
    """Trace an encoder with torch.export; batch size and, if the backbone allows, height and width are free.

    Raises UserError for the attention of a pooling without attention, and for an encoder that cannot be traced.
    """
    if attention and not encoder.pooling.gives_attention:
        raise UserError("this encoder's pooling gives no attention: export the program without it")
    encoder = copy.deepcopy(encoder)  # tracing fills the backbone's caches
    program, batch = Program(encoder, attention).eval(), torch.export.Dim("batch", min=1)
    patch = encoder.backbone.patch_size
    names = ("rows", "columns")
    free_size = {2 + axis: patch[axis] * torch.export.Dim(name, min=1) for axis, name in enumerate(names)}
    is_rotary = getattr(encoder.backbone, "rope", None) is not None  # its table is computed for one grid
    with quiet():
        for sizes in [{}] if is_rotary else [free_size, {}]:
            extra = [2 * step for step in patch] if sizes else [0, 0]
            size = [side + more for side, more in zip(encoder.image_size, extra)]
            images = torch.randn(3, len(encoder.mean), *size)
            try:
                with torch.no_grad():
                    program(images)
                return without_sources(torch.export.export(program, (images,), dynamic_shapes=({0: batch, **sizes},)))
            except Exception as error:  # tracing can raise any exception of the model's code
                failure = error
    raise UserError(f"torch.export cannot trace this encoder: {str(failure).splitlines()[0]}")


def without_sources(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Remove source locations, which are absolute paths of this machine, from a program."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def dimension_names(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Return names for the free dimensions of a traced program, by the expressions that torch writes."""
    batch, _, height, width = image_shape(program)
    names = {str(batch): "batch"}
    if isinstance(height, torch.SymInt):
        (rows,), (columns,) = (side.node.expr.free_symbols for side in (height, width))
        names |= {str(rows): "rows", str(columns): "columns", str(rows * columns): "patches"}
        names |= {str(height): "height", str(width): "width"}
    return names


def tidy_onnx(model, names: dict[str, str]) -> None:
    """Name the free dimensions of an ONNX model and remove the exporter's notes, source locations among them."""

    def name_of(dimension):
        if dimension in names or dimension is None:
            return names.get(dimension)
        return re.sub(r"\bs\d+\b", lambda match: names.get(match[0], match[0]), dimension)

    import onnx_ir

    values = {*model.graph.inputs, *model.graph.initializers.values()}
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):  # functions are inlined
        node.metadata_props.clear()
        node.doc_string = None
        values |= {*node.outputs}
    for value in values:
        value.metadata_props.clear()
        if value.shape is not None:
            sides = (side.value if isinstance(side, onnx_ir.SymbolicDim) else side for side in value.shape)
            value.shape = onnx_ir.Shape([side if isinstance(side, int) else name_of(side) for side in sides])


def any_size(program: torch.export.ExportedProgram) -> bool:
    """Return whether a program takes images of any size that is a multiple of the patch size."""
    return not isinstance(image_shape(program)[-1], int)


def image_shape(program: torch.export.ExportedProgram) -> torch.Size:
    """Return the shape of a program's images; free sides are torch.SymInt."""
    nodes = program.graph.nodes
    return next(node for node in nodes if node.op == "placeholder" and node.name == "images").meta["val"].shape


def write(encoder: Encoder, folder: Path, kind: str) -> list[str]:
    """Write one of FILES into a folder, run it, and return a line with its difference from the encoder.

    Raises UserError for a difference above the tolerance.
    """
    path = folder / FILES[kind]
    attention = kind == "onnx-attention" or kind == "pt2" and encoder.pooling.gives_attention
    if kind == "pt2":
        program = trace(encoder, attention)
        try:
            torch.export.save(program, path)
        except RuntimeError as error:  # torch's writer raises it for a full disk
            raise UserError(write_error(path.name, error)) from None
        free_size = any_size(program)
        run, library = torch.export.load(path).module(), f"torch.export {torch.__version__}"
    else:
        free_size = export_onnx(encoder, path, attention=attention)
        if importlib.util.find_spec("onnxruntime") is None:
            return [f"  {FILES[kind]:<22} onnxruntime is not installed, not tried"]
        run, library = open_onnx(path), library_version("onnxruntime")
    difference = compare(encoder, run, library, attention, free_size)
    extra = require(encoder, [difference])
    size = "any size" if free_size else "x".join(map(str, encoder.image_size)) + " pixels"
    return [f"{difference.line()}   {FILES[kind]}: any batch, {size}", *(entry.line() for entry in extra)]


def open_onnx(path: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Open an ONNX file as a function of tensors, run by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()}))


@torch.no_grad()
def compare(encoder: Encoder, run: Callable, library: str, attention: bool, free_size: bool) -> Difference:
    """Return the largest differences over batches of one and three and, with a free size, over other image sizes."""
    features = attention_difference = 0.0
    patch = encoder.backbone.patch_size if free_size else (0, 0)
    cases = [(1, (0, 0)), (3, (0, 0))]
    if free_size:
        cases += [(2, (2, 2)), (1, (1, 3))]
    for count, more in cases:
        size = [side + extra * step for side, extra, step in zip(encoder.image_size, more, patch)]
        images = torch.randn(count, len(encoder.mean), *size, generator=torch.Generator().manual_seed(count))
        expected, actual = encoder(images), run(images)
        features = max(
            features, max_difference(expected.pooled, actual[0]), max_difference(expected.patches, actual[1])
        )
        if attention:
            attention_difference = max(attention_difference, max_difference(expected.attention, actual[2]))
    return Difference(library, features, attention_difference if attention else None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and logging of the exporters; `compare` detects faulty programs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
