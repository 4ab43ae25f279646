"""Recipes: YAML files become frozen sections; mistakes are all told at once, with file, line and the accepted keys."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Mapping, Optional, Union

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Section:
    """A section of a recipe; `keywords()` are the arguments of what its `name` (or its builder) names."""

    def keywords(self) -> dict[str, Any]:
        """The section as keyword arguments for the constructor that it describes, `name` left out."""
        if hasattr(self, "arguments"):
            return dict(self.arguments)
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "name"}


@dataclass(frozen=True)
class Data(Section):
    """Where the images come from; test_* name the labelled images of the k-NN; corrupt_ceiling is a share of the images."""

    name: str = "folder"
    test_path: Optional[str] = None
    test_split: Optional[str] = None
    corrupt_ceiling: float = 0.01
    arguments: Mapping[str, Any] = field(default=EMPTY)


@dataclass(frozen=True)
class Crops(Section):
    """Multi-crop and its colours (attmask.md 3); sizes in pixels, scales as shares of the area, sigma in pixels."""

    global_size: int = 224
    local_size: int = 96
    local_number: int = 10
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.25)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_prob: float = 0.8
    grey_prob: float = 0.2
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_prob: float = 0.2


@dataclass(frozen=True)
class BackboneSection(Section):
    """A timm name and the arguments of `nn.Backbone`; image_size null means crops.global_size."""

    name: str = "vit_small_patch16_224"
    arguments: Mapping[str, Any] = field(default=EMPTY)


@dataclass(frozen=True)
class PoolingSection(Section):
    """A row of POOLINGS, its arguments, and whether the final norm comes `after` or `before` it."""

    name: str = "cls"
    norm: Literal["after", "before"] = "after"
    arguments: Mapping[str, Any] = field(default=EMPTY)


@dataclass(frozen=True)
class Head(Section):
    """The projection head (attmask.md 1.2); patch_prototypes gives the patches a last layer of their own."""

    prototypes: int = 8192
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3
    norm: Optional[Literal["batch"]] = None
    norm_last_layer: bool = False
    patch_prototypes: Optional[int] = None


@dataclass(frozen=True)
class MethodSection(Section):
    """A row of METHODS and its arguments; temperatures of the teacher are in section teacher."""

    name: str = "ibot"
    arguments: Mapping[str, Any] = field(default=EMPTY)


@dataclass(frozen=True)
class MaskingSection(Section):
    """A row of MASKINGS and its arguments."""

    name: str = "none"
    arguments: Mapping[str, Any] = field(default=EMPTY)


@dataclass(frozen=True)
class Teacher(Section):
    """Momentum (cosine per step) and temperatures (per epoch) of the teacher (attmask.md 1.6)."""

    momentum: float = 0.996
    momentum_end: float = 1.0
    temp: float = 0.07
    warmup_temp: float = 0.04
    warmup_temp_epochs: int = 30
    patch_temp: float = 0.07
    warmup_patch_temp: float = 0.04


@dataclass(frozen=True)
class Optimizer(Section):
    """The optimizer; lr is per 256 images of the global batch, min_lr is not scaled; clip null or 0 is off; freeze in epochs."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = 5e-4
    min_lr: float = 1e-6
    warmup_epochs: float = 10.0
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    clip: Optional[float] = 3.0
    clip_mode: Literal["tensor", "global"] = "tensor"
    freeze_last_layer: int = 1
    arguments: Mapping[str, Any] = field(default=EMPTY)


@dataclass(frozen=True)
class Train(Section):
    """Length and bookkeeping of the run; steps, when given, replaces epochs; batch_size is global; save_every in steps (null: each epoch)."""

    epochs: int = 100
    steps: Optional[int] = None
    batch_size: int = 256
    log_every: int = 10
    save_every: Optional[int] = None
    keep: int = 2
    precision: Literal["auto", "fp32", "bf16"] = "auto"


@dataclass(frozen=True)
class Evaluate(Section):
    """The k-NN on the way, every knn_every epochs and at the end (0: never); pictures_every in epochs (0: never)."""

    knn_every: int = 10
    k: tuple[int, ...] = (10, 20, 100, 200)
    limit_bank: Optional[int] = None
    crop_pct: float = 0.875
    pictures_every: int = 1


@dataclass(frozen=True)
class Speed(Section):
    """What changes the speed and, beyond rounding, nothing else; left out of the hash."""

    workers: Union[int, Literal["auto"]] = "auto"
    cache: Literal["auto", "memory", "none"] = "auto"
    threads: Optional[int] = None


SECTIONS = {
    "data": Data, "crops": Crops, "backbone": BackboneSection, "pooling": PoolingSection, "head": Head, "method": MethodSection,
    "masking": MaskingSection, "teacher": Teacher, "optimizer": Optimizer, "train": Train, "evaluate": Evaluate, "speed": Speed,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A whole run, resolved: every value set, each with the place it came from."""

    seed: int = 0
    data: Data = field(default_factory=Data)
    crops: Crops = field(default_factory=Crops)
    backbone: BackboneSection = field(default_factory=BackboneSection)
    pooling: PoolingSection = field(default_factory=PoolingSection)
    head: Head = field(default_factory=Head)
    method: MethodSection = field(default_factory=MethodSection)
    masking: MaskingSection = field(default_factory=MaskingSection)
    teacher: Teacher = field(default_factory=Teacher)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    speed: Speed = field(default_factory=Speed)
    source: str = field(default="", compare=False)
    values: Mapping[str, Any] = field(default=EMPTY, repr=False, compare=False)
    origins: Mapping[str, str] = field(default=EMPTY, repr=False, compare=False)


def read_recipe(path: str | Path, *overrides: str) -> Recipe:
    """The recipe of a file (or of a shipped name such as `pretrain/attmask_hint_vits16`) with `section.key=value` overrides."""
