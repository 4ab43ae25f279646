"""The DINO family's files, in and out: DINO, iBOT, AttMask and SimPool (attmask.md 6, pooling.md 6)."""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from maskwise.export import heads as head_keys, map_files, map_heads, map_networks
from maskwise.export.pickles import arguments
from maskwise.export.source import ONLY, Source, build
from maskwise.export.specs import told
from maskwise.functional.errors import UserError
from maskwise.nn import convnext, swin
from maskwise.nn.backbone import Backbone
from maskwise.nn.timm_models import anatomy_of
from maskwise.nn.weights import strip_prefixes

LAYOUTS = ("dino", "ibot", "attmask", "simpool")
NAMES = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224", 1024: "vit_large_patch16_224"}
POOLING_PARENTS = {"simpool.": "after", "gp.pool.": "before", "global_pool.pool.": "before", "head.global_pool.pool.": "before"}
SIMPOOL = ("norm_patches", "wq", "wk", "beta")
ROLES = {"teacher": "teacher", "state_dict_ema": "teacher", "model_ema": "teacher", "student": "student", "state_dict": "student", "model": "student"}
CENTERS = {"dino_loss": {"center": "center"}, "ibot_loss": {"center": "center", "center2": "patch_center"}}
COLOURS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def read(content: dict, path: Path, layout: str | None, overrides: dict) -> Source:
    """What a training file or a backbone-only file of the family holds; shapes are read off the tensors.

    Raises UserError for another network, a layout that contradicts the keys, or a shape that cannot be told.
    """
    states, unused = states_of(content, path)
    states = {role: aliased(state, overrides.get("alias", ()), path) for role, state in states.items()}
    maps = {role: taken for role, state in states.items() if (taken := map_heads.take(state))}
    kind = map_files.family(next(iter(states.values())))
    if maps and kind is None:
        kind = map_networks.family(next(iter(states.values())))
    if maps and kind not in ("resnet", "convnext", *map_networks.SHAPES):
        first = next(iter(next(iter(states.values()))), "nothing")
        known = ", ".join(("resnet", "convnext", *map_networks.SHAPES))
        raise UserError(f"{path} has a MAP head over a network that is not known here (its first key: {first}): heads are read over {known}")
    for role in states if kind else ():
        states[role], left = map_files.renamed(states[role], kind)
        states[role] = {map_networks.renamed(key, kind): value for key, value in states[role].items()}
        group(unused, "buffers and auxiliary norms", left, role)
    raw_heads = {role: take(state, lambda key: key.startswith(("head.mlp.", "head.last_layer"))) for role, state in states.items()}
    poolings, order = {}, "after"
    for role, state in states.items():
        poolings[role], order = take_simpool(state)
        classifier = take(state, lambda key: key.startswith(("head.", "fc.")))
        group(unused, "classifier", classifier, role)
    pooling = next(iter(poolings.values()))
    refuse_layout(layout, pooling, path)
    args = arguments(content, path)
    for role, state in states.items() if kind is None else ():
        refuse_networks(state, path)
        drop_unread_row(state, unused, role)
    filled = [key for role in maps for key in map_heads.fill_norm(states[role], kind)][:1]
    spec = (spec_of if kind is None else partial(map_spec_of, kind))(next(iter(states.values())), pooling, args, order, overrides, path)
    if pooling and not spec["pooling"]["beta"]:
        for role, each in poolings.items():
            group(unused, "beta without gamma", take(each, lambda key: key == "beta"), role)
    raw_heads = {role: {key.removeprefix("head."): value for key, value in head.items()} for role, head in raw_heads.items() if head}
    source = Source(
        str(path), layout or ("map" if maps else guessed(content, states, pooling)), spec,
        {role: {**encoder_keys(state), **{f"pooling.{key}": value for key, value in poolings[role].items()}} for role, state in states.items()},
        unused=unused, file=path, filled=filled,
    )  # fmt: skip
    if maps:
        add_maps(source, maps, path, overrides)
    return with_heads(source, raw_heads, args, content)


def add_maps(source: Source, maps: dict[str, dict[str, Tensor]], path: Path, overrides: dict) -> None:
    """Give a source the MAP classifiers that stood in its file; raises UserError as map_heads.read does."""
    for role, taken in maps.items():
        with told(path), torch.device("meta"):
            encoder = build(source.spec, source.networks[role])
        source.classifiers[role], index, source.notes = map_heads.read(taken, encoder, path, overrides)
        group(source.unused, "index buffers", index, role)


def with_heads(source: Source, raw: dict[str, dict[str, Tensor]], args: dict, content: dict) -> Source:
    """Add projection heads and centers where they can be held; else say why not."""
    if not raw:
        return source
    renamed = head_keys.incoming(raw)
    try:
        found = [head_keys.arguments(head, args) for head in renamed.values()]
        if any(each != found[0] for each in found):
            raise head_keys.Unfit("student and teacher have heads of different shapes")
        if found[0]["dim"] != width_of(source):
            raise head_keys.Unfit("its head is of another width than its encoder")
    except head_keys.Unfit as reason:
        source.headless = str(reason)
        for role, head in raw.items():
            group(source.unused, f"projection head ({reason})", {f"head.{key}": value for key, value in head.items()}, role)
        return source
    source.heads, source.head = renamed, found[0]
    for loss, names in CENTERS.items():
        for theirs, ours in names.items():
            value = content.get(loss, {}).get(theirs) if isinstance(content.get(loss), dict) else None
            if isinstance(value, Tensor):
                source.centers[ours] = value.flatten().clone()
    source.unused.get("the file's own", [])[:] = [key for key in source.unused.get("the file's own", []) if not (key in CENTERS and source.centers)]
    return source


def states_of(content: dict, path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[str]]]:
    """The copies of the network in a file, wrappers' prefixes taken off, and the other entries by name."""
    nested = [key for key, value in content.items() if isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values())]
    held = [key for key in ROLES if key in nested]
    if not held and (set(nested) - set(CENTERS)):
        raise UserError(f"{path} has no teacher, student or state_dict; it has {', '.join(map(str, content))}: is it an encoder's file?")
    chosen = {ROLES[key]: content[key] for key in reversed(held)} if held else {ONLY: content}
    if len(held) == 1 and held[0] not in ("teacher", "student"):
        chosen = {ONLY: content[held[0]]}
    rest = [str(key) for key in content if key not in held] if held else [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    unused: dict[str, list[str]] = {"the file's own": rest} if rest else {}
    states = {}
    for role in sorted(chosen, key=lambda role: role != "teacher"):
        state = strip_prefixes(chosen[role])
        group(unused, "no tensors", {key: value for key, value in state.items() if not isinstance(value, Tensor)} if held else {}, role)
        states[role] = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return states, unused


def aliased(state: dict[str, Tensor], alias, path: Path) -> dict[str, Tensor]:
    """Keys that begin with THEIRS begin with OURS afterwards, for each "THEIRS=OURS" the user gave; one that matches nothing is refused."""
    for pair in (alias,) if isinstance(alias, str) else alias:
        theirs, equals, ours = str(pair).partition("=")
        if not equals or not any(key.startswith(theirs) for key in state):
            raise UserError(f"{path}: alias {pair} matches no key; write THEIRS=OURS with the beginning of a key, such as {next(iter(state), 'norm_old.')}")
        state = {ours + key[len(theirs) :] if key.startswith(theirs) else key: value for key, value in state.items()}
    return state


def take(state: dict[str, Tensor], wanted) -> dict[str, Tensor]:
    """Move the entries whose key is wanted out of `state`."""
    return {key: state.pop(key) for key in list(state) if wanted(key)}


def take_simpool(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Move SimPool's tensors out of `state`, whatever module held them; also where the final norm stands."""
    taken, order = {}, "after"
    for key in list(state):
        for parent, place in POOLING_PARENTS.items():
            if key.startswith(parent):
                name, order = key[len(parent) :], place
                taken[name] = state.pop(key).reshape(1) if name == "beta" else state.pop(key)
                break
    return taken, order


def group(unused: dict[str, list[str]], name: str, entries, role: str) -> None:
    """Note keys that nothing reads."""
    if entries:
        unused.setdefault(name, []).extend(str(key) if role == ONLY else f"{role}.{key}" for key in entries)


def guessed(content: dict, states: dict, pooling: dict) -> str:
    """The layout that the keys speak of."""
    if pooling:
        return "simpool"
    ibot = "ibot_loss" in content or any("masked_embed" in state for state in states.values())
    return "ibot" if ibot else "dino"


def refuse_layout(layout: str | None, pooling: dict, path: Path) -> None:
    """Raise UserError where the named layout and the pooling's tensors contradict each other."""
    if layout == "simpool" and not pooling:
        raise UserError(f"{path} has no SimPool weights: it is no simpool file (leave layout out to have it recognised)")
    if layout in ("dino", "ibot", "attmask") and pooling:
        raise UserError(f"{path} has SimPool weights: load it with layout=simpool")


def refuse_networks(state: dict, path: Path) -> None:
    """Raise UserError unless the keys are of a vision transformer; other families are known by their marks."""
    for key in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if key not in state:
            has = ", ".join(list(state)[:3]) or "nothing"
            raise UserError(f"{path} lacks {key}: it is no vision transformer, ResNet, ConvNeXt or Swin of {', '.join(LAYOUTS)}; it has {has}")


def drop_unread_row(state: dict[str, Tensor], unused: dict[str, list[str]], role: str) -> None:
    """SimPool's first release kept the class token's row in the position table and never read it (pooling.md 1.6)."""
    table = state["pos_embed"]
    if "cls_token" not in state and math.isqrt(table.shape[1]) ** 2 != table.shape[1]:
        state["pos_embed"] = table[:, 1:].clone()
        group(unused, "unread position row", ["pos_embed[:, 0]"], role)


def spec_of(state: dict, pooling: dict, args: dict, order: str, overrides: dict, path: Path) -> dict:
    """The spec of an encoder of these shapes."""
    table, patch = state["pos_embed"], state["patch_embed.proj.weight"]
    dim, patch_size, has_class = patch.shape[0], list(patch.shape[2:]), "cls_token" in state
    side = math.isqrt(table.shape[1] - has_class)
    if side * side != table.shape[1] - has_class:
        raise UserError(f"{path}: its position table of {table.shape[1]} rows is of no square grid; this layout is not known")
    heads = overrides.get("num_heads", max(1, dim // 64))
    if dim % heads:
        raise UserError(f"num_heads={heads} does not divide the width {dim} of {path}: give num_heads=...")
    row: dict | None = {"name": "cls", "dim": dim} if has_class else None
    if pooling:
        row = simpool_of(dim, pooling, args, overrides, path)
    backbone = {
        "name": NAMES.get(dim, NAMES[192]),
        "image_size": [side * each for each in patch_size],
        "patch_size": patch_size,
        "class_token": has_class,
        "position": "offset_always" if pooling and order == "after" else "offset",
        "embed_dim": dim,
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "num_heads": heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        **({"init_values": 1.0} if "blocks.0.gamma_1" in state else {}),
    }
    return {"backbone": backbone, "pooling": row, "norm": order, "image_size": backbone["image_size"], "crop_pct": 0.875, **COLOURS}


def map_spec_of(kind: str, state: dict, pooling: dict, args: dict, order: str, overrides: dict, path: Path) -> dict:
    """The spec of an encoder of a ResNet, ConvNeXt or Swin; without SimPool's tensors its places are averaged, a Swin's after the norm."""
    backbone = map_files.backbone_of(state, kind, path, map_networks.SHAPES)
    with torch.device("meta"):
        dim = Backbone(**backbone).dim
    row = simpool_of(dim, pooling, args, overrides, path) if pooling else {"name": "gap", "dim": dim}
    norm = "before" if kind == "swin" and not pooling else "after"
    return {"backbone": backbone, "pooling": row, "norm": norm, "image_size": backbone["image_size"], "crop_pct": 0.875, **COLOURS}


def simpool_of(dim: int, pooling: dict, args: dict, overrides: dict, path: Path) -> dict:
    """The row of a SimPool with these tensors."""
    gamma = gamma_of(args, overrides, path)
    return {
        "name": "simpool", "dim": dim, "gamma": gamma, "num_heads": overrides.get("pooling_heads", 1),
        "min_scope": overrides.get("min_scope", "batch"), "beta": "beta" in pooling and gamma is not None,
    }  # fmt: skip


def width_of(source: Source) -> int:
    """The width of an encoder's vectors."""
    return next(iter(source.networks.values()))["norm.weight"].shape[0] if source.spec["pooling"] is None else source.spec["pooling"]["dim"]


def gamma_of(args: dict, overrides: dict, path: Path) -> float | None:
    """SimPool's exponent, which no tensor holds: from the caller, else from the run's own arguments."""
    if "gamma" in overrides:
        return overrides["gamma"]
    if "gamma" in args:
        return args["gamma"] if args["gamma"] is None else float(args["gamma"])
    raise UserError(f"{path} does not say which gamma its SimPool had: give gamma=1.25 (its transformers), gamma=2.0 (its convolutional networks), or gamma=None where its name says no_gamma")


def encoder_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the family -> names of an Encoder."""
    renamed = {}
    for key, value in state.items():
        key = "mask_token" if key == "masked_embed" else key
        for branch in ("1", "2"):
            key = key.replace(f".gamma_{branch}", f".ls{branch}.gamma")
        renamed[key if key.startswith("norm.") else f"backbone.{key}"] = value
    return renamed


def family_keys(state: dict[str, Tensor], parent: str, origin) -> dict[str, Tensor]:
    """Names of an Encoder -> names of the family; raises UserError for what these networks do not have."""
    renamed = {}
    for key, value in state.items():
        name = key.removeprefix("backbone.")
        if key.startswith("pooling."):
            name = parent + key.removeprefix("pooling.")
            if key.split(".")[1] not in SIMPOOL:
                raise UserError(f"{origin} has {key}, for which the DINO family's SimPool has no place: export it as a folder instead")
        elif name.startswith(("reg_token", "norm_pre.", "rope")) or ".attn.q_norm" in name or ".attn.k_norm" in name or "mlp.norm" in name:
            raise UserError(f"{origin} has {name}, for which the DINO family's networks have no place: export it as a folder instead")
        name = "masked_embed" if name == "mask_token" else name
        for branch in ("1", "2"):
            name = name.replace(f".ls{branch}.gamma", f".gamma_{branch}")
        renamed[name] = value
    return renamed


def write(source: Source, layout: str, weights: str | None = None) -> tuple[dict, dict[str, list[str]]]:
    """The content of a file in one of LAYOUTS, and what of the source is left out.

    With student and teacher at hand it is a training file without its optimizer; with one copy only, or with `weights`
    named, the flat backbone-only file (attmask.md 6.3). Raises UserError where the layout has no place for the network.
    """
    name = source.spec["backbone"]["name"]
    if anatomy_of(name) in (convnext, swin):
        raise UserError(f"{source.origin} is a {name}, which is not written in these layouts: name a folder (--to DIR), or --layout timm")
    simpool = source.spec["pooling"] is not None and source.spec["pooling"]["name"] == "simpool"
    if simpool != (layout == "simpool"):
        has = "SimPool weights: say --layout simpool" if simpool else "no SimPool weights: say --layout dino, ibot or attmask"
        raise UserError(f"{source.origin} has {has}")
    parent = "simpool." if source.spec["norm"] == "after" else "gp.pool."
    states = {role: family_keys(state, parent, source.origin) for role, state in source.networks.items()}
    left: dict[str, list[str]] = {}
    if layout in ("dino", "simpool"):
        for role, state in states.items():
            group(left, f"mask token ({layout} has none)", take(state, lambda key: key == "masked_embed"), role)
    double = layout in ("ibot", "attmask")
    if weights is not None or len(states) == 1:
        role = source.role(weights or next(iter(states)))
        heads = head_keys.outgoing(source.heads.get(role, {}), double) if weights is None else {}
        group(left, "not of one backbone", [f"{other} network" for other in states if other != role] + [f"{other} head" for other in source.heads if not heads], ONLY)
        return {key: value.clone() for key, value in {**states[role], **{f"head.{key}": value for key, value in heads.items()}}.items()}, left
    batch_norm = bool(source.head and source.head["norm"])
    content: dict = {"epoch": 0}
    for role, state in states.items():
        wrap = "module." if role == "student" or batch_norm else ""
        content[role] = {f"{wrap}backbone.{key}": value.clone() for key, value in state.items()}
        for key, value in head_keys.outgoing(source.heads.get(role, {}), double).items():
            content[role][f"{wrap}head.{key}"] = value.clone()
    if source.centers:
        shapes = {"center": (1, -1), "center2": (1, 1, -1)}
        loss = "ibot_loss" if double else "dino_loss"
        content[loss] = {theirs: source.centers[ours].reshape(shapes[theirs]).clone() for theirs, ours in CENTERS[loss].items() if ours in source.centers}
        group(left, "centers", [ours for ours in source.centers if ours not in CENTERS[loss].values()], ONLY)
    if simpool:
        content["args"] = argparse.Namespace(gamma=source.spec["pooling"]["gamma"])
    return content, left


def save(content: dict, path: Path) -> None:
    """Write a file as torch does or, for `.safetensors`, its flat tensors, aside first; raises UserError when it cannot be."""
    aside = path.with_name(f".{path.name}.writing")
    flat = all(isinstance(value, Tensor) for value in content.values())
    if path.suffix == ".safetensors" and not flat:
        raise UserError(f"{path}: a .safetensors file holds one flat network: add --weights teacher or student, or name the file .pth")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({key: value.contiguous() for key, value in content.items()}, aside, metadata={"format": "pt"})
        else:
            torch.save(content, aside)
        aside.replace(path)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}; give a path that can be written") from None
