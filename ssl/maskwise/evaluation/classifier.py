"""An encoder with a linear classifier on one of its features: images in, logits out; what robustness protocols are handed."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maskwise.evaluation import features
from maskwise.functional.errors import UserError
from maskwise.nn.tokens import Features
from maskwise.nn.weights import read_tensors, strip_prefixes


class Classifier(nn.Module):
    """encoder -> the feature of that name (see features.extract) -> head: normalised images [B, 3, H, W] -> logits [B, C] in float32.

    What an encoder knows of its images is known here, too: transform, mean, std, image_size.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, feature: str = "cls4"):
        super().__init__()
        features.check(encoder, (feature,))
        self.encoder, self.head, self.feature = encoder, head, feature
        self.mean, self.std = encoder.mean, encoder.std
        self.image_size = getattr(encoder, "image_size", None)
        self.prefix = getattr(getattr(encoder, "backbone", None), "num_prefix", 1)

    @property
    def transform(self):
        """What makes an image file's pixels an input."""
        return self.encoder.transform

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> logits [B, C]."""
        found = self.encoder(images, **{key: value for key, value in features.requests((self.feature,)).items() if value or key == "attention"})
        return self.head(features.rows_of(self.feature, found, self.prefix).float())


class Logits(nn.Module):
    """An encoder and a classifier (nn.CLASSIFIERS) as one encoder, whose pooled vector is the logits: images [B, 3, H, W] -> Features(pooled [B, C], ...)."""

    def __init__(self, encoder: nn.Module, classifier: nn.Module):
        super().__init__()
        self.encoder, self.classifier = encoder, classifier
        self.mean, self.std, self.image_size, self.dim = encoder.mean, encoder.std, encoder.image_size, classifier.classes

    @property
    def transform(self):
        """What makes an image file's pixels an input."""
        return self.encoder.transform

    def forward(self, images: Tensor, *, attention: bool = False, layers: tuple[int, ...] = ()) -> Features:
        """Normalised images [B, 3, H, W] -> Features; neither attention nor layers are those of anything here."""
        seen = self.encoder(images, attention=False, layers=self.classifier.layers)
        return Features(self.classifier(seen).float(), seen.patches, None, seen.grid)


def save_classifier(head: nn.Linear, feature: str, path: str | Path) -> Path:
    """Write a linear head and its feature's name as safetensors, aside and then in place. Raises UserError where it cannot."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": head.weight.detach().float().cpu().contiguous(), "bias": head.bias.detach().float().cpu().contiguous()}
        save_file(tensors, aside, metadata={"feature": feature})
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write the probe {path}: {error.strerror}; give another save=FILE") from None
    return path


def load_classifier(encoder: nn.Module, path: str | Path, feature: str | None = None) -> Classifier:
    """The classifier of a probe that `evaluate linear save=FILE` wrote, or of linear weights as DINO, iBOT and AttMask publish them.

    feature: by default as the file says, else by width: 1 x dim `pooled`, 4 x dim `cls4`; 2 x dim is `cls~patch_mean` in DINO's
    files and `cls+patch_mean` in iBOT's, and has to be said. Raises UserError for a file that is no probe or does not fit.
    """
    if str(path).endswith(".safetensors"):
        read_tensors(path)  # its one line for a missing or broken file
        with safe_open(path, "pt") as file:
            feature = feature or (file.metadata() or {}).get("feature")
    content = read_tensors(path)
    state = content.get("state_dict", content)
    state = strip_prefixes({key: value for key, value in state.items() if isinstance(value, Tensor)}, ("module.", "_orig_mod.", "linear."))
    if set(state) != {"weight", "bias"} or state["weight"].ndim != 2:
        raise UserError(f"{path} is no linear classifier (it holds {', '.join(sorted(state)[:4]) or 'no tensors'}); give a probe of `maskwise evaluate linear ... save=FILE`")
    classes, width = state["weight"].shape
    if feature is None:
        feature = {1: "pooled", 4: "cls4"}.get(width // encoder.dim if width % encoder.dim == 0 else 0)
        if feature is None:
            raise UserError(f"{path} takes features {width} wide of an encoder {encoder.dim} wide; say which: feature=cls~patch_mean (DINO) or cls+patch_mean (iBOT)")
    head = nn.utils.skip_init(nn.Linear, width, classes)
    head.load_state_dict(state)
    built = Classifier(encoder, head.to(next(encoder.parameters()).device), feature)
    with torch.no_grad(), features.evaluating(encoder):
        size = getattr(encoder, "image_size", None)
        if size is not None:
            weight = next(encoder.parameters())
            try:
                built(torch.zeros(1, 3, *size, device=weight.device, dtype=weight.dtype))
            except RuntimeError:
                raise UserError(f"{path} takes features {width} wide and {feature} of this encoder is not; give the encoder it was trained on, or feature=NAME") from None
    return built
