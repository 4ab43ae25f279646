"""Verification of an exported folder: opened in every installed library and compared with the encoder."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.export.folder.timm_layout import embed_layer_of, open_timm
from maskwise.export.folder.transformers_layout import WEIGHTS, open_transformers
from maskwise.nn.backbones.families.pit import PiTFamily
from maskwise.nn.backbones.generic import GenericBackbone
from maskwise.nn.encoder import Encoder
from maskwise.nn.pooling import CLS
from maskwise.nn.tokens import Features

TOLERANCE = 1e-5  # relative to the largest value
ROUNDINGS, MOST = 4, 1e-3  # a network whose own float32 rounding is larger gets that many times it, at most MOST


@dataclass(frozen=True)
class Difference:
    """Largest difference of features and attention between a library and the encoder; attention None without it.

    `tolerance` and `note`: what is accepted of this library, and why more than TOLERANCE.
    """

    library: str
    features: float
    attention: float | None = None
    tolerance: float = TOLERANCE
    note: str = ""

    def line(self) -> str:
        """Return the difference in one line."""
        attention = "no attention" if self.attention is None else f"attention {self.attention:.1e}"
        note = f"   ({self.note})" if self.note else ""
        return f"  {self.library:<22} features {self.features:.1e}   {attention}{note}"

    @property
    def largest(self) -> float:
        """The larger of both differences."""
        return max(self.features, self.attention or 0.0)


def compare(encoder: Encoder, folder: Path, read: Callable[[Path], Encoder]) -> tuple[list[Difference], dict[str, str]]:
    """Compare maskwise, timm and transformers on two random images; also return why a library was not tried, by name.

    `read` opens the folder in maskwise. Raises UserError for a difference above the tolerance.
    """
    images = random_images(encoder)
    expected = outputs(encoder, images)
    differences = [difference(library_version("maskwise"), expected, outputs(read(folder), images))]
    with opening("timm"):
        differences.append(timm_difference(encoder, folder, images, expected))
    untried = {}
    if embed_layer_of(folder):
        untried["transformers"] = "builds no stem of given convolutions, not tried"
    elif importlib.util.find_spec("transformers") is None:
        untried["transformers"] = "not installed, not tried"
    else:
        compare_transformers = dinov2_difference if (folder / WEIGHTS).is_file() else wrapper_difference
        with opening("transformers"):
            differences.append(compare_transformers(encoder, folder, images, expected))
    return [*differences, *require(encoder, differences)], untried


@contextlib.contextmanager
def opening(library: str) -> Iterator[None]:
    """Turn any exception of a library that opens the folder into a UserError."""
    try:
        yield
    except Exception as error:  # libraries raise any type
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{library_version(library)} cannot open the export ({lines[0]}): nothing was written; please report it"
        ) from None


def require(encoder: Encoder, differences: list[Difference]) -> list[Difference]:
    """Raise UserError for a difference above the tolerance; return the encoder's rounding error if it was needed.

    Two correct programs differ by their rounding errors. Those of most networks are below 1e-6 of the largest feature;
    a fresh MobileNetV2, whose ReLU6 clips values far above 6, reaches 1e-5.
    """
    if all(difference.largest <= difference.tolerance for difference in differences):
        return []
    rounding = rounding_error(encoder)
    for difference in differences:
        limit = max(difference.tolerance, min(ROUNDINGS * rounding.largest, MOST))
        if not difference.largest <= limit:
            values = difference.line().split(maxsplit=2)[2]
            raise UserError(
                f"the export differs in {difference.library} by more than {limit:.1e} ({values}): "
                f"nothing was written{'' if difference.note else '; please report it'}"
            )
    return [rounding]


def rounding_error(encoder: Encoder) -> Difference:
    """Return how far an encoder's features in float32 are from those in float64."""
    images = random_images(encoder)
    exact = outputs(copy.deepcopy(encoder).double(), images.double())
    return difference("rounding of float32", exact, outputs(encoder, images))


def random_images(encoder: Encoder, count: int = 2) -> Tensor:
    """Return random images at the encoder's size: float32 [count, C, h, w]."""
    return torch.randn(count, len(encoder.mean), *encoder.image_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(encoder: Encoder, images: Tensor) -> Features:
    """Return the features of an encoder without gradients."""
    return encoder(images)


def library_version(library: str) -> str:
    """Return a library's name and version."""
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return library


def max_difference(expected: Tensor, actual: Tensor) -> float:
    """Return the largest difference, relative to the largest value; infinite for other shapes or NaN."""
    if expected.shape != actual.shape:
        return math.inf
    value = float((expected - actual).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    return value if math.isfinite(value) else math.inf


def difference(library: str, expected: Features, actual: Features) -> Difference:
    """Compare the features of two maskwise encoders."""
    pooled = max_difference(expected.pooled, actual.pooled)
    patches = max_difference(expected.patches, actual.patches)
    if expected.attention is None or actual.attention is None:
        return Difference(library, max(pooled, patches))
    return Difference(library, max(pooled, patches), max_difference(expected.attention, actual.attention))


@torch.no_grad()
def timm_difference(encoder: Encoder, folder: Path, images: Tensor, expected: Features) -> Difference:
    """Compare timm's normalized patches, and its pooled vector if the encoder pools the class token."""
    largest = _timm_max_difference(encoder, open_timm(folder), images, expected)
    return Difference(library_version("timm"), largest, **timm_tolerance(encoder))


@torch.no_grad()
def wrapper_difference(encoder: Encoder, folder: Path, images: Tensor, expected: Features) -> Difference:
    """Compare the same through transformers' timm wrapper, which has no attention."""
    model = open_transformers(folder).timm_model
    largest = _timm_max_difference(encoder, model, images, expected)
    return Difference(library_version("transformers"), largest, **timm_tolerance(encoder))


def timm_tolerance(encoder: Encoder) -> dict:
    """Return a wider tolerance and its reason for an encoder whose norms have another epsilon than timm's."""
    eps = encoder.backbone.timm_args.get("norm_eps")
    return {} if eps is None else {"tolerance": MOST, "note": f"norm_eps={eps:g}, which timm does not have"}


def _timm_max_difference(encoder: Encoder, model: nn.Module, images: Tensor, expected: Features) -> float:
    if isinstance(encoder.backbone, GenericBackbone):
        return generic_difference(encoder, model, images, expected)
    patches = max_difference(expected.patches, timm_patches(model, images))
    if not pools_class_token(encoder):
        return patches
    return max(patches, max_difference(expected.pooled, model(images)))


def generic_difference(encoder: Encoder, model: nn.Module, images: Tensor, expected: Features) -> float:
    """Compare the patches, and the class token if it is pooled, with the output of timm's `forward_features`.

    A norm in timm's head is applied to them by timm's weights.
    """
    patches, prefix = encoder.backbone.form.split(model.forward_features(images))
    if encoder.backbone.norm_place != "norm":
        norm = model.get_submodule(encoder.backbone.norm_place)
        patches, prefix = (
            nn.functional.layer_norm(tokens, norm.weight.shape, norm.weight, norm.bias, norm.eps)
            for tokens in (patches, prefix)
        )
    largest = max_difference(expected.patches, patches)
    return max(largest, max_difference(expected.pooled, prefix[:, 0])) if pools_class_token(encoder) else largest


def pools_class_token(encoder: Encoder) -> bool:
    """Return whether the encoder's vector is its class token, as in timm and transformers."""
    return type(encoder.pooling) is CLS


def timm_patches(model: nn.Module, images: Tensor) -> Tensor:
    """Return the normalized patches [B, N, D] of a timm model of any family."""
    if isinstance(model, PiTFamily.model_class):  # its forward_features returns the class token alone
        return model.norm(model.forward_intermediates(images, intermediates_only=True)[-1].flatten(2).transpose(1, 2))
    tokens = model.forward_features(images)
    if tokens.ndim == 3:
        return tokens[:, getattr(model, "num_prefix_tokens", 0) :]
    if tokens.shape[1] == model.num_features:
        tokens = tokens.permute(0, 2, 3, 1)
    tokens = tokens.flatten(1, 2)
    norm = getattr(getattr(model, "head", None), "norm", None)  # ConvNeXt has its last norm in the head
    if not isinstance(norm, nn.LayerNorm):
        return tokens
    return nn.functional.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


@torch.no_grad()
def dinov2_difference(encoder: Encoder, folder: Path, images: Tensor, expected: Features) -> Difference:
    """Compare Dinov2Model's tokens, pooler_output and class token attention of the last block."""
    model, library = open_transformers(folder), library_version("transformers")
    prefix = encoder.backbone.num_prefix
    actual = model(pixel_values=images, output_attentions=True)
    patches = max_difference(expected.patches, actual.last_hidden_state[:, prefix:])
    if not pools_class_token(encoder):
        return Difference(library, patches)
    pooled = max_difference(expected.pooled, actual.pooler_output)
    attention = max_difference(expected.attention, actual.attentions[-1][:, :, 0, prefix:])
    return Difference(library, max(patches, pooled), attention)
