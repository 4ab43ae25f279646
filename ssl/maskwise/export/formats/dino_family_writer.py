"""Writing of DINO-family files: DINO, iBOT, AttMask and SimPool."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from maskwise.engine.plain_tensors import plain
from maskwise.errors import UserError
from maskwise.export.formats import projection_heads as head_keys
from maskwise.export.formats.imported_model import SINGLE_NETWORK, ImportedModel
from maskwise.export.formats.research_file import CENTERS, add_unused, take
from maskwise.nn.backbones.families.convnext import ConvNeXtFamily
from maskwise.nn.backbones.families.swin import SwinFamily
from maskwise.nn.backbones.timm_registry import family_of

SIMPOOL_TENSORS = ("norm_patches", "wq", "wk", "beta")
CENTER_SHAPES = {"center": (1, -1), "center2": (1, 1, -1)}


def write(model: ImportedModel, layout: str, weights: str | None = None) -> tuple[dict, dict[str, list[str]]]:
    """Return the content of a file in one of DINO_LAYOUTS, and the keys that are left out, by group.

    Student and teacher make a training file without optimizer; one network, or a choice of `weights`, a flat
    backbone-only file. Raises UserError if the layout cannot hold the network.
    """
    check_supported(model, layout)
    parent = "simpool." if model.spec["norm"] == "after" else "gp.pool."
    states = {role: family_keys(state, parent, model.origin) for role, state in model.networks.items()}
    for state in states.values():
        if "blocks.0.attn.qkv.weight" in state and "pos_embed" not in state:
            raise UserError(f"{model.origin} has no position table, unlike these networks: write a folder (--to DIR)")
        if "cls_token" in state and "pos_embed" in state and model.table_prefix == 0:
            state["pos_embed"] = torch.cat([torch.zeros_like(state["cls_token"]), state["pos_embed"]], dim=1)
    left_out: dict[str, list[str]] = {}
    if layout in ("dino", "simpool"):
        for role, state in states.items():
            mask_token = take(state, lambda key: key == "masked_embed")
            add_unused(left_out, f"mask token ({layout} has none)", mask_token, role)
    double_head = layout in ("ibot", "attmask")
    if weights is not None or len(states) == 1:
        return flat_content(model, states, weights, double_head, left_out), left_out
    return training_content(model, states, layout, double_head, left_out), left_out


def check_supported(model: ImportedModel, layout: str) -> None:
    """Raise UserError if the layout cannot hold the model's backbone or pooling."""
    name = model.spec["backbone"]["name"]
    if isinstance(family_of(name), (ConvNeXtFamily, SwinFamily)):
        raise UserError(
            f"{model.origin} is a {name}, which is not written in these layouts: "
            "name a folder (--to DIR), or --layout timm"
        )
    simpool = model.spec["pooling"] is not None and model.spec["pooling"]["name"] == "simpool"
    if simpool and layout != "simpool":
        raise UserError(f"{model.origin} has SimPool weights: say --layout simpool")
    if layout == "simpool" and not simpool:
        raise UserError(f"{model.origin} has no SimPool weights: say --layout dino, ibot or attmask")


def flat_content(
    model: ImportedModel,
    states: dict[str, dict[str, Tensor]],
    weights: str | None,
    double_head: bool,
    left_out: dict[str, list[str]],
) -> dict[str, Tensor]:
    """Return the tensors of one network, its head included unless `weights` chose among several networks."""
    role = model.role(weights or next(iter(states)))
    heads = head_keys.outgoing(model.heads.get(role, {}), double_head) if weights is None else {}
    add_unused(
        left_out,
        "not of one backbone",
        [f"{other} network" for other in states if other != role]
        + [f"{other} head" for other in model.heads if not heads],
        SINGLE_NETWORK,
    )
    tensors = {**states[role], **{f"head.{key}": value for key, value in heads.items()}}
    return {key: value.clone() for key, value in tensors.items()}


def training_content(
    model: ImportedModel,
    states: dict[str, dict[str, Tensor]],
    layout: str,
    double_head: bool,
    left_out: dict[str, list[str]],
) -> dict:
    """Return a training file of student and teacher with heads and centers."""
    batch_norm = bool(model.head and model.head["norm"])
    content: dict = {"epoch": 0}
    for role, state in states.items():
        wrapper = "module." if role == "student" or batch_norm else ""
        content[role] = {f"{wrapper}backbone.{key}": value.clone() for key, value in state.items()}
        for key, value in head_keys.outgoing(model.heads.get(role, {}), double_head).items():
            content[role][f"{wrapper}head.{key}"] = value.clone()
    if model.centers:
        loss = "ibot_loss" if double_head else "dino_loss"
        content[loss] = {
            theirs: model.centers[ours].reshape(CENTER_SHAPES[theirs]).clone()
            for theirs, ours in CENTERS[loss].items()
            if ours in model.centers
        }
        others = [ours for ours in model.centers if ours not in CENTERS[loss].values()]
        add_unused(left_out, "centers", others, SINGLE_NETWORK)
    if layout == "simpool":
        content["args"] = argparse.Namespace(gamma=model.spec["pooling"]["gamma"])
    return content


def family_keys(state: dict[str, Tensor], parent: str, origin) -> dict[str, Tensor]:
    """Rename an Encoder's keys to the family's; raises UserError for tensors these networks do not have."""
    renamed = {}
    for key, value in state.items():
        name = key.removeprefix("backbone.")
        if key.startswith("pooling."):
            name = parent + key.removeprefix("pooling.")
            if key.split(".")[1] not in SIMPOOL_TENSORS:
                raise UserError(f"{origin} has {key}, which the DINO family's SimPool lacks: export it as a folder")
        elif name.startswith(("reg_token", "norm_pre.", "rope")) or any(
            part in name for part in (".attn.q_norm", ".attn.k_norm", "mlp.norm")
        ):
            raise UserError(f"{origin} has {name}, which the DINO family's networks lack: export it as a folder")
        name = "masked_embed" if name == "mask_token" else name
        for branch in ("1", "2"):
            name = name.replace(f".ls{branch}.gamma", f".gamma_{branch}")
        renamed[name] = value
    return renamed


def save(content: dict, path: Path) -> None:
    """Write a file with torch.save or, for `.safetensors`, its flat tensors."""
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(plain(content), path, metadata={"format": "pt"})
    else:
        torch.save(content, path)


def check_flat(content: dict, path: Path) -> None:
    """Raise UserError for nested content and a `.safetensors` file, which holds one network."""
    if path.suffix == ".safetensors" and not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"{path}: a .safetensors file holds one flat network: "
            "add --weights teacher or student, or name the file .pth"
        )
