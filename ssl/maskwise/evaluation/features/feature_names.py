"""Names of features (`pooled`, `cls4`, `a+b`, ...): validity, what to request of an encoder, and their rows."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from maskwise.errors import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NAME = re.compile(r"(?:pooled|vectors|patch_mean|patches|keys|attention|(?:cls|mean)\d*)")


def check(encoder, names: Sequence[str], precision: str = "fp32") -> None:
    """Raise UserError for an unknown feature name or one that this encoder does not have."""
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision!r} is unknown; choose {' or '.join(PRECISIONS)}")
    backbone = getattr(encoder, "backbone", None)
    for name in names:
        for term in re.split(r"[+~]", name):
            if not _NAME.fullmatch(term) or term in ("cls0", "mean0"):
                raise UserError(
                    f"no feature {name!r}; choose from pooled, vectors, patch_mean, cls4, mean4 (any number of "
                    "blocks), patches, keys, attention, and a+b of them"
                )
            terms = getattr(encoder, "feature_terms", None)  # of an encoder that gives some features only
            if terms is not None and term not in terms:
                raise UserError(f"feature {name!r} is not available from this model; choose from {', '.join(terms)}")
            kind, count = _last(term)
            if kind == "cls" and not getattr(backbone, "has_class_token", True):
                raise UserError(
                    f"feature {name!r} needs a class token and this encoder has none; take pooled, or mean{count} of "
                    "its blocks"
                )
            if kind and count > 1 and getattr(backbone, "stage_dims", None):
                raise UserError(
                    f"feature {name!r} needs {count} blocks, and this encoder's feature maps have different sizes; "
                    "take pooled, patch_mean or mean1"
                )
            if kind and count > getattr(backbone, "depth", count):
                raise UserError(
                    f"feature {name!r} needs {count} blocks and this encoder has {backbone.depth}; take fewer"
                )


def requests(names: Sequence[str]) -> dict:
    """Return the keyword arguments of an encoder's forward for these features."""
    terms = [term for name in names for term in re.split(r"[+~]", name)]
    blocks = max((count for kind, count in map(_last, terms) if kind), default=0)
    return {"attention": "attention" in terms, "keys": "keys" in terms, "layers": tuple(range(-blocks, 0))}


def rows_of(name: str, features, prefix: int = 1) -> Tensor:
    """Return the rows [b, ...] of a feature from Features computed with `requests`.

    prefix: number of tokens before the patches.
    """
    if "+" in name:
        return torch.cat([rows_of(part, features, prefix) for part in name.split("+")], dim=-1)
    if "~" in name:
        return torch.stack([rows_of(part, features, prefix) for part in name.split("~")], dim=-1).flatten(-2)
    kind, count = _last(name)
    if kind:
        stages = features.layers[-count:]
        if stages[-1].ndim == 4:  # a feature map: positions of the last one are the patches
            return features.patches.float().mean(dim=1)
        if kind == "cls":
            return torch.cat([stage[:, 0] for stage in stages], dim=-1)
        return torch.cat([stage[:, prefix:].float().mean(dim=1) for stage in stages], dim=-1)
    if name == "patch_mean":
        return features.patches.float().mean(dim=1)
    rows = getattr(features, name, None)
    if rows is None:
        raise UserError(
            f"this encoder gives no {name}; choose another feature, or an encoder whose pooling computes an attention"
        )
    return rows


def _last(term: str) -> tuple[str | None, int]:
    """Split the name of a block feature: cls4 -> ("cls", 4), cls -> ("cls", 1), any other -> (None, 0)."""
    kind = term.rstrip("0123456789")
    return (kind, int(term[len(kind) :] or 1)) if kind in ("cls", "mean") else (None, 0)
