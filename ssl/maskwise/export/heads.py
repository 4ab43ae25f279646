"""Projection heads of the DINO family's files: their keys and this project's, and the arguments that their shapes tell."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from maskwise.nn.heads import ProjectionHead

NEW_NAMES = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


class Unfit(Exception):
    """A head that a ProjectionHead cannot hold; the text says why."""


def incoming(heads: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Heads by role, keys after `head.`, under our names; an alias of the last layer (attmask.md 6.1) is dropped where all roles share it."""
    renamed = {}
    for role, head in heads.items():
        state = {}
        for key, value in head.items():
            key = re.sub(r"^mlp\.(weight|bias)$", r"mlp.0.\1", key)
            for new, old in NEW_NAMES.items():
                key = key.replace(new, old)
            state[key] = value
        renamed[role] = state
    if all(_shared(state) for state in renamed.values()):
        renamed = {role: {key: value for key, value in state.items() if not key.startswith("last_layer2.")} for role, state in renamed.items()}
    return renamed


def outgoing(head: dict[str, Tensor], alias: bool) -> dict[str, Tensor]:
    """One head under the published names; with `alias` a shared last layer stands there twice, as iBOT's and AttMask's files have it."""
    state = dict(head)
    if {key.split(".")[1] for key in head if key.startswith("mlp.")} == {"0"}:  # their one-layer trunk is no sequence
        state = {re.sub(r"^mlp\.0\.", "mlp.", key): value for key, value in head.items()}
    if alias and "last_layer2.weight_v" not in state:
        state.update({key.replace("last_layer.", "last_layer2."): value for key, value in head.items() if key.startswith("last_layer.")})
    return state


def arguments(head: dict[str, Tensor], args: dict | None = None) -> dict:
    """The arguments, `dim` included, of the ProjectionHead that holds these tensors; raises Unfit."""
    if (args or {}).get("act_in_head", "gelu") != "gelu":
        raise Unfit(f"its head has the activation {args['act_in_head']}, ours GELU")
    linears = sorted((int(key.split(".")[1]), value) for key, value in head.items() if re.fullmatch(r"mlp\.\d+\.weight", key) and value.ndim == 2)
    if not linears or "last_layer.weight_v" not in head:
        raise Unfit("its head has no weight-normed last layer")
    first, last = linears[0][1], linears[-1][1]
    options = {
        "dim": first.shape[1],
        "prototypes": head["last_layer.weight_v"].shape[0],
        "hidden": first.shape[0] if len(linears) > 1 else 2048,
        "bottleneck": last.shape[0],
        "layers": len(linears),
        "norm": "batch" if any(key.endswith("running_mean") for key in head) else None,
        "patch_prototypes": head["last_layer2.weight_v"].shape[0] if "last_layer2.weight_v" in head else None,
    }
    with torch.device("meta"):
        own = ProjectionHead(**options).state_dict()
    strange = sorted(own.keys() ^ head.keys()) or [key for key in own if own[key].shape != head[key].shape]
    if strange:
        raise Unfit(f"its head is built otherwise than ours ({strange[0]})")
    return options


def _shared(head: dict[str, Tensor]) -> bool:
    pairs = [(head.get(f"last_layer.{key}"), head.get(f"last_layer2.{key}")) for key in ("weight_g", "weight_v")]
    return all(one is None or two is None or torch.equal(one, two) for one, two in pairs)
