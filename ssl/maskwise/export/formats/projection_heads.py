"""Projection heads in DINO-family files: key names, and ProjectionHead arguments inferred from tensor shapes."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from maskwise.nn.heads import ProjectionHead

NEW_NAMES = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


class IncompatibleHead(Exception):
    """A head that a ProjectionHead cannot hold; the text gives the reason."""


def incoming(heads: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Rename published heads, by role and without the `head.` prefix, to this project's keys.

    iBOT writes a shared last layer twice; the copy is dropped where it is equal in all roles.
    """
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
        renamed = {
            role: {key: value for key, value in state.items() if not key.startswith("last_layer2.")}
            for role, state in renamed.items()
        }
    return renamed


def outgoing(head: dict[str, Tensor], alias: bool) -> dict[str, Tensor]:
    """Rename one head to the published keys; `alias` writes a shared last layer twice, as iBOT and AttMask do."""
    state = dict(head)
    if {key.split(".")[1] for key in head if key.startswith("mlp.")} == {"0"}:  # published one-layer MLPs are a Linear
        state = {re.sub(r"^mlp\.0\.", "mlp.", key): value for key, value in head.items()}
    if alias and "last_layer2.weight_v" not in state:
        state.update(
            {
                key.replace("last_layer.", "last_layer2."): value
                for key, value in head.items()
                if key.startswith("last_layer.")
            }
        )
    return state


def arguments(head: dict[str, Tensor], args: dict | None = None) -> dict:
    """Return the ProjectionHead arguments, `dim` included, that fit these tensors; raises IncompatibleHead."""
    if (args or {}).get("act_in_head", "gelu") != "gelu":
        raise IncompatibleHead(f"its head uses the activation {args['act_in_head']}, ours GELU")
    linears = sorted(
        (int(key.split(".")[1]), value)
        for key, value in head.items()
        if re.fullmatch(r"mlp\.\d+\.weight", key) and value.ndim == 2
    )
    if not linears or "last_layer.weight_v" not in head:
        raise IncompatibleHead("its head has no weight-normed last layer")
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
    mismatched = sorted(own.keys() ^ head.keys()) or [key for key in own if own[key].shape != head[key].shape]
    if mismatched:
        raise IncompatibleHead(f"its head has a different structure than ours ({mismatched[0]})")
    return options


def _shared(head: dict[str, Tensor]) -> bool:
    pairs = [(head.get(f"last_layer.{key}"), head.get(f"last_layer2.{key}")) for key in ("weight_g", "weight_v")]
    return all(first is None or second is None or torch.equal(first, second) for first, second in pairs)
