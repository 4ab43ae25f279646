"""The exported folder: what is written into it, whole or not at all, and an encoder read back from it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from maskwise.export import card, check, specs, trained_classifier
from maskwise.export.about import About
from maskwise.export.trained_classifier import TrainedClassifier
from maskwise.export.timm_layout import renaming, tag_of, timm_config, timm_layout
from maskwise.export.transformers_layout import INDEX, WEIGHTS, dinov2, index, preprocessor
from maskwise.functional.errors import UserError
from maskwise.nn.backbone import read_tensors
from maskwise.nn.encoder import Encoder, encoder_from_spec

CONFIG, BACKBONE, MODEL, OWN, TRAINING = "config.json", "backbone.safetensors", "model.safetensors", "maskwise.safetensors", "training.safetensors"
FORMAT = "maskwise-encoder-2"
PROGRAMS = ("onnx", "onnx-attention", "pt2")


def write(
    encoder: Encoder,
    folder,
    *,
    about: About | None = None,
    training: dict[str, Tensor] | None = None,
    classifier: TrainedClassifier | None = None,
    onnx: tuple[str, ...] = (),
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write a folder that opens in timm, transformers and `maskwise.load`, whole or not at all; an earlier export there is replaced.

    A vision transformer with a class token becomes a Dinov2Model and a timm model side by side, everything else a timm
    model; what neither knows (pooling, mask token) stands in maskwise.safetensors, `training` (heads and centers, under a
    checkpoint's names) in training.safetensors, a `classifier` in classifier.safetensors and config.json. Weights are float32. `onnx`: further programs, see `export.onnx`. It is
    opened again in every library present, and `say` gets the largest differences. Raises UserError for a folder that
    holds something else or cannot be written, an encoder that timm cannot hold, or a difference above 1e-5.
    """
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    about = about or About(weights="teacher")
    with replacing(folder) as aside:
        fill(encoder, aside, about, training, classifier)
        programs = [line for kind in onnx for line in write_program(encoder, aside, kind)]
        found, absent = check.compare(encoder, aside, lambda place: load_exported(place))
        lines = [each.line() for each in found] + programs
        card.write(encoder, aside, about, found, absent)
    for line in ["opened again, largest differences:", *lines, *(f"  {name:<22} not installed, not tried" for name in absent)]:
        if say is not None:
            say(line)
    return Path(folder)


def fill(encoder: Encoder, aside: Path, about: About, training: dict[str, Tensor] | None, classifier: TrainedClassifier | None = None) -> None:
    """Weights and configurations for all three libraries."""
    from safetensors.torch import save_file

    layout = timm_layout(encoder)
    model = dinov2(encoder, layout)
    weights = MODEL if model is None else BACKBONE
    own = {key: value for key, value in encoder.state_dict().items() if key not in layout.names} | layout.changed
    for name, tensors in ((weights, layout.tensors), (OWN, own), (TRAINING, training), (trained_classifier.FILE, classifier and classifier.state)):
        if tensors:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, aside / name, metadata={"format": "pt"})
    config = timm_config(layout, encoder, tag=tag_of(about.method.replace(" with ", "_") or "maskwise"), licence=about.licence, filename=weights)
    if model is not None:
        fields, tensors = model
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / INDEX).write_text(index(tensors))
        config = {**fields, **config}
    config["maskwise"] = {"format": FORMAT, "encoder": encoder.spec(), "weights": about.weights}
    if classifier is not None:
        config["maskwise"]["classifier"] = classifier.spec()
    for name, content in ((CONFIG, config), ("preprocessor_config.json", preprocessor(encoder))):
        (aside / name).write_text(json.dumps(content, indent=2) + "\n")


def write_program(encoder: Encoder, aside: Path, kind: str) -> list[str]:
    """One of the programs that run without this library; lines that tell how far it is from the encoder."""
    from maskwise.export import onnx

    return onnx.write(encoder, aside, kind)


@contextlib.contextmanager
def replacing(folder) -> Iterator[Path]:
    """A folder aside, put in the place of `folder` when the block ends well and removed when it does not.

    Raises UserError where `folder` holds something other than an export or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or described(folder) is not None)):
        raise UserError(f"{folder} holds something other than an export: give a new folder")
    aside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield aside
        for file in sorted(aside.rglob("*")):
            file.chmod(0o755 if file.is_dir() else 0o644)
            _flush(file)
        aside.chmod(0o755)
        if folder.exists():
            old = aside.with_name(aside.name + ".old")
            folder.rename(old)
            aside.rename(folder)
            shutil.rmtree(old)
        else:
            aside.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; give a folder that can be written") from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)  # nothing is there after a success


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def described(folder: Path) -> dict | None:
    """What config.json says to maskwise in an exported folder, or None where there is none of ours."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text())
    except (OSError, ValueError):
        return None
    ours = config.get("maskwise") if isinstance(config, dict) else None
    sound = isinstance(ours, dict) and ours.get("format") == FORMAT and isinstance(ours.get("encoder"), dict) and ours.get("weights") in ("teacher", "student")
    return ours if sound else None


def read(folder: Path) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """An exported folder's encoder spec, the encoder's tensors, and the tensors of heads and centers ({} without).

    Raises UserError for a file that is missing or lacks a tensor.
    """
    folder, spec = Path(folder), specs.check(described(folder)["encoder"], Path(folder) / CONFIG)
    weights = read_tensors(weights_file(folder))
    own = read_tensors(folder / OWN) if (folder / OWN).is_file() else {}
    with torch.device("meta"):
        probe = encoder_from_spec({**spec, "backbone": {**spec["backbone"], "mask_token": "backbone.mask_token" in own}})
    names = renaming(probe.state_dict(), weights)
    state = {key: weights[name] for key, name in names.items() if name in weights} | own
    unread = sorted(weights.keys() - set(names.values()))
    if unread:
        raise UserError(f"{folder} does not fit its own config.json: its weights have unknown {unread[0]}; export it anew")
    return spec, state, read_tensors(folder / TRAINING) if (folder / TRAINING).is_file() else {}


def weights_file(folder: Path) -> Path:
    """The file of an exported folder that holds the backbone in timm's names."""
    return folder / (BACKBONE if (folder / BACKBONE).is_file() else MODEL)


def load_exported(folder: Path) -> Encoder:
    """The encoder of an exported folder, in eval mode."""
    from maskwise.export import layouts

    return layouts.load(folder, weights=described(folder)["weights"])
