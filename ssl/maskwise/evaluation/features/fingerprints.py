"""Hex digests of datasets and encoders, and the key of cached features."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from maskwise.errors import UserError


def fingerprint(dataset) -> str:
    """Return a hex digest of a dataset's images and labels."""
    return _with_labels(dataset, dataset.fingerprint())


def weights_fingerprint(encoder: nn.Module) -> str:
    """Return a hex digest of a module: parameters, buffers, and plain settings (a pooling's gamma, a norm's eps)."""
    digest = hashlib.sha256()
    for name, part in encoder.named_modules():
        plain = {
            key: value
            for key, value in vars(part).items()
            if key != "training" and not key.startswith("_") and _plain(value)
        }
        digest.update(f"{name}:{type(part).__module__}.{type(part).__qualname__}{sorted(plain.items())}\n".encode())
    for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def cache_key(encoder, dataset, view, precision: str) -> dict:
    """Return all that cached features depend on. Raises UserError for a view without a fingerprint."""
    transform = encoder.transform if view is None else view
    if view is not None and not hasattr(view, "fingerprint"):
        raise UserError(
            "features of a view can be cached only if it has a fingerprint() of its settings; leave the cache out"
        )
    if hasattr(transform, "fingerprint"):
        settings = transform.fingerprint()
    else:
        settings = getattr(transform, "__qualname__", None) or repr(transform)
    normal = [[float(value) for value in values] for values in (encoder.mean, encoder.std)]
    data = _with_labels(dataset, getattr(dataset, "stamp", dataset.fingerprint)())
    return {
        "weights": weights_fingerprint(encoder),
        "transform": f"{settings} {normal}",
        "data": data,
        "precision": precision,
    }


def _with_labels(dataset, images: str) -> str:
    digest = hashlib.sha256(images.encode())
    if dataset.labels is not None:
        digest.update(torch.as_tensor(dataset.labels).to(torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def _plain(value) -> bool:
    return (
        value is None
        or isinstance(value, (bool, int, float, str))
        or isinstance(value, (tuple, torch.Size))
        and all(map(_plain, value))
    )
