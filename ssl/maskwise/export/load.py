"""Loading of encoders: run folders, folders of maskwise, timm and transformers, the Hub, timm names, weights files."""

from __future__ import annotations

from pathlib import Path

from maskwise.errors import UserError
from maskwise.export import folders, model_location, run_checkpoint
from maskwise.export.formats import dino_family, dinov2, dinov3, timm
from maskwise.export.formats.imported_model import ImportedModel
from maskwise.export.formats.research_file import ResearchFile
from maskwise.functional.resample import POSITION_MODES
from maskwise.nn.backbones.transformer import TransformerBackbone
from maskwise.nn.backbones.weights_file import read_tensors
from maskwise.nn.encoder import Encoder
from maskwise.nn.pooling import SimPool
from maskwise.process.streams import print_notice

FILE_LAYOUTS = (*dino_family.DINO_LAYOUTS, "timm", "dinov2", "dinov3")
READING = ("num_heads", "pooling_heads", "name", "patch_size", "class_token", "alias")  # taken by readers of some files
OVERRIDES = ("position", "image_size", "gamma", "min_scope", "mean", "std", "crop_pct", *READING)
STORED = ("run", "export")  # layouts whose loading needs no report


def load(path, *, weights: str = "teacher", layout: str | None = None, **overrides) -> Encoder:
    """Load an encoder, in eval mode, from a run, an exported folder, a weights file, the Hub or timm.

    Files and folders of other projects are recognized by their keys and config.json; `layout` overrides this, "timm"
    reads a timm file together with `name`. `timm:NAME` is read from the local cache. `weights`: "teacher" or "student".
    `overrides`: position, image_size, mean, std, crop_pct; for files also num_heads (needed unless the size is a
    published one), gamma (not stored in SimPool files; None for no power), min_scope, pooling_heads and alias
    ("THEIRS=OURS" or a list: key prefixes to rename); for timm files name, patch_size and class_token. For what is not
    maskwise's own, one line on standard error reports matched, missing and unused keys.
    Only tensors are read, never code. Raises UserError for anything missing, unknown, mismatched, or without effect.
    """
    if weights not in ("teacher", "student"):
        raise UserError(f"weights={weights!r} is unknown: choose teacher or student")
    model = read(path, layout=layout, **overrides)
    is_single = model.layout == "export" and len(model.networks) == 1  # an export of the student holds that alone
    encoder = model.encoder(next(iter(model.networks)) if is_single else weights)
    if model.layout not in STORED:
        print_notice(f"{path}, read as {model.layout}: {model.loaded_keys(weights).line()}")
    for note in model.notes:
        print_notice(f"{path}: {note}")
    return apply_overrides(encoder, overrides).eval()


def read(path, *, layout: str | None = None, defaults: dict | None = None, **overrides) -> ImportedModel:
    """Read all networks of a run folder, a folder or a weights file; arguments and errors as in `load`.

    `defaults` are settings for files that do not store them; other than overrides, they may have no effect.
    """
    if layout is not None and layout not in FILE_LAYOUTS:
        raise UserError(f"layout={layout!r} is unknown: choose one of {', '.join(FILE_LAYOUTS)}")
    unknown = sorted(set(overrides) - set(OVERRIDES))
    if unknown:
        raise UserError(f"load takes no {unknown[0]}; what can be overridden: {', '.join(OVERRIDES)}")
    model = _read(path, layout, {**(defaults or {}), **overrides})
    surplus = [key for key in READING if key in overrides and key not in model.takes]
    if surplus:
        raise UserError(
            f"{path} was read as {model.layout}, and {surplus[0]} has no effect on it: leave {surplus[0]} out"
        )
    return model


def _read(path, layout: str | None, settings: dict) -> ImportedModel:
    if isinstance(path, str) and path.startswith(model_location.TIMM):
        name = path.removeprefix(model_location.TIMM)
        return read_cached_timm(name, model_location.cached_timm_weights(name))
    path = resolve_path(path)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: give a run folder, an exported folder, a weights file, timm:NAME or hub:OWNER/NAME"
        )
    if path.is_dir():
        path = folders.training_file(path) or path
    if path.is_dir() or run_checkpoint.is_model_file(path):
        return folders.read(path)
    if layout is None and (folder := folders.described_by(path)) is not None:
        return folders.read(folder)
    content = read_tensors(path)
    if any(str(key).startswith(run_checkpoint.NETWORKS) for key in content):
        raise UserError(
            f"{path} is the model of a maskwise checkpoint without its {run_checkpoint.ENCODER}, which describes the "
            "network: give the run folder, or RUN/checkpoints/step_N"
        )
    file = ResearchFile.open(content, path, settings.get("alias", ()))
    if layout == "timm" or layout is None and timm.recognized(file):
        return timm.read(file, settings)
    for module in (dinov3, dinov2):
        if layout == module.LAYOUT or layout is None and module.recognized(file):
            return module.read(file, settings)
    return dino_family.read(file, layout, settings)


def read_cached_timm(name: str, file: Path) -> ImportedModel:
    """Read the pretrained weights of a timm model from a file in the local cache."""
    found = ResearchFile.open(read_tensors(file), file)
    model = timm.import_model(name, found.networks, f"{model_location.TIMM}{name}", {}, file)
    model.unused = {**found.unused, **model.unused}
    return model


def resolve_path(path) -> Path:
    """Return the path, or the cached folder or file of "hub:owner/name@revision" or of a non-local "owner/name"."""
    if str(path).startswith("~"):
        return Path(path).expanduser()
    if isinstance(path, str) and (path.startswith("hub:") or path.count("/") == 1):
        from maskwise.export import hub_repository  # huggingface_hub is slow to import

        name = hub_repository.parse_name(path)
        if name is not None:
            return hub_repository.fetch(*name)
    return Path(path)


def apply_overrides(encoder: Encoder, overrides: dict) -> Encoder:
    """Set the overrides that change no weights; raises UserError for one this encoder does not have."""
    if "image_size" in overrides:
        size = overrides["image_size"]
        encoder.image_size = (size, size) if isinstance(size, int) else tuple(size)
        encoder.backbone.check_size(encoder.image_size)
    if "position" in overrides:
        position = overrides["position"]
        if not isinstance(encoder.backbone, TransformerBackbone):
            raise UserError(f"{encoder.backbone.name} has no position table: leave position out")
        if position not in POSITION_MODES:
            raise UserError(
                f"position={position!r} is unknown: choose {', '.join(POSITION_MODES[:-1])} or {POSITION_MODES[-1]}"
            )
        encoder.backbone.position = position
    for key in ("gamma", "min_scope"):
        if key not in overrides:
            continue
        if not isinstance(encoder.pooling, SimPool):
            raise UserError(f"{key} belongs to the pooling simpool and this encoder has another: leave it out")
        if key == "gamma" and encoder.pooling.learn_gamma:
            raise UserError("gamma is one of this encoder's weights (pooling.learn_gamma): leave it out")
        setattr(encoder.pooling, key, overrides[key])
    for key in ("mean", "std"):
        if key in overrides:
            values = tuple(overrides[key])
            if len(values) != len(encoder.mean):
                raise UserError(f"{key}={list(values)}: the encoder takes {len(encoder.mean)} channels, give one each")
            setattr(encoder, key, values)
    encoder.crop_pct = overrides.get("crop_pct", encoder.crop_pct)
    return encoder
