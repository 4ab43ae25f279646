"""Programs that run without this library: ONNX for onnxruntime and others, and torch.export's own."""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from maskwise.export.check import Difference, far, named, require
from maskwise.functional.errors import UserError
from maskwise.nn.encoder import Encoder

OPSET = 18
FILES = {"onnx": "onnx/model.onnx", "onnx-attention": "onnx/model_attention.onnx", "pt2": "encoder.pt2"}
OUTPUTS = ("pooled", "patches", "attention")
EMBEDDED = 1.5e9  # bytes of weights above which ONNX keeps them in a file of their own


class Program(nn.Module):
    """An encoder as a function of images alone: (pooled [B, D], patches [B, N, D]) and, if asked for, attention [B, H, N]."""

    def __init__(self, encoder: Encoder, attention: bool):
        super().__init__()
        self.encoder, self.attention = encoder, attention

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Float, normalised images [B, 3, H, W] -> the outputs."""
        features = self.encoder(images, attention=self.attention)
        return (features.pooled, features.patches, features.attention) if self.attention else (features.pooled, features.patches)


def export_onnx(encoder: Encoder, path: Path, *, attention: bool = False) -> bool:
    """Write an ONNX program of opset 18: images [B, 3, H, W] -> pooled, patches (, attention), any B and, where it can be, any H and W.

    Returns whether H and W are free multiples of the patch; else they are the encoder's image size.
    Raises UserError without onnx and onnxscript, and for attention of a pooling that has none.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}, not installed here: pip install 'maskwise[onnx]'")
    program = exported(encoder, attention)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    with quiet():
        try:
            made = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=list(OUTPUTS[: 2 + attention]), verbose=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f"ONNX (opset {OPSET}) cannot hold this encoder: {str(error).splitlines()[0]}") from None
        made.save(str(path), external_data=size > EMBEDDED)
    return any_size(program)


def exported(encoder: Encoder, attention: bool = True) -> torch.export.ExportedProgram:
    """torch.export's program of an encoder; the batch is free, and so are height and width in patches where the backbone allows.

    Raises UserError for attention that there is none of, and for an encoder that cannot be traced.
    """
    if attention and not getattr(encoder.pooling, "gives_attention", False):
        raise UserError("this encoder's pooling gives no attention: export the program without")
    encoder = copy.deepcopy(encoder)  # tracing must leave nothing behind in what a backbone remembers
    program, batch = Program(encoder, attention).eval(), torch.export.Dim("batch", min=1)
    patch = getattr(encoder.backbone, "patch_size", None)
    free = {} if patch is None else {2 + axis: patch[axis] * torch.export.Dim(name, min=1) for axis, name in enumerate(("rows", "columns"))}
    rotary = getattr(encoder.backbone, "rope", None) is not None  # its table is made for one grid, outside the program
    with quiet():
        for sizes in ([free, {}] if free and not rotary else [{}]):
            more = [2 * step for step in patch] if sizes else [0, 0]
            images = torch.randn(3, len(encoder.mean), *(side + extra for side, extra in zip(encoder.image_size, more)))
            try:
                with torch.no_grad():
                    program(images)
                return torch.export.export(program, (images,), dynamic_shapes=({0: batch, **sizes},))
            except Exception as error:  # tracing raises whatever the model's own code meets
                fault = error
    raise UserError(f"torch.export cannot trace this encoder: {str(fault).splitlines()[0]}")


def any_size(program: torch.export.ExportedProgram) -> bool:
    """Whether a program takes images of any size that divides into patches."""
    shape = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name == "images").meta["val"].shape
    return not isinstance(shape[-1], int)


def write(encoder: Encoder, folder: Path, kind: str) -> list[str]:
    """Write one of FILES into a folder and run it; a line that tells how far it is from the encoder. Raises UserError where it is too far."""
    path = folder / FILES[kind]
    attention = kind == "onnx-attention" or kind == "pt2" and getattr(encoder.pooling, "gives_attention", False)
    if kind == "pt2":
        program = exported(encoder, attention)
        torch.export.save(program, path)
        sizes = any_size(program)
        run, library = torch.export.load(path).module(), f"torch.export {torch.__version__}"
    else:
        sizes = export_onnx(encoder, path, attention=attention)
        if importlib.util.find_spec("onnxruntime") is None:
            return [f"  {FILES[kind]:<22} onnxruntime is not installed, not tried"]
        run, library = opened(path), named("onnxruntime")
    found = compare(encoder, run, library, attention, sizes)
    require([found])
    return [f"{found.line()}   {FILES[kind]}: any batch, {'any size' if sizes else 'x'.join(map(str, encoder.image_size)) + ' pixels'}"]


def opened(path: Path):
    """An ONNX file as a function of tensors, run by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()}))


@torch.no_grad()
def compare(encoder: Encoder, run, library: str, attention: bool, sizes: bool) -> Difference:
    """The largest differences over a batch of one and of three and, where `sizes` are free, over larger and oblong images."""
    features, looks = 0.0, 0.0
    patch = encoder.backbone.patch_size if sizes else (0, 0)
    for count, more in ((1, (0, 0)), (3, (0, 0)), *(((2, (2, 2)), (1, (1, 3))) if sizes else ())):
        images = torch.randn(count, len(encoder.mean), *(side + extra * step for side, extra, step in zip(encoder.image_size, more, patch)), generator=torch.Generator().manual_seed(count))
        wanted, got = encoder(images), run(images)
        features = max(features, far(wanted.pooled, got[0]), far(wanted.patches, got[1]))
        looks = max(looks, far(wanted.attention, got[2])) if attention else 0.0
    return Difference(library, features, looks if attention else None)


class quiet:
    """Exporters talk of their own affairs; what is wrong with a program its comparison tells."""

    def __enter__(self):
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)

    def __exit__(self, *error):
        logging.disable(logging.NOTSET)
        self.caught.__exit__(*error)
