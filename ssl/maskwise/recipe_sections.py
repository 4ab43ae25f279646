"""The sections of a recipe: frozen dataclasses, each with its keys and their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Mapping, Optional, Union


class Section:
    """A section of a recipe; `keywords()` are the arguments of what its `name` (or its builder) names."""

    def keywords(self) -> dict[str, Any]:
        """The section as keyword arguments for the constructor that it describes, `name` left out."""
        if hasattr(self, "arguments"):
            return dict(self.arguments)
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "name"}


@dataclass(frozen=True)
class Data(Section):
    """Where the images come from; test_* name the labelled images of the k-NN; corrupt_ceiling is a share of the different images seen;
    mean and std, a number for each channel, are of values in 0..1 (null: ImageNet's, or those of backbone.weights).

    decoder: of the training JPEGs; jpeg_scaling: decode them smaller where every crop is made smaller still."""

    name: str = "folder"
    test_path: Optional[str] = None
    test_split: Optional[str] = None
    corrupt_ceiling: float = 0.01
    decoder: Literal["auto", "pil", "torchvision", "torchcodec"] = "auto"
    jpeg_scaling: bool = False
    mean: Optional[tuple[float, ...]] = None
    std: Optional[tuple[float, ...]] = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


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
class Augment(Section):
    """Images and targets of supervised training (pooling.md 5.2), with timm's arithmetic; size in pixels, scale as share of the area.

    policy: RandAugment, AutoAugment or AugMix as timm writes it (null: colour jitter); splits: views of an image, the first without the
    policy, and with spare_first without erasing; repeats: how often an image comes in a batch; mixup and cutmix: concentrations
    of their Beta distributions (0: off), with both CutMix is taken mix_switch of the time; smoothing: of the labels.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    policy: Optional[str] = None
    jitter: float = 0.4
    splits: int = 1
    erasing: float = 0.0
    erasing_mode: Literal["pixel", "rand", "const"] = "pixel"
    spare_first: bool = False
    repeats: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch: float = 0.5
    smoothing: float = 0.1


@dataclass(frozen=True)
class BackboneSection(Section):
    """A timm name and the arguments of `nn.Backbone`; image_size null means crops.global_size, or augment.size."""

    name: str = "vit_small_patch16_224"
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PoolingSection(Section):
    """A row of POOLINGS, its arguments, and whether the final norm comes `after` or `before` it."""

    name: str = "cls"
    norm: Literal["after", "before"] = "after"
    arguments: Mapping[str, Any] = field(default_factory=dict)


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
class ClassifierSection(Section):
    """A row of CLASSIFIERS and its arguments; classes null means those of the training images."""

    name: str = "linear"
    classes: Optional[int] = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodSection(Section):
    """A row of METHODS and its arguments; temperatures of the teacher are in section teacher.

    start_from: the model to continue from (a folder, a file, a timm name, hub:OWNER/NAME); start_head fresh leaves its head
    behind; head_warmup_epochs: how long the encoder stands still (null: not at all, one epoch where the head is fresh).
    """

    name: str = "ibot"
    start_from: Optional[str] = None
    start_head: Literal["auto", "fresh"] = "auto"
    head_warmup_epochs: Optional[float] = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MaskingSection(Section):
    """A row of MASKINGS and its arguments."""

    name: str = "none"
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Teacher(Section):
    """Momentum (cosine per step) and temperatures (per epoch) of the teacher (attmask.md 1.6); with labels the teacher is the
    average of the weights by a constant momentum, null: the weights themselves."""

    momentum: Optional[float] = 0.996
    momentum_end: float = 1.0
    temp: float = 0.07
    warmup_temp: float = 0.04
    warmup_temp_epochs: int = 30
    patch_temp: float = 0.07
    warmup_patch_temp: float = 0.04


@dataclass(frozen=True)
class Optimizer(Section):
    """The optimizer; lr is per lr_per images of the global batch (null: it is absolute), min_lr and warmup_lr are not scaled; clip null or 0 is off; freeze in epochs."""

    name: str = "adamw"
    lr: float = 5e-4
    lr_per: Optional[int] = 256
    min_lr: float = 1e-6
    warmup_epochs: float = 10.0
    warmup_lr: float = 0.0
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    clip: Optional[float] = 3.0
    clip_mode: Literal["tensor", "global"] = "tensor"
    freeze_last_layer: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def peak(self, batch_size: int) -> float:
        """The learning rate that the schedule reaches."""
        return self.lr * (1 if self.lr_per is None else batch_size / self.lr_per)


@dataclass(frozen=True)
class Train(Section):
    """Length and bookkeeping of the run; steps, when given, replaces epochs; batch_size is global, taken in `accumulate`
    micro-batches whose step is that of the whole; save_every in steps (null: each epoch); after max_bad_steps steps in a row whose loss
    or gradient is not finite the run stops."""

    epochs: int = 100
    steps: Optional[int] = None
    batch_size: int = 256
    accumulate: int = 1
    log_every: int = 10
    save_every: Optional[int] = None
    keep: int = 2
    max_bad_steps: int = 100
    precision: Literal["auto", "fp32", "bf16"] = "auto"


@dataclass(frozen=True)
class Evaluate(Section):
    """The k-NN on the way, every knn_every epochs and at the end (0: never, and so without test images); top1_every: the accuracy
    of what learns labels, likewise; `also` any other evaluation, a
    line each: `linear every=10 limit_train=5000 preset=simpool epochs=20` (every in epochs, 0: only at the end); pictures_every in epochs (0: never);
    knn_first: a k-NN before the first step too, so that an alarm can tell when training makes features worse."""

    knn_every: int = 10
    knn_first: bool = False
    top1_every: int = 1
    k: tuple[int, ...] = (10, 20, 100, 200)
    limit_bank: Optional[int] = None
    also: Optional[tuple[str, ...]] = None
    crop_pct: float = 0.875
    pictures_every: int = 1


@dataclass(frozen=True)
class Speed(Section):
    """What changes the speed and, beyond rounding, nothing else; left out of the hash.

    `compile` compiles the blocks of the backbone; `checkpointing` computes again in the backward pass what it names
    (auto: the elementwise on a CPU, nothing on a GPU); `keep_memory` keeps freed CPU memory for the next step;
    `deterministic` takes only GPU kernels that give the same bits each time (slower; CPU runs repeat themselves anyway); `shard` splits weights,
    gradients and moments over all ranks (fsdp) or over those of a node (hsdp).
    """

    workers: Union[int, Literal["auto"]] = "auto"
    cache: Literal["auto", "none"] = "auto"
    threads: Optional[int] = None
    compile: bool = False
    checkpointing: Literal["auto", "none", "elementwise", "blocks"] = "auto"
    keep_memory: bool = True
    shard: Literal["none", "fsdp", "hsdp"] = "none"
    deterministic: bool = False


SECTIONS = {
    "data": Data, "crops": Crops, "augment": Augment, "backbone": BackboneSection, "pooling": PoolingSection, "head": Head,
    "classifier": ClassifierSection, "method": MethodSection, "masking": MaskingSection, "teacher": Teacher, "optimizer": Optimizer, "train": Train, "evaluate": Evaluate, "speed": Speed,
}  # fmt: skip
