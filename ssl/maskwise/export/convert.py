"""One layout into another: files of others into a folder of ours, and networks of ours into files that others read."""

from __future__ import annotations

from pathlib import Path

from maskwise.export import dinov2, dinov3, folder as exports, layouts, legacy, timm_files
from maskwise.export.about import About
from maskwise.export.source import ONLY, Source, tensors_of
from maskwise.functional.errors import UserError
from maskwise.nn import eva, vit
from maskwise.nn.timm_models import anatomy_of

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")


def convert(path, to, *, layout: str | None = None, source_layout: str | None = None, weights: str | None = None, **overrides) -> list[str]:
    """Read `path` (anything that `load` reads) and write `to`: a folder of ours, or a file in `layout`; returns what to print.

    `source_layout` and `overrides` as in `load`. A folder keeps student, teacher, heads and centers beside the exported
    teacher, and its classifier, where the file is one of MAP; `weights` ("teacher" or "student") takes that network alone. Every key is accounted for.
    Raises UserError when keys do not fit, a layout has no place for the network, or nothing can be written.
    """
    to = Path(to)
    as_file = to.suffix in SUFFIXES
    if as_file and layout not in layouts.LAYOUTS:
        said = f"--layout {layout} is unknown" if layout else "a file needs --layout"
        raise UserError(f"{to}: {said}: choose one of {', '.join(layouts.LAYOUTS)} (or name a folder, which is of our own layout)")
    if not as_file and layout is not None:
        raise UserError(f"{to} is a folder, whose layout is ours: leave --layout out (--from {layout} tells the layout of {path}), or name a file such as {to}.pth")
    if weights not in (None, "teacher", "student"):
        raise UserError(f"weights={weights!r} is unknown: choose teacher or student")
    if as_file and not to.parent.is_dir():
        raise UserError(f"the folder {to.parent} does not exist: make it, or write elsewhere")
    source = layouts.read(path, layout=source_layout, **overrides)
    for role in source.networks:
        source.encoder(role)  # every copy is complete, or this says what is not
    lines = [f"read     {path} as {source.layout}", *(source.everything() if weights is None else source.taken(weights, classifier=True)).lines()]
    lines += [f"note     {text}" for text in source.notes]
    if not as_file:
        write_folder(source, to, weights, overrides)
        return [*lines, f"wrote    {to}"]
    content, left = written(source, layout, weights)
    left |= {f"classifier ({layout} has none)": list(held.state) for held in source.classifiers.values()}
    legacy.save(content, to)
    lines += [f"left out {name}: {', '.join(keys[:4])}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else "") for name, keys in left.items()]
    return [*lines, *(f"note     {text}" for text in untold(source, layout, content)), f"wrote    {to} as {layout}"]


def written(source: Source, layout: str, weights: str | None) -> tuple[dict, dict[str, list[str]]]:
    """The content of a file in that layout, and what is left out."""
    if layout in legacy.LAYOUTS:
        return legacy.write(source, layout, weights)
    return {"timm": timm_files, "dinov2": dinov2, "dinov3": dinov3}[layout].write(source, weights)


def write_folder(source: Source, folder: Path, weights: str | None, overrides: dict) -> None:
    """An exported folder, and in it whatever else of student, teacher, heads and centers there is."""
    role = source.role(weights or next(iter(source.networks)))
    encoder = layouts.overridden(source.encoder(role), overrides).eval()
    more = {} if weights is not None else {key: value for key, value in tensors_of(source).items() if not key.startswith(f"{role}.encoder.")}
    named = {key.replace(f"{ONLY}.", "teacher.", 1) if key.startswith(f"{ONLY}.") else key: value for key, value in more.items()}
    about = About(name=folder.resolve().name, weights="teacher" if role == ONLY else role)
    exports.write(encoder, folder, about=about, training=named, classifier=source.classifiers.get(role))


def untold(source: Source, layout: str, content: dict) -> list[str]:
    """What the network is and the file cannot say: whoever reads it must be told."""
    spec, notes = source.spec, []
    backbone = spec["backbone"]
    dim, pooling = legacy.width_of(source), spec["pooling"] or {}
    heads = source.num_heads if anatomy_of(backbone["name"]) in (vit, eva) else max(1, dim // 64)
    if layout != "timm" and heads != max(1, dim // 64):
        notes.append(f"no file of this layout says that there are {heads} heads (one per 64 channels is taken for granted): load it with num_heads={heads}")
    if pooling.get("name") == "simpool" and "args" not in content:
        notes.append(f"no tensor says that SimPool's gamma is {pooling['gamma']}: load it with gamma={pooling['gamma']}")
    if pooling.get("name") == "simpool" and pooling["min_scope"] != "batch":
        notes.append("SimPool's minimum was taken per image here and is per batch in the reference: load it with min_scope=image")
    usual = {"simpool": "offset_always" if spec["norm"] == "after" else "offset", "dinov2": "size" if "register_tokens" in content else "offset"}
    if layout not in ("timm", "dinov3") and "position" in backbone and backbone["position"] != usual.get(layout, "offset"):
        notes.append(f"the position table was resampled by `{backbone['position']}` here: load it with position={backbone['position']}")
    if [*spec["mean"], *spec["std"]] != [*legacy.COLOURS["mean"], *legacy.COLOURS["std"]]:
        notes.append(f"inputs were normalised with mean {spec['mean']} and std {spec['std']}: load it with the same")
    return notes
