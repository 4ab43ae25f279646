"""Reading of DINO-family files: DINO, iBOT, AttMask, SimPool, and released MAP classifiers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.export.formats import dino_convnets, map_release
from maskwise.export.formats import projection_heads as head_keys
from maskwise.export.formats.imported_model import ImportedModel, build
from maskwise.export.formats.published_heads import heads_of
from maskwise.export.formats.research_file import CENTERS, IMAGENET_STATS, OTHER_ENTRIES, ResearchFile, add_unused, take
from maskwise.export.formats.simpool_gamma import gamma_of, name_of
from maskwise.export.formats.spec_checks import user_errors
from maskwise.export.formats.training_arguments import arguments
from maskwise.nn.backbones.factory import Backbone

DINO_LAYOUTS = ("dino", "ibot", "attmask", "simpool")
NAMES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
}
CLASSIFIER = {f"{name}.{part}" for name in ("head", "fc", "head.fc") for part in ("weight", "bias")}
POOLING_PREFIXES = {  # key prefix of SimPool -> whether the final norm comes before or after it
    "simpool.": "after",
    "gp.pool.": "before",
    "global_pool.pool.": "before",
    "head.global_pool.pool.": "before",
}


def read(file: ResearchFile, layout: str | None, settings: dict) -> ImportedModel:
    """Read a training file or a backbone-only file; shapes are inferred from the tensors.

    Raises UserError for an unknown network, a layout that contradicts the keys, or a shape that cannot be inferred.
    """
    path, states, unused = file.path, file.networks, file.unused
    map_heads = {role: head for role, state in states.items() if (head := map_release.take_head(state))}
    kind = convnet_family(next(iter(states.values())), bool(map_heads), path)
    for role in states if kind else ():
        states[role], buffers = dino_convnets.renamed(states[role], kind)
        states[role] = {map_release.backbone_key(key, kind): value for key, value in states[role].items()}
        add_unused(unused, "buffers and auxiliary norms", buffers, role)
    heads = {role: take_projection_head(state) for role, state in states.items()}
    poolings, norm_order, is_mae = {}, "after", False
    for role, state in states.items():
        poolings[role], norm_order = take_simpool(state)
        decoder = take_decoder(state)
        is_mae |= bool(decoder)
        add_unused(unused, "decoder", decoder, role)
        top = take(state, lambda key: key.startswith(("head.", "fc.")))
        add_unused(unused, "classifier" if top.keys() <= CLASSIFIER else "head", top, role)
    pooling = next(iter(poolings.values()))
    check_layout(layout, pooling, path)
    for role, state in states.items() if kind is None else ():
        check_transformer(state, path)
        drop_unread_position(state, unused, role)
    filled = [key for role in map_heads for key in map_release.fill_norm(states[role], kind)][:1]
    args = arguments(file.content, path)
    first = next(iter(states.values()))
    if kind is None:
        spec = transformer_spec(first, pooling, args, norm_order, settings, path, file.project)
    else:
        refuse_solo_learn_stem(first, kind, file)
        spec = convnet_spec(kind, first, pooling, args, settings, path)
    if pooling and not spec["pooling"]["beta"]:
        for role, tensors in poolings.items():
            add_unused(unused, "beta without gamma", take(tensors, lambda key: key == "beta"), role)
    networks = {
        role: {**encoder_keys(state), **{f"pooling.{key}": value for key, value in poolings[role].items()}}
        for role, state in states.items()
    }
    guessed = file.project or ("mae" if is_mae else guess_layout(file.content, states, pooling))
    layout = layout or ("map" if map_heads else guessed)
    model = ImportedModel(str(path), layout, spec, networks, unused=unused, file=path, filled=filled)
    model.takes = {"alias"} | ({"num_heads"} if kind is None else set()) | ({"pooling_heads"} if pooling else set())
    if pooling and "gamma" not in {*settings, *args} and name_of(path):
        model.notes.append(f"gamma={spec['pooling']['gamma']}, that of the released model of this name")
    add_channel_stats(model, settings)
    add_map_classifiers(model, map_heads, path, settings)
    add_projection_heads(model, {role: head for role, head in heads.items() if head}, args, file.content)
    return model


def take_decoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move MAE's decoder out of `state`, its mask token included."""
    decoder = take(state, lambda key: key.startswith("decoder_"))
    return {**decoder, **take(state, lambda key: key == "mask_token")} if decoder else {}


def refuse_solo_learn_stem(state: dict[str, Tensor], kind: str, file: ResearchFile) -> None:
    """Raise UserError for solo-learn's ResNet for CIFAR, whose first convolution is padded by 2."""
    if file.project == "solo_learn" and kind == "resnet" and state["conv1.weight"].shape[-1] == 3:
        raise UserError(
            f"{file.path} is solo-learn's ResNet for CIFAR, whose first convolution of 3 x 3 is padded by 2, where "
            "ResNets here pad by 1, so that its features cannot be computed: give a network with the stem for ImageNet"
        )


def convnet_family(state: dict[str, Tensor], has_map_head: bool, path: Path) -> str | None:
    """Return the convolutional family of a network, None for a transformer; raises UserError under a MAP head."""
    kind = dino_convnets.family(state)
    if not has_map_head:
        return kind
    kind = kind or map_release.family(state)
    supported = ("resnet", "convnext", *map_release.FAMILIES)
    if kind not in supported:
        raise UserError(
            f"{path} has a MAP head over an unsupported network (its first key: {next(iter(state), 'nothing')}): "
            f"MAP heads are read over {', '.join(supported)}"
        )
    return kind


def add_map_classifiers(model: ImportedModel, heads: dict[str, dict[str, Tensor]], path: Path, settings: dict) -> None:
    """Add the MAP classifiers of a file, by role; raises UserError as `map_release.read` does."""
    for role, head in heads.items():
        with user_errors(path), torch.device("meta"):
            encoder = build(model.spec, model.networks[role])
        model.classifiers[role], index, notes = map_release.read(head, encoder, path, settings)
        model.notes = [*model.notes, *notes]
        model.takes = model.takes | {"pooling_heads"}
        add_unused(model.unused, "index buffers", index, role)


def add_projection_heads(model: ImportedModel, raw: dict[str, dict[str, Tensor]], args: dict, content: dict) -> None:
    """Add projection heads and centers if a ProjectionHead can hold them, else the reason why not."""
    if not raw:
        return
    heads = head_keys.incoming(raw)
    try:
        options = [head_keys.arguments(head, args) for head in heads.values()]
        if any(other != options[0] for other in options):
            raise head_keys.IncompatibleHead("student and teacher have heads of different shapes")
        if options[0]["dim"] != width_of(model):
            raise head_keys.IncompatibleHead("its head has another width than its encoder")
    except head_keys.IncompatibleHead as reason:
        model.headless = str(reason)
        for role, head in raw.items():
            add_unused(model.unused, f"projection head ({reason})", [f"head.{key}" for key in head], role)
        return
    model.heads, model.head = heads, options[0]
    for loss, names in CENTERS.items():
        entries = content.get(loss) if isinstance(content.get(loss), dict) else {}
        for theirs, ours in names.items():
            if isinstance(entries.get(theirs), Tensor):
                model.centers[ours] = entries[theirs].flatten().clone()
    if model.centers and OTHER_ENTRIES in model.unused:
        model.unused[OTHER_ENTRIES] = [key for key in model.unused[OTHER_ENTRIES] if key not in CENTERS]


def take_projection_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the projection head's tensors out of `state`, without the `head.` prefix."""
    head = take(state, lambda key: key.startswith(("head.mlp.", "head.last_layer")))
    return {key.removeprefix("head."): value for key, value in head.items()}


def take_simpool(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Move SimPool's tensors out of `state`; also return the order of pooling and final norm."""
    pooling, order = {}, "after"
    for key in list(state):
        prefix = next((prefix for prefix in POOLING_PREFIXES if key.startswith(prefix)), None)
        if prefix is not None:
            name, order = key[len(prefix) :], POOLING_PREFIXES[prefix]
            pooling[name] = state.pop(key).reshape(1) if name == "beta" else state.pop(key)
    return pooling, order


def guess_layout(content: dict, states: dict, pooling: dict) -> str:
    """Infer the layout from the keys."""
    if pooling:
        return "simpool"
    ibot = "ibot_loss" in content or any("masked_embed" in state for state in states.values())
    return "ibot" if ibot else "dino"


def check_layout(layout: str | None, pooling: dict, path: Path) -> None:
    """Raise UserError if the given layout contradicts the presence of SimPool weights."""
    if layout == "simpool" and not pooling:
        raise UserError(f"{path} has no SimPool weights: it is no simpool file (leave layout out to infer it)")
    if layout in ("dino", "ibot", "attmask") and pooling:
        raise UserError(f"{path} has SimPool weights: load it with layout=simpool")


def check_transformer(state: dict, path: Path) -> None:
    """Raise UserError unless the keys are those of a vision transformer."""
    for key in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if key not in state:
            raise UserError(
                f"{path} lacks {key}: it is no vision transformer, ResNet, ConvNeXt or Swin of "
                f"{', '.join(DINO_LAYOUTS)}; it has {', '.join(list(state)[:3]) or 'nothing'}"
            )


def drop_unread_position(state: dict[str, Tensor], unused: dict[str, list[str]], role: str) -> None:
    """Drop the class token's row of a position table without class token (SimPool's first release)."""
    table = state["pos_embed"]
    if "cls_token" not in state and math.isqrt(table.shape[1]) ** 2 != table.shape[1]:
        state["pos_embed"] = table[:, 1:].clone()
        add_unused(unused, "unread position row", ["pos_embed[:, 0]"], role)


def transformer_spec(
    state: dict, pooling: dict, args: dict, order: str, settings: dict, path: Path, project: str = ""
) -> dict:
    """Infer the encoder spec of a vision transformer from tensor shapes; num_heads is None where nothing tells it."""
    table, patch = state["pos_embed"], state["patch_embed.proj.weight"]
    dim, patch_size, has_class = patch.shape[0], list(patch.shape[2:]), "cls_token" in state
    side = math.isqrt(table.shape[1] - has_class)
    if side * side != table.shape[1] - has_class:
        raise UserError(f"{path}: its position table of {table.shape[1]} rows is not a square grid: unknown layout")
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    known = heads_of(dim, depth, table if has_class else None, project, arch=str(args.get("arch")))
    heads = num_heads(settings, dim, known, path)
    backbone = {
        "name": NAMES.get(dim, NAMES[192]),
        "image_size": [side * pixels for pixels in patch_size],
        "patch_size": patch_size,
        "class_token": has_class,
        "position": "offset_always" if pooling and order == "after" else "offset",
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        **({"init_values": 1.0} if "blocks.0.gamma_1" in state else {}),
    }
    pooling_spec = {"name": "cls", "dim": dim} if has_class else None
    if pooling:
        pooling_spec = simpool_spec(dim, pooling, args, settings, path)
    return encoder_spec(backbone, pooling_spec, order)


def num_heads(settings: dict, width: int, known: int | None, path: Path) -> int | None:
    """Return the number of heads given, else the known one; raises UserError if it does not divide the width."""
    heads = settings.get("num_heads", known)
    if heads is not None and (not isinstance(heads, int) or heads < 1 or width % heads):
        raise UserError(f"num_heads={heads} does not divide the width {width} of {path}: give num_heads=...")
    return heads


def add_channel_stats(model: ImportedModel, settings: dict) -> None:
    """Give a network of other than three channels mean and std per channel: those given, else assumed ones."""
    weight = next(value for value in next(iter(model.networks.values())).values() if value.ndim == 4)
    channels = weight.shape[1]
    if channels == 3:
        return
    given = {key: list(settings[key]) for key in ("mean", "std") if key in settings}
    stats = {key: [sum(values) / 3] * channels for key, values in IMAGENET_STATS.items()} | given
    if given.keys() != stats.keys():
        model.assumed_stats = True
        model.notes = [
            *model.notes,
            f"mean {stats['mean'][0]:.3f} and std {stats['std'][0]:.3f} are assumed for its {channels} "
            f"channel{'s' if channels > 1 else ''} (ImageNet's averages): give mean=[...] std=[...] if it was trained "
            "with others",
        ]
    model.spec |= stats
    model.spec["backbone"] |= stats


def convnet_spec(kind: str, state: dict, pooling: dict, args: dict, settings: dict, path: Path) -> dict:
    """Infer the encoder spec of a convolutional network; without SimPool, features are averaged over positions."""
    backbone = dino_convnets.backbone_arguments(state, kind, path, map_release.FAMILIES)
    with torch.device("meta"):
        dim = Backbone(**backbone).dim
    if pooling:
        return encoder_spec(backbone, simpool_spec(dim, pooling, args, settings, path), "after")
    return encoder_spec(backbone, {"name": "gap", "dim": dim}, "before" if kind == "swin" else "after")


def encoder_spec(backbone: dict, pooling: dict | None, order: str) -> dict:
    """Return an encoder spec with ImageNet's input statistics."""
    return {
        "backbone": backbone,
        "pooling": pooling,
        "norm": order,
        "image_size": backbone["image_size"],
        "crop_pct": 0.875,
        **IMAGENET_STATS,
    }


def simpool_spec(dim: int, pooling: dict, args: dict, settings: dict, path: Path) -> dict:
    """Return the spec of a SimPool with these tensors."""
    gamma = gamma_of(args, settings, path)
    return {
        "name": "simpool",
        "dim": dim,
        "gamma": gamma,
        "num_heads": settings.get("pooling_heads", 1),
        "min_scope": settings.get("min_scope", "batch"),
        "beta": "beta" in pooling and gamma is not None,
    }


def width_of(model: ImportedModel) -> int:
    """Return the width of an encoder's pooled vector."""
    if model.spec["pooling"] is None:
        return next(iter(model.networks.values()))["norm.weight"].shape[0]
    return model.spec["pooling"]["dim"]


def encoder_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the family's keys to those of an Encoder."""
    renamed = {}
    for key, value in state.items():
        if key in ("masked_embed", "mask_token"):
            key, value = "mask_token", value.reshape(1, -1)
        for branch in ("1", "2"):
            key = key.replace(f".gamma_{branch}", f".ls{branch}.gamma")
        renamed[key if key.startswith("norm.") else f"backbone.{key}"] = value
    return renamed
