"""Exported folder format: file names, and reading of the encoder in it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.export.folder.timm_layout import head_tensors, renaming
from maskwise.export.formats import spec_checks
from maskwise.nn.backbones.weights_file import read_tensors
from maskwise.nn.encoder import encoder_from_spec

FORMAT = "maskwise-encoder-2"
CONFIG = "config.json"
BACKBONE = "backbone.safetensors"
MODEL = "model.safetensors"
OWN = "maskwise.safetensors"
TRAINING = "training.safetensors"


def description(folder: Path) -> dict | None:
    """Return the `maskwise` section of config.json; None if the folder is no export of maskwise."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    section = config.get("maskwise") if isinstance(config, dict) else None
    valid = (
        isinstance(section, dict)
        and section.get("format") == FORMAT
        and isinstance(section.get("encoder"), dict)
        and section.get("weights") in ("teacher", "student")
    )
    return section if valid else None


def read(folder: Path) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """Read an exported folder: encoder spec, encoder tensors, and tensors of heads and centers ({} without).

    Raises UserError for a missing file or tensor.
    """
    folder = Path(folder)
    spec = spec_checks.check(description(folder)["encoder"], folder / CONFIG)
    weights = read_tensors(weights_file(folder))
    own = read_tensors(folder / OWN) if (folder / OWN).is_file() else {}
    with torch.device("meta"):
        probe = encoder_from_spec(
            {**spec, "backbone": {**spec["backbone"], "mask_token": "backbone.mask_token" in own}}
        )
    names = renaming(probe.state_dict(), weights, probe.backbone)
    state = {key: weights[name] for key, name in names.items() if name in weights} | own
    unread = sorted(weights.keys() - {*names.values(), *head_tensors(probe.backbone)})
    if unread:
        raise UserError(f"{folder} does not fit its config.json: its weights have unknown {unread[0]}; export it again")
    return spec, state, read_tensors(folder / TRAINING) if (folder / TRAINING).is_file() else {}


def weights_file(folder: Path) -> Path:
    """Return the file with the backbone under timm's names."""
    return folder / (BACKBONE if (folder / BACKBONE).is_file() else MODEL)
