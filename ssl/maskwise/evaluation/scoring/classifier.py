"""An encoder with a linear classifier on one of its features: images -> logits."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maskwise.engine.atomic_file import WRITE_ERRORS, write_error
from maskwise.errors import UserError
from maskwise.evaluation.features import feature_names
from maskwise.evaluation.features.extract import evaluating
from maskwise.nn.backbones.pretrained import strip_prefixes
from maskwise.nn.backbones.weights_file import read_tensors
from maskwise.nn.tokens import Features


class Classifier(nn.Module):
    """Encoder, feature and head: normalized images [B, C, H, W] -> float32 logits [B, classes].

    feature: a name of features.extract; transform, mean, std and image_size are the encoder's.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, feature: str = "cls4"):
        super().__init__()
        feature_names.check(encoder, (feature,))
        self.encoder, self.head, self.feature = encoder, head, feature
        self.mean, self.std = encoder.mean, encoder.std
        self.image_size = getattr(encoder, "image_size", None)
        self.prefix = getattr(getattr(encoder, "backbone", None), "num_prefix", 1)
        self.classes: list[str] | None = None  # names of the classes, where they are known

    @property
    def transform(self):
        """Evaluation transform of the encoder."""
        return self.encoder.transform

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized images [B, C, H, W] to logits [B, classes]."""
        requests = feature_names.requests((self.feature,)).items()
        features = self.encoder(images, **{key: value for key, value in requests if value or key == "attention"})
        return self.head(feature_names.rows_of(self.feature, features, self.prefix).float())


class Logits(nn.Module):
    """An encoder and a classifier (nn.CLASSIFIERS) as one encoder whose pooled vector [B, classes] is the logits."""

    def __init__(self, encoder: nn.Module, classifier: nn.Module):
        super().__init__()
        self.encoder, self.classifier = encoder, classifier
        self.mean, self.std, self.image_size = encoder.mean, encoder.std, encoder.image_size
        self.dim = classifier.classes

    @property
    def transform(self):
        """Evaluation transform of the encoder."""
        return self.encoder.transform

    def forward(self, images: Tensor, *, attention: bool = False, layers: tuple[int, ...] = ()) -> Features:
        """Map normalized images [B, C, H, W] to Features without attention; `attention` and `layers` are ignored."""
        features = self.encoder(images, attention=False, layers=self.classifier.layers)
        return Features(self.classifier(features).float(), features.patches, None, features.grid)


def save_classifier(head: nn.Linear, feature: str, path: str | Path, classes: Sequence[str] = ()) -> Path:
    """Write a linear head, its feature's name and its classes' names as safetensors, atomically. Raises UserError."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "weight": head.weight.detach().float().cpu().contiguous(),
            "bias": head.bias.detach().float().cpu().contiguous(),
        }
        names = {"classes": json.dumps(list(classes))} if len(classes) == len(head.weight) else {}
        save_file(tensors, aside, metadata={"feature": feature, **names})
        os.replace(aside, path)
    except WRITE_ERRORS as error:
        raise UserError(f"{write_error(f'the probe {path}', error)}, or give another save=FILE") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return path


def load_classifier(encoder: nn.Module, path: str | Path, feature: str | None = None) -> Classifier:
    """Load a probe of `evaluate linear save=FILE`, or linear weights as published by DINO, iBOT and AttMask.

    feature: by default that of the file, else by width: 1 x dim `pooled`, 4 x dim `cls4`; 2 x dim is `cls~patch_mean`
    in DINO's files and `cls+patch_mean` in iBOT's, and must be given. Raises UserError for a file that is not a probe
    or does not fit.
    """
    content, metadata = read_tensors(path), {}  # raises UserError for a missing or broken file
    if str(path).endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    feature = feature or metadata.get("feature")
    state = content.get("state_dict", content)
    state = strip_prefixes(
        {key: value for key, value in state.items() if isinstance(value, Tensor)}, ("module", "linear")
    )
    if set(state) != {"weight", "bias"} or state["weight"].ndim != 2:
        raise UserError(
            f"{path} is no linear classifier (it holds {', '.join(sorted(state)[:4]) or 'no tensors'}); give a probe "
            "of `maskwise evaluate linear ... save=FILE`"
        )
    classes, width = state["weight"].shape
    if feature is None:
        feature = {1: "pooled", 4: "cls4"}.get(width // encoder.dim if width % encoder.dim == 0 else 0)
        if feature is None:
            raise UserError(
                f"{path} takes features of width {width} and the encoder's width is {encoder.dim}; give "
                "feature=cls~patch_mean (DINO) or feature=cls+patch_mean (iBOT)"
            )
    head = nn.utils.skip_init(nn.Linear, width, classes)
    head.load_state_dict(state)
    built = Classifier(encoder, head.to(next(encoder.parameters()).device), feature)
    built.classes = saved_names(path, metadata, classes)
    with torch.no_grad(), evaluating(encoder):
        size = getattr(encoder, "image_size", None)
        if size is not None:
            weight = next(encoder.parameters())
            try:
                built(torch.zeros(1, len(encoder.mean), *size, device=weight.device, dtype=weight.dtype))
            except RuntimeError:
                raise UserError(
                    f"{path} takes features of width {width}, which {feature} of this encoder does not have; give the "
                    "encoder it was trained on, or feature=NAME"
                ) from None
    return built


def saved_names(path: str | Path, metadata: dict[str, str], count: int) -> list[str] | None:
    """Return the class names in a probe's metadata, None where it has none. Raises UserError for another number."""
    if "classes" not in metadata:
        return None
    try:
        names = json.loads(metadata["classes"])
    except ValueError:
        names = None
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{path} does not name its {count} classes; train the probe again (`evaluate linear ... save=`)"
        )
    return names
