"""An exported folder opened again in every library that is there, beside the encoder that it was written from."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from maskwise.export.timm_layout import open_timm
from maskwise.export.transformers_layout import WEIGHTS, open_transformers
from maskwise.functional.errors import UserError
from maskwise.nn import pit
from maskwise.nn.encoder import Encoder
from maskwise.nn.tokens import Features

TOLERANCE = 1e-5  # of the largest feature, or of 1 where all are smaller: float32 carries no further


@dataclass(frozen=True)
class Difference:
    """How far a library is from the encoder: largest difference of features and of attention (None: it has none)."""

    library: str
    features: float
    attention: float | None = None

    def line(self) -> str:
        """The difference in one line."""
        attention = "no attention" if self.attention is None else f"attention {self.attention:.1e}"
        return f"  {self.library:<22} features {self.features:.1e}   {attention}"

    @property
    def good(self) -> bool:
        """Whether both are within the tolerance."""
        return all(value is None or value <= TOLERANCE for value in (self.features, self.attention))


def compare(encoder: Encoder, folder: Path, read) -> tuple[list[Difference], list[str]]:
    """Differences of maskwise, timm and transformers on two random images, and the libraries that are not installed.

    `read` opens the folder as `maskwise.load` does. Raises UserError where one differs by more than the tolerance.
    """
    images = probe(encoder)
    wanted = outputs(encoder, images)
    found = [difference(named("maskwise"), wanted, outputs(read(folder), images))]
    found.append(timm_difference(encoder, folder, images, wanted))
    absent = []
    if importlib.util.find_spec("transformers") is None:
        absent.append("transformers")
    elif (folder / WEIGHTS).is_file():
        found.append(dinov2_difference(encoder, folder, images, wanted))
    else:
        found.append(wrapper_difference(encoder, folder, images, wanted))
    require(found)
    return found, absent


def require(found: list[Difference]) -> None:
    """Raise UserError for the first difference that is too large."""
    for each in found:
        if not each.good:
            raise UserError(f"the export differs in {each.library} by more than {TOLERANCE:g} ({each.line().split(maxsplit=2)[2]}): nothing was written; please report it")


def probe(encoder: Encoder, count: int = 2) -> Tensor:
    """Random images at the encoder's size: float32 [count, C, h, w]."""
    return torch.randn(count, len(encoder.mean), *encoder.image_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(encoder: Encoder, images: Tensor) -> Features:
    """What an encoder in eval mode, float32, on the CPU gives."""
    return encoder(images)


def named(library: str) -> str:
    """A library and its version."""
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return library


def far(wanted: Tensor, got: Tensor) -> float:
    """Largest difference, as a share of the largest value where that is above 1; infinite for other shapes or NaN."""
    if wanted.shape != got.shape:
        return math.inf
    value = float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1.0))
    return value if math.isfinite(value) else math.inf


def difference(library: str, wanted: Features, got: Features) -> Difference:
    """Between two encoders of ours."""
    attention = None if wanted.attention is None or got.attention is None else far(wanted.attention, got.attention)
    return Difference(library, max(far(wanted.pooled, got.pooled), far(wanted.patches, got.patches)), attention)


@torch.no_grad()
def timm_difference(encoder: Encoder, folder: Path, images: Tensor, wanted: Features) -> Difference:
    """timm's normalised patches, and its pooled vector where it is the class token's."""
    model = open_timm(folder)
    return Difference(named("timm"), _timm_far(encoder, model, images, wanted))


@torch.no_grad()
def wrapper_difference(encoder: Encoder, folder: Path, images: Tensor, wanted: Features) -> Difference:
    """The same through transformers' timm wrapper, which has no attentions."""
    return Difference(named("transformers"), _timm_far(encoder, open_transformers(folder).timm_model, images, wanted))


def _timm_far(encoder: Encoder, model: nn.Module, images: Tensor, wanted: Features) -> float:
    found = [far(wanted.patches, timm_patches(model, images))]
    if pools_class_token(encoder):
        found.append(far(wanted.pooled, model(images)))
    return max(found)


def pools_class_token(encoder: Encoder) -> bool:
    """Whether the encoder's vector is its class token, which timm and transformers give too."""
    from maskwise.nn.pooling import CLS

    return type(encoder.pooling) is CLS


def timm_patches(model: nn.Module, images: Tensor) -> Tensor:
    """Normalised patches [B, N, D] of a timm model, whichever layout its family gives them in."""
    if isinstance(model, pit.CLASS):  # whose forward gives the class token alone
        return model.norm(model.forward_intermediates(images, intermediates_only=True)[-1].flatten(2).transpose(1, 2))
    tokens = model.forward_features(images)
    if tokens.ndim == 3:
        return tokens[:, getattr(model, "num_prefix_tokens", 0) :]
    if tokens.shape[1] == model.num_features:
        tokens = tokens.permute(0, 2, 3, 1)
    tokens = tokens.flatten(1, 2)
    norm = getattr(getattr(model, "head", None), "norm", None)  # ConvNeXt keeps its last norm in the head
    if not isinstance(norm, nn.LayerNorm):
        return tokens
    return nn.functional.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


@torch.no_grad()
def dinov2_difference(encoder: Encoder, folder: Path, images: Tensor, wanted: Features) -> Difference:
    """Dinov2Model's tokens, its pooler_output and the class token's row of its last attention."""
    model = open_transformers(folder)
    prefix = encoder.backbone.num_prefix
    got = model(pixel_values=images, output_attentions=True)
    found = [far(wanted.patches, got.last_hidden_state[:, prefix:])]
    if not pools_class_token(encoder):
        return Difference(named("transformers"), max(found))
    found.append(far(wanted.pooled, got.pooler_output))
    return Difference(named("transformers"), max(found), far(wanted.attention, got.attentions[-1][:, :, 0, prefix:]))
