"""Reading an encoder from wherever it is: run folders, exported folders and files of every layout known here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from maskwise.export import dinov2, dinov3, folder as exports, legacy, pickles, specs, timm_files
from maskwise.export.source import ONLY, Source, trained
from maskwise.functional.errors import UserError
from maskwise.nn.weights import read_tensors
from maskwise.nn.encoder import Encoder
from maskwise.nn.maps import MapBackbone
from maskwise.nn.pooling import SimPool

MODEL, SPEC = "model.safetensors", "encoder.json"
LAYOUTS = (*legacy.LAYOUTS, "timm", "dinov2", "dinov3")
OVERRIDES = (
    "position", "image_size", "num_heads", "gamma", "min_scope", "pooling_heads", "mean", "std", "crop_pct", "name", "patch_size", "class_token", "alias",
)  # fmt: skip


def load(path, *, weights: str = "teacher", layout: str | None = None, **overrides) -> Encoder:
    """Read an encoder, in eval mode, from a run folder, an exported folder or a weights file.

    A file may be of DINO, iBOT, AttMask, SimPool, DINOv2 or DINOv3 (whole training file or backbone only), recognised by
    its keys; `layout` says so instead, and "timm" takes a plain timm file together with `name`. `weights` picks "teacher"
    or "student". `overrides`: position, image_size, mean, std, crop_pct; for files also num_heads (else width / 64),
    gamma (SimPool files do not hold it; None: no power), min_scope, pooling_heads and alias ("THEIRS=OURS", or several:
    what a key begins with there and here). Of a file that this project did not write, one line on standard error tells
    which keys were matched and which nobody reads. Only tensors are read, never code.
    Raises UserError when something is missing, unknown or does not fit.
    """
    if weights not in ("teacher", "student"):
        raise UserError(f"weights={weights!r} is unknown: choose teacher or student")
    source = read(path, layout=layout, **overrides)
    alone = source.layout == "export" and len(source.networks) == 1  # whichever it is, it is what the folder is for
    encoder = source.encoder(next(iter(source.networks)) if alone else weights)
    if source.layout not in ("run", "export"):
        tell(f"{path}, read as {source.layout}: {source.taken(weights).line()}")
    return overridden(encoder, overrides).eval()


def tell(text: str) -> None:
    """One line on standard error, from the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def read(path, *, layout: str | None = None, **overrides) -> Source:
    """Everything that a run folder, an exported folder or a weights file holds; arguments and errors as in `load`."""
    path = found(path)
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"layout={layout!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    unknown = sorted(set(overrides) - set(OVERRIDES))
    if unknown:
        raise UserError(f"load takes no {unknown[0]}; what can be overridden: {', '.join(OVERRIDES)}")
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder, an exported folder or a weights file")
    if path.is_dir():
        return read_folder(path)
    if layout == "timm":
        return timm_files.read(path, overrides)
    content = pickles.read(path)
    if layout is None and timm_files.spoken(content):
        return timm_files.read(path, overrides)
    for module in (dinov3, dinov2):
        if layout == module.LAYOUT or layout is None and module.recognised(content):
            return module.read(content, path, overrides)
    return legacy.read(content, path, layout, overrides)


def found(path) -> Path:
    """A path, or the folder in the Hub's cache of "hub:owner/name@revision" and of an "owner/name" that is no path here."""
    if isinstance(path, str) and (path.startswith("hub:") or path.count("/") == 1):
        from maskwise.export import hub

        name = hub.named(path)
        if name is not None:
            return hub.fetch(*name)
    return Path(path)


def read_folder(folder: Path) -> Source:
    """What one of our folders holds: an export, a run (its last checkpoint) or one checkpoint; or a folder that timm wrote."""
    if exports.described(folder) is not None:
        return exported(folder)
    checkpoint = folder
    if (folder / "checkpoints").is_dir():
        last = folder / "checkpoints" / "last"
        if not last.is_file():
            raise UserError(f"{folder} holds no checkpoint yet: let the run reach its first one (train.save_every)")
        checkpoint = last.parent / last.read_text().strip()
    elif timm_files.recognised(folder):
        return timm_files.read_folder(folder)
    if not (checkpoint / SPEC).is_file():
        raise UserError(f"{folder} is neither a run folder nor an exported one: it has no config.json of ours and no checkpoints")
    try:
        spec = json.loads((checkpoint / SPEC).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {checkpoint / SPEC}: {error}; take an earlier checkpoint") from None
    source = trained(Source(str(folder), "run", specs.check(spec, checkpoint / SPEC), {}, file=checkpoint / MODEL), read_tensors(checkpoint / MODEL))
    if not source.networks:
        raise UserError(f"{checkpoint} holds neither a teacher nor a student: is it a checkpoint of this project?")
    return source


def exported(folder: Path) -> Source:
    """What an exported folder holds: its encoder, and the other network, heads and centers where they stand beside it."""
    role, (spec, state, more) = exports.described(folder)["weights"], exports.read(folder)
    source = Source(str(folder), "export", spec, {}, file=exports.weights_file(folder))
    if not more:
        source.networks = {ONLY: state}
        return source
    return trained(source, {**{f"{role}.encoder.{key}": value for key, value in state.items()}, **more})


def overridden(encoder: Encoder, overrides: dict) -> Encoder:
    """Set what may differ from the file without a change of weights."""
    if "image_size" in overrides:
        size = overrides["image_size"]
        encoder.image_size = (size, size) if isinstance(size, int) else tuple(size)
        encoder.backbone.check_size(encoder.image_size)
    if "position" in overrides and isinstance(encoder.backbone, MapBackbone):
        raise UserError(f"{encoder.backbone.name} has no position table: leave position out")
    if "position" in overrides:
        if overrides["position"] not in ("offset", "size", "offset_always"):
            raise UserError(f"position={overrides['position']!r} is unknown: choose offset, size or offset_always")
        encoder.backbone.position = overrides["position"]
    for key in ("gamma", "min_scope"):
        if key in overrides and not isinstance(encoder.pooling, SimPool):
            raise UserError(f"{key} belongs to the pooling simpool and this encoder has another: leave it out")
        if key == "gamma" and key in overrides and encoder.pooling.learn_gamma:
            raise UserError("gamma is one of this encoder's weights (pooling.learn_gamma): leave it out")
        if key in overrides:
            setattr(encoder.pooling, key, overrides[key])
    for key in ("mean", "std"):
        if key in overrides:
            setattr(encoder, key, tuple(overrides[key]))
    encoder.crop_pct = overrides.get("crop_pct", encoder.crop_pct)
    return encoder
