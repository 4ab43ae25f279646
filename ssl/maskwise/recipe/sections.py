"""Sections of a recipe: frozen dataclasses with their keys, types, bounds and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, Optional, Union

from maskwise.bounds import Above, Count, Fraction, NonNegative, NonNegativeInt, Positive, Probability, Rate
from maskwise.data.options import CropOptions, SupervisedCropOptions
from maskwise.storage.options import RemoteOptions

DECAY_SHARE = 0.2  # of the run, by default, in which schedule wsd decays (Hägele et al. 2024, sec. 4)


class Section:
    """A section whose keys are its own fields."""

    def keywords(self) -> dict[str, Any]:
        """Return the section as keyword arguments."""
        return {own.name: getattr(self, own.name) for own in fields(self)}


@dataclass(frozen=True)
class NamedSection(Section):
    """A section whose `name` chooses a class: its keys are its own fields and the arguments of that class.

    Constructor arguments in `set_by_build` come from other sections or from the run and are no keys; `defaults` holds
    the defaults that differ from the constructor's.
    """

    set_by_build: ClassVar[frozenset[str]] = frozenset()
    defaults: ClassVar[Mapping[str, Any]] = {}

    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def keywords(self) -> dict[str, Any]:
        """Return the keyword arguments of the class that `name` chooses."""
        return dict(self.arguments)


@dataclass(frozen=True)
class Data(NamedSection):
    """An entry of DATASETS and its arguments.

    test_path, test_split: labeled images of the evaluations during training; holdout: in their place, the share of each
    class that is held out of the training images; corrupt_ceiling: largest share of
    unreadable images; decoder: of the training JPEGs; jpeg_scaling: decode at a lower resolution where every crop is
    smaller still; mean and std: one number per channel, of values in 0..1 (null: ImageNet's, or those of
    backbone.weights).
    """

    set_by_build = frozenset({"seed", "channels", "remote", "dataset"})

    name: str = "folder"
    test_path: Optional[str] = None
    test_split: Optional[str] = None
    holdout: Optional[Annotated[float, Above(0, at_most=0.5)]] = None
    corrupt_ceiling: Probability = 0.01
    decoder: Literal["auto", "pil", "torchvision", "torchcodec"] = "auto"
    jpeg_scaling: bool = False
    mean: Optional[tuple[float, ...]] = None
    std: Optional[tuple[float, ...]] = None


@dataclass(frozen=True)
class Crops(CropOptions, Section):
    """Multi-crop and its color augmentation; see `CropOptions`."""


@dataclass(frozen=True)
class Augment(SupervisedCropOptions, Section):
    """Images and targets of supervised training, with timm's arithmetic; see `SupervisedCropOptions`.

    repeats: copies of an image in a batch; mixup and cutmix: concentrations of their Beta distributions (0: off), with
    both on, CutMix is chosen with probability mix_switch; smoothing: of the labels.
    """

    erasing_mode: Literal["pixel", "rand", "const"] = "pixel"
    repeats: Count = 1
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    mix_prob: Probability = 1.0
    mix_switch: Probability = 0.5
    smoothing: Rate = 0.1


@dataclass(frozen=True)
class BackboneSection(NamedSection):
    """A timm name and the arguments of `nn.Backbone`; image_size null is crops.global_size, or augment.size."""

    set_by_build = frozenset({"name", "mask_token", "mean", "std"})
    defaults = {"drop_path": 0.1}

    name: str = "vit_small_patch16_224"


@dataclass(frozen=True)
class PoolingSection(NamedSection):
    """An entry of POOLINGS and its arguments; norm: apply the final norm `after` or `before` the pooling."""

    set_by_build = frozenset({"dim"})

    name: str = "cls"
    norm: Literal["after", "before"] = "after"


@dataclass(frozen=True)
class Head(Section):
    """The projection head of DINO and iBOT; patch_prototypes: a separate last layer for patches, of that width."""

    prototypes: Count = 8192
    hidden: Count = 2048
    bottleneck: Count = 256
    layers: Count = 3
    norm: Optional[Literal["batch"]] = None
    norm_last_layer: bool = False
    patch_prototypes: Optional[Count] = None


@dataclass(frozen=True)
class ClassifierSection(NamedSection):
    """An entry of CLASSIFIERS and its arguments; classes null: as many as the training images have."""

    set_by_build = frozenset({"encoder", "classes"})

    name: str = "linear"
    classes: Optional[Count] = None


@dataclass(frozen=True)
class MethodSection(NamedSection):
    """An entry of METHODS and its arguments; temperatures of the teacher are in section teacher.

    start_from: the model to continue from (a folder, a file, a timm name, hub:OWNER/NAME); start_head: `fresh` does not
    load its head; head_warmup_epochs: epochs with a frozen encoder (null: one with a fresh head, else none).
    """

    set_by_build = frozenset(
        {
            *(
                "encoder",
                "head",
                "source",
                "classifier",
                "masking",
                "splits",
                "average",
                "seed",
                "all_sum",
                "world_size",
                "rank",
            ),
            *("teacher_temp", "warmup_teacher_temp", "warmup_teacher_temp_epochs"),
            *("patch_temp", "warmup_patch_temp", "warmup_patch_temp_epochs"),
        }
    )

    name: str = "ibot"
    start_from: Optional[str] = None
    start_head: Literal["auto", "fresh"] = "auto"
    head_warmup_epochs: Optional[NonNegative] = None


@dataclass(frozen=True)
class MaskingSection(NamedSection):
    """An entry of MASKINGS and its arguments."""

    set_by_build = frozenset({"seed"})

    name: str = "none"


@dataclass(frozen=True)
class Teacher(Section):
    """Momentum (cosine, per step) and temperatures (per epoch) of the teacher.

    A supervised teacher is the moving average of the weights with a constant momentum, or with null the weights
    themselves.
    """

    momentum: Optional[Probability] = 0.996
    momentum_end: Probability = 1.0
    temp: Positive = 0.07
    warmup_temp: Positive = 0.04
    warmup_temp_epochs: NonNegativeInt = 30
    patch_temp: Positive = 0.07
    warmup_patch_temp: Positive = 0.04


@dataclass(frozen=True)
class Optimizer(NamedSection):
    """An entry of OPTIMIZERS, its arguments and schedules.

    lr: per lr_per images of the global batch (null: absolute); min_lr and warmup_lr are not scaled; schedule: cosine
    over the run, constant after the warm-up, or wsd, which is constant and decays in the last decay_share of the run
    (null: DECAY_SHARE); weight decay and the teacher's momentum follow it; clip: null or 0 is off; freeze_last_layer:
    in epochs.
    """

    set_by_build = frozenset({"params", "lr", "weight_decay", "shard_sum"})

    name: str = "adamw"
    lr: Positive = 5e-4
    lr_per: Optional[Count] = 256
    min_lr: NonNegative = 1e-6
    warmup_epochs: NonNegative = 10.0
    warmup_lr: NonNegative = 0.0
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    decay_share: Optional[Fraction] = None
    weight_decay: NonNegative = 0.04
    weight_decay_end: NonNegative = 0.4
    clip: Optional[NonNegative] = 3.0
    clip_mode: Literal["tensor", "global"] = "tensor"
    freeze_last_layer: NonNegativeInt = 1

    def peak(self, batch_size: int) -> float:
        """Return the highest learning rate of the schedule."""
        return self.lr * (1 if self.lr_per is None else batch_size / self.lr_per)

    def decay_steps(self, total: int) -> int:
        """Return the number of last steps, of `total`, in which schedule wsd decays; 0 for the others."""
        share = DECAY_SHARE if self.decay_share is None else self.decay_share
        return max(1, round(share * total)) if self.schedule == "wsd" else 0


@dataclass(frozen=True)
class Train(Section):
    """Length, batch and checkpoints of a run.

    steps: replaces epochs; batch_size: global, split into `accumulate` micro-batches that make one step; save_every: in
    steps (null: each epoch); keep: checkpoints not deleted (0: all); max_bad_steps: stop after that many steps in a row
    with a loss or gradient that is not finite; mirror: a folder in object storage that receives each finished
    checkpoint, the reports and the metrics, and from which a fresh machine continues (null: none); loggers: beside
    metrics.jsonl, W&B and MLflow without network unless WANDB_MODE or MLFLOW_TRACKING_URI ask for it (null: none).
    """

    epochs: Count = 100
    steps: Optional[Count] = None
    batch_size: Count = 256
    accumulate: Count = 1
    log_every: Count = 10
    save_every: Optional[Count] = None
    keep: NonNegativeInt = 2
    max_bad_steps: Count = 100
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    mirror: Optional[str] = None
    loggers: Optional[tuple[Literal["tensorboard", "wandb", "mlflow"], ...]] = ("tensorboard",)


@dataclass(frozen=True)
class Evaluate(Section):
    """Evaluations during training.

    knn_every: epochs between k-NN reports, and one at the end (0: never, also without test images); top1_every: the
    same for the accuracy of a supervised run; knn_first: a k-NN before the first step, with which an alarm can detect
    features that get worse; baselines: k-NN of the untrained network, raw and whitened pixels, once, with the first
    k-NN; also: other evaluations, one per line such as `linear every=10 limit_train=5000 epochs=20`
    (every: in epochs, 0: only at the end); pictures_every: epochs between figures of the masks (0: never).
    """

    knn_every: NonNegativeInt = 10
    knn_first: bool = False
    baselines: bool = True
    top1_every: NonNegativeInt = 0
    k: tuple[Count, ...] = (10, 20, 100, 200)
    limit_bank: Optional[Count] = None
    also: Optional[tuple[str, ...]] = None
    crop_pct: Fraction = 0.875
    pictures_every: NonNegativeInt = 1


@dataclass(frozen=True)
class Speed(Section):
    """Options that change speed and memory, and results by rounding only; left out of the hash.

    compile: compile the blocks of the backbone; checkpointing: recompute these in the backward pass (auto: elementwise
    operations on a CPU, nothing on a GPU); keep_memory: reuse freed CPU memory in the next step; deterministic: only
    GPU kernels with the same bits in every run (slower; CPU runs repeat anyway); shard: split weights, gradients and
    moments over all ranks (fsdp) or over those of a node (hsdp). remote_timeout, remote_reads, remote_cache: of images
    in object storage, see `RemoteOptions`.
    """

    workers: Union[NonNegativeInt, Literal["auto"]] = "auto"
    cache: Literal["auto", "none"] = "auto"
    threads: Optional[Count] = None
    compile: bool = False
    checkpointing: Literal["auto", "none", "elementwise", "blocks"] = "auto"
    keep_memory: bool = True
    shard: Literal["none", "fsdp", "hsdp"] = "none"
    deterministic: bool = False
    remote_timeout: Positive = 300.0
    remote_reads: Count = 16
    remote_cache: NonNegative = 4.0

    def remote(self) -> RemoteOptions:
        """Return how files in storage are read."""
        return RemoteOptions(self.remote_timeout, self.remote_reads, self.remote_cache)


SECTIONS = {
    "data": Data,
    "crops": Crops,
    "augment": Augment,
    "backbone": BackboneSection,
    "pooling": PoolingSection,
    "head": Head,
    "classifier": ClassifierSection,
    "method": MethodSection,
    "masking": MaskingSection,
    "teacher": Teacher,
    "optimizer": Optimizer,
    "train": Train,
    "evaluate": Evaluate,
    "speed": Speed,
}
