"""Conversion between layouts: files of other projects to exported folders, and models to files that others read."""

from __future__ import annotations

from pathlib import Path

import torch

from maskwise.engine.atomic_file import WRITE_ERRORS, atomic_path, write_error
from maskwise.errors import UserError
from maskwise.export import load
from maskwise.export import write as exported
from maskwise.export.folder.provenance import Provenance
from maskwise.export.folder.timm_layout import timm_layout
from maskwise.export.folder.verify import Difference, max_difference, random_images, require
from maskwise.export.formats import dino_family, dino_family_writer, dinov2, dinov3, timm
from maskwise.export.formats.imported_model import SINGLE_NETWORK, ImportedModel, checkpoint_tensors
from maskwise.export.formats.published_heads import heads_of
from maskwise.nn.backbones.factory import Backbone
from maskwise.nn.backbones.families.base import TransformerFamily
from maskwise.nn.backbones.families.conv_stem import StemOptions
from maskwise.nn.backbones.timm_registry import family_of

UNSTORED = ("position", "image_size", "mean", "std", "crop_pct")
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")


def convert(
    path, to, *, layout: str | None = None, source_layout: str | None = None, weights: str | None = None, **overrides
) -> list[str]:
    """Read `path` as `load` does and write `to`, an exported folder or a file in `layout`; return lines to print.

    `source_layout` and `overrides` as in `load`. A folder holds teacher, student, heads and centers, and the
    classifier of a MAP file; `weights` ("teacher" or "student") takes that network alone. Every key is reported.
    Raises UserError if keys do not fit, the layout cannot hold the network, or writing fails.
    """
    to = Path(to)
    check_target(path, to, layout, weights)
    model = load.read(path, layout=source_layout, **overrides)
    for role in model.networks:
        model.encoder(role)  # raises UserError for an incomplete network
    keys = model.all_keys() if weights is None else model.loaded_keys(weights, classifier=True)
    lines = [f"read     {path} as {model.layout}", *keys.lines(), *(f"note     {text}" for text in model.notes)]
    if to.suffix not in SUFFIXES:
        write_folder(model, to, weights, overrides)
        return [*lines, f"wrote    {to}"]
    refuse_unstored(model, layout, overrides)
    content, left_out = file_content(model, layout, weights)
    left_out |= {f"classifier ({layout} has none)": list(saved.state) for saved in model.classifiers.values()}
    settings = unstored_settings(model, layout, content)
    notes = unstored_notes(model, layout, weights, settings)
    write_file(model, content, to, layout, weights, settings)
    for group, names in left_out.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"left out {group}: {', '.join(names[:4])}{more}")
    return [*lines, *(f"note     {text}" for text in notes), f"wrote    {to} as {layout}"]


def check_target(path, to: Path, layout: str | None, weights: str | None) -> None:
    """Raise UserError for a target, a layout and a choice of weights that do not go together."""
    is_file = to.suffix in SUFFIXES
    if is_file and layout not in load.FILE_LAYOUTS:
        problem = f"--layout {layout} is unknown" if layout else "a file needs --layout"
        raise UserError(
            f"{to}: {problem}: choose one of {', '.join(load.FILE_LAYOUTS)} (or name a folder, which needs none)"
        )
    if not is_file and layout is not None:
        raise UserError(
            f"{to} is a folder, which has one layout: leave --layout out "
            f"(--from {layout} gives the layout of {path}), or name a file such as {to}.pth"
        )
    if weights not in (None, "teacher", "student"):
        raise UserError(f"weights={weights!r} is unknown: choose teacher or student")
    if is_file and not to.parent.is_dir():
        raise UserError(f"the folder {to.parent} does not exist: create it, or write elsewhere")


def refuse_unstored(model: ImportedModel, layout: str, overrides: dict) -> None:
    """Raise UserError for settings that a file in this layout cannot hold."""
    kept = ("position", "image_size") if model.layout == "timm" else ()  # by resampling the position table
    surplus = [key for key in UNSTORED if key in overrides and key not in kept]
    if surplus:
        raise UserError(
            f"a file in layout {layout} does not store {surplus[0]}: leave it out and give it when loading the file, "
            "or write a folder (--to DIR)"
        )


def file_content(model: ImportedModel, layout: str, weights: str | None) -> tuple[dict, dict[str, list[str]]]:
    """Return the content of a file in that layout, and the keys that are left out, by group."""
    if layout in dino_family.DINO_LAYOUTS:
        return dino_family_writer.write(model, layout, weights)
    return {"timm": timm, "dinov2": dinov2, "dinov3": dinov3}[layout].write(model, weights)


def write_folder(model: ImportedModel, folder: Path, weights: str | None, overrides: dict) -> None:
    """Write an exported folder with the other network, heads and centers unless `weights` names one network."""
    role, only = model.role(weights or next(iter(model.networks))), f"{SINGLE_NETWORK}."
    encoder = load.apply_overrides(model.encoder(role), overrides).eval()
    training = {}
    if weights is None:
        own = f"{role}.encoder."
        training = {
            f"teacher.{key.removeprefix(only)}" if key.startswith(only) else key: value
            for key, value in checkpoint_tensors(model).items()
            if not key.startswith(own)
        }
    provenance = Provenance(name=folder.resolve().name, weights="teacher" if role == SINGLE_NETWORK else role)
    exported.write(encoder, folder, provenance=provenance, training=training, classifier=model.classifiers.get(role))


def write_file(model: ImportedModel, content: dict, to: Path, layout: str, weights: str | None, settings: dict) -> None:
    """Write a file, atomically, after reading it back and comparing the patch features of each network.

    Raises UserError if it cannot be written, or does not hold the network. timm's files do not describe the network;
    their tensors are timm's own.
    """
    dino_family_writer.check_flat(content, to)
    try:
        with atomic_path(to) as temporary:
            dino_family_writer.save(content, temporary)
            if layout != "timm":
                try:
                    check_written(model, load.read(temporary, layout=layout, **settings), weights, settings)
                except UserError as error:
                    problem = str(error).replace(str(temporary), "the file")
                    raise UserError(f"{model.origin} cannot be written as {layout}: {problem}") from None
    except (*WRITE_ERRORS, RuntimeError) as error:
        raise UserError(write_error(to, error)) from None


def check_written(model: ImportedModel, back: ImportedModel, weights: str | None, settings: dict) -> None:
    """Raise UserError unless the networks of both models compute equal patch features."""
    for role in model.networks if weights is None and len(back.networks) > 1 else (weights or "teacher",):
        encoder = model.encoder(role).eval()
        if back.spec["pooling"] is None:
            back.spec["pooling"] = {"name": "gap", "dim": encoder.dim}
        again = load.apply_overrides(back.encoder(role), settings).eval()
        images = random_images(encoder)
        with torch.no_grad():
            difference = max_difference(encoder(images).patches, again(images).patches)
        try:
            require(encoder, [Difference("the file", difference)])
        except UserError:
            raise UserError(f"read back, its features differ by {difference:.1e}: write a folder (--to DIR)") from None


def unstored_notes(model: ImportedModel, layout: str, weights: str | None, settings: dict) -> list[str]:
    """Return notes on what a file does not store: settings, a pooling, the arguments of a timm model."""
    notes, pooling = [], model.spec["pooling"]["name"]
    if layout == "timm":
        encoder = model.encoder(weights or "teacher")
        encoder.image_size = encoder.backbone.image_size
        timm_model = timm_layout(encoder)
        words = "".join(f", {key}={value!r}" for key, value in timm_model.arguments.items())
        stem = StemOptions.of_network(encoder.backbone.timm_args)
        if stem is not None:
            words += f", embed_layer={stem.expression(encoder.dim, len(encoder.mean))}"
        notes.append(f"open it with timm.create_model({timm_model.architecture!r}, num_classes=0{words})")
    elif pooling not in ("cls", "simpool"):
        notes.append(f"the file does not store the pooling {pooling}: it holds the backbone and the final norm")
    if settings:
        words = " ".join(f"{key}={value}" for key, value in settings.items())
        notes.append(f"the file does not store all settings: load it with {words.replace(', ', ',')}")
    return notes


def unstored_heads(model: ImportedModel, layout: str) -> int | None:
    """Return the number of heads of a transformer where a file in this layout does not tell it."""
    with torch.device("meta"):
        network = Backbone(**model.spec["backbone"])
    table = next(iter(model.networks.values())).get("backbone.pos_embed") if network.has_class_token else None
    rule = (table, "") if layout in dino_family.DINO_LAYOUTS else (None, layout)
    return None if heads_of(network.dim, network.depth, *rule) == network.num_heads else network.num_heads


def unstored_settings(model: ImportedModel, layout: str, content: dict) -> dict:
    """Return the settings of the network, as overrides of `load`, that a file in this layout does not store."""
    spec, settings = model.spec, {}
    backbone, pooling = spec["backbone"], spec["pooling"] or {}
    is_transformer = isinstance(family_of(backbone["name"]), TransformerFamily)
    if is_transformer and layout != "timm":
        heads = unstored_heads(model, layout)
        settings |= {} if heads is None else {"num_heads": heads}
    if pooling.get("name") == "simpool" and layout == "simpool":
        if "args" not in content:
            settings["gamma"] = pooling["gamma"]
        if pooling["min_scope"] != "batch":
            settings["min_scope"] = pooling["min_scope"]
        if pooling["num_heads"] != 1:
            settings["pooling_heads"] = pooling["num_heads"]
    defaults = {
        "simpool": "offset_always" if spec["norm"] == "after" else "offset",
        "dinov2": "size" if "register_tokens" in content else "offset",
    }
    position = backbone.get("position")
    if is_transformer and layout not in ("timm", "dinov3") and position != defaults.get(layout, "offset"):
        settings["position"] = position
    stored = {**dino_family.encoder_spec(backbone, None, ""), "image_size": backbone["image_size"]}
    for key in ("image_size", "mean", "std", "crop_pct"):
        if spec[key] != stored[key]:
            settings[key] = spec[key]
    return settings
