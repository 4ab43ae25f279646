"""Identity of the model that made embeddings: digests that tell whether two files can be compared."""

from __future__ import annotations

import hashlib
import json

from maskwise.errors import UserError
from maskwise.evaluation.features.fingerprints import cache_key

LENGTH = 24  # hex digits of a digest


def digest(value) -> str:
    """Return a hex digest of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:LENGTH]


def identities(encoder, dataset, precision: str) -> tuple[str, str]:
    """Return the digest of a model (weights, settings, transform), and that of the model on these images."""
    key = cache_key(encoder, dataset, None, precision)
    return digest({"weights": key["weights"], "transform": key["transform"]}), digest(key)


class _NoImages:
    labels = None

    def fingerprint(self) -> str:
        return ""


def model_identity(encoder) -> str:
    """Return the digest of a model alone."""
    return identities(encoder, _NoImages(), "fp32")[0]


def check_model(encoder, meta: dict, file) -> None:
    """Raise UserError if embeddings were made by another model than this encoder."""
    if meta["model"] != model_identity(encoder):
        raise UserError(
            f"{file} was made by another model ({meta['name']}), so its vectors cannot be compared with this one's; "
            "give that model, or embed the images again with this one"
        )
