"""Programs that run without this library: ONNX for onnxruntime and others, and torch.export's own."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from maskwise.export.check import Difference, far, named, probe, require
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


def export_onnx(encoder: Encoder, path: Path, *, attention: bool = False) -> Path:
    """Write an ONNX program of opset 18: images [B, 3, H, W] -> pooled, patches (, attention), any B and, where it can be, any H and W.

    H and W are free multiples of the patch where the encoder's arithmetic allows; else they are the encoder's image size.
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
        made = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=list(OUTPUTS[: 2 + attention]), verbose=False,
        )  # fmt: skip
        made.save(str(path), external_data=size > EMBEDDED)
    return path


def exported(encoder: Encoder, attention: bool = True) -> torch.export.ExportedProgram:
    """torch.export's program of an encoder; batch and, where it can be, size are free. Raises UserError for attention that there is none of."""
    if attention and not getattr(encoder.pooling, "gives_attention", False):
        raise UserError("this encoder's pooling gives no attention: export the program without")
    images = probe(encoder, 3)
    free = {0: torch.export.Dim("batch", min=1)}
    with quiet():
        return torch.export.export(Program(encoder, attention).eval(), (images,), dynamic_shapes=({**free},))


def write(encoder: Encoder, folder: Path, kind: str) -> list[str]:
    """Write one of FILES into a folder and run it; a line that tells how far it is from the encoder. Raises UserError where it is too far."""
    path = folder / FILES[kind]
    attention = kind == "onnx-attention" or kind == "pt2" and getattr(encoder.pooling, "gives_attention", False)
    if kind == "pt2":
        torch.export.save(exported(encoder, attention), path)
        run, library = torch.export.load(path).module(), f"torch.export {torch.__version__}"
    else:
        export_onnx(encoder, path, attention=attention)
        if importlib.util.find_spec("onnxruntime") is None:
            return [f"  {FILES[kind]:<22} onnxruntime is not installed, not tried"]
        run, library = opened(path), named("onnxruntime")
    found = compare(encoder, run, library, attention)
    require([found])
    return [f"{found.line()}   {FILES[kind]}"]


def opened(path: Path):
    """An ONNX file as a function of tensors, run by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()}))


@torch.no_grad()
def compare(encoder: Encoder, run, library: str, attention: bool) -> Difference:
    """The largest differences over a batch of one and a batch of three."""
    features, looks = 0.0, 0.0
    for count in (1, 3):
        images = probe(encoder, count)
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
