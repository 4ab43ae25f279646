"""Recipes: YAML files become frozen sections; mistakes are all told at once, with file, line and the accepted keys."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Collection, Literal, Mapping, Optional, Union

from maskwise.functional.errors import UserError
from maskwise.recipe_code import COMMAND_LINE, not_consented
from maskwise.recipe_evaluations import scheduled
from maskwise.recipe_schema import REQUIRED, UNSET, Key, check_bounds, contradictions, nearest, schema, unbuildable, unread
from maskwise.recipe_text import Entry, Misread, Scalar, convert, header, parse, read, write

SHIPPED = Path(__file__).parent / "configs"


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


@dataclass(frozen=True)
class Recipe:
    """A whole run, resolved: every value set, each with the place it came from."""

    seed: int = 0
    data: Data = field(default_factory=Data)
    crops: Crops = field(default_factory=Crops)
    augment: Augment = field(default_factory=Augment)
    backbone: BackboneSection = field(default_factory=BackboneSection)
    pooling: PoolingSection = field(default_factory=PoolingSection)
    head: Head = field(default_factory=Head)
    classifier: ClassifierSection = field(default_factory=ClassifierSection)
    method: MethodSection = field(default_factory=MethodSection)
    masking: MaskingSection = field(default_factory=MaskingSection)
    teacher: Teacher = field(default_factory=Teacher)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    speed: Speed = field(default_factory=Speed)
    source: str = field(default="", compare=False)
    values: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def learns_labels(self) -> bool:
        """Whether the method learns labels: then sections augment and classifier are read in place of crops, head and masking."""
        return "augment.size" in self.values

    @property
    def image_size(self) -> int:
        """Pixels of a side of the images that the encoder is trained on."""
        return self.augment.size if self.learns_labels else self.crops.global_size

    def origin(self, key: str) -> str:
        """Where the value of a dotted key was written: `file:line`, `command line` or `default`."""
        return self.origins.get(key, "default")

    def resolved_yaml(self) -> str:
        """Every value as YAML; read_recipe reads it back to an equal recipe."""
        return self.laid_out(lambda key: "")

    def explained(self) -> str:
        """Every value as YAML with its origin beside it."""
        width = max(len(key.partition(".")[2]) + len(write(value)) for key, value in self.values.items()) + 6
        return self.laid_out(lambda key: "# " + self.origin(key), min(width, 64))

    def laid_out(self, remark: Callable[[str], str], width: int = 0) -> str:
        lines, section = [], ""
        for key, value in self.values.items():
            head, _, name = key.partition(".")
            if name and head != section:
                lines.append(f"{head}:")
                section = head
            line = f"  {name}: {write(value)}" if name else f"{key}: {write(value)}"
            lines.append(f"{line:<{width}}{remark(key)}".rstrip())
        return "\n".join(lines) + "\n"

    def hash(self) -> str:
        """Sixteen hex digits over every value that can change a result (section speed cannot)."""
        text = json.dumps({key: value for key, value in self.values.items() if not key.startswith("speed.")}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def code(self) -> set[str]:
        """The classes from elsewhere that this recipe names as `module:Name`."""
        return {value for key, value in self.values.items() if key.endswith(".name") and ":" in str(value)}

    def diff(self, other: Recipe) -> list[str]:
        """One line for each value in which `other` differs, section speed left out."""
        keys = [key for key in (*self.values, *(key for key in other.values if key not in self.values)) if not key.startswith("speed.")]
        mine, theirs = ({key: write(each.values[key]) if key in each.values else "not set" for key in keys} for each in (self, other))
        return [f"{key}: {mine[key]} -> {theirs[key]}" for key in keys if mine[key] != theirs[key]]


def read_recipe(path: str | Path, *overrides: str, try_model: bool = True, consented: Collection[str] = ()) -> Recipe:
    """The recipe of a file, a run folder or a shipped name (`pretrain/attmask_hint_vits16`), with `section.key=value` overrides.

    Raises UserError that names every mistake at once, each with its place. Without `try_model` nobody asks whether the model can be built. Code that a file names as
    `module:Name` is imported only if it is in `consented` or an override says it, too (or MASKWISE_MODULES allows its module).
    """
    found, source = locate(path)
    layers, mistakes = chain(found, source)
    if overrides:
        layer, more = command_line(overrides)
        layers.append(layer)
        mistakes += more
    entries, keys, unknown = merge(layers, consented)
    values: dict[str, Any] = {}
    for section, why in unknown.items():
        mistakes.append(f"{entries[f'{section}.name'].origin}: {section}.name: {why}")
    for key, entry in entries.items():
        if key in keys:
            try:
                values[key] = convert(entry.value, keys[key].kind)
                check_bounds(key, values[key])
            except Misread as error:
                mistakes.append(f"{entry.origin}: {key}: {error}")
        elif key.partition(".")[0] not in unknown:
            mistakes.append(f"{entry.origin}: {key}: {unread(key, keys, SECTIONS)}")
    for key, rule in keys.items():
        if rule.default is REQUIRED and key not in values and key not in entries:
            mistakes.append(f"{source}: {key}: missing; write it into the recipe or give {key}=... on the command line")
        elif rule.default is not UNSET and key not in values:
            values[key] = rule.default
    if not mistakes:
        for concerned, why in contradictions(values) or (unbuildable(values) if try_model else []):
            keys_said = concerned.split()
            written = [entries[key].origin for key in keys_said if key in entries]
            named = "" if why.startswith(f"{keys_said[0]}.") else f"{keys_said[0]}: "
            mistakes.append(f"{written[0] if written else source}: {named}{why}")
    for key, what in (("evaluate.knn_every", "k-NN"), ("evaluate.top1_every", "the accuracy")):
        if not mistakes and values.get(key) and not has_test(values):
            if key in entries:
                mistakes = [f"{entries[key].origin}: {key}: {what} needs labelled test images; give data.test_path or data.test_split, or 0"]
            values[key] = 0
    if not mistakes and values["evaluate.also"]:
        try:
            scheduled(values["evaluate.also"])
            why = "" if has_test(values) else "needs labelled test images; give data.test_path or data.test_split, or leave it out"
        except UserError as error:
            why = str(error)
        mistakes = [f"{entries['evaluate.also'].origin}: evaluate.also: {why}"] if why else []
    if mistakes and not overrides and (awaited := header(found.read_text(encoding="utf-8-sig")).not_yet):
        raise UserError(f"{source} cannot run yet: {awaited}")
    if mistakes:
        raise UserError(told(mistakes, source))
    ordered = {key: values[key] for key in keys if key in values}
    origins = {key: entry.origin for key, entry in entries.items()}
    return Recipe(ordered["seed"], **built(ordered), source=source, values=MappingProxyType(ordered), origins=MappingProxyType(origins))


def check_run(recipe: Recipe, images: int, world_size: int) -> None:
    """Raises UserError when the recipe cannot run on so many images and ranks; `images` is the length of the training set."""
    batch = recipe.train.batch_size
    if world_size > images:
        raise UserError(f"more ranks ({world_size}) than images ({images}); start fewer ranks or give more images")
    if batch > images:
        most = images // world_size * world_size
        raise UserError(f"train.batch_size is {batch} and there are only {images} images; give train.batch_size={most} or less, or more images")
    if batch % world_size:
        near = max(world_size, batch // world_size * world_size)
        raise UserError(f"train.batch_size {batch} (the global batch) does not divide over {world_size} ranks; give train.batch_size={near}")
    if batch // world_size % recipe.train.accumulate:
        share = "" if world_size == 1 else f" / {world_size} ranks"
        raise UserError(f"train.batch_size {batch}{share} does not divide into train.accumulate={recipe.train.accumulate} micro-batches; give a divisor")
    if (recipe.augment.mixup or recipe.augment.cutmix) and batch // world_size % 2:
        raise UserError(f"train.batch_size {batch} leaves {batch // world_size} images to a rank, which cannot be mixed in pairs; give train.batch_size={batch + world_size}")
    if recipe.train.steps is not None:
        epochs = recipe.train.steps / (images // batch)
        for key, what in (("optimizer.warmup_epochs", "learning-rate"), ("teacher.warmup_temp_epochs", "temperature")):
            if recipe.values.get(key, 0) > math.ceil(epochs):
                length = f"train.steps={recipe.train.steps} is {epochs:.3g} epochs of {images} images"
                raise UserError(f"{key}: the {what} warm-up ({recipe.values[key]:g} epochs) is longer than the run ({length}); shorten it or lengthen the run")


def locate(path: str | Path) -> tuple[Path, str]:
    """The file of a recipe and the name it goes by in messages."""
    given = Path(path).expanduser()
    if given.is_dir() and (given / "recipe.yaml").is_file():
        return given / "recipe.yaml", str(given / "recipe.yaml")
    if given.is_file():
        return given, str(path)
    for name in (str(path), f"{path}.yaml"):
        inside = SHIPPED / name.removeprefix("configs/")
        if not given.is_absolute() and inside.is_file():
            return inside, f"configs/{inside.relative_to(SHIPPED).as_posix()}"
    if given.is_dir():
        raise UserError(f"{path} is a folder without a recipe.yaml; give a recipe file")
    near = nearest(str(path).removesuffix(".yaml").removeprefix("configs/"), shipped())
    raise UserError(f"no recipe {path}{near}; give a YAML file, or one that `maskwise list recipes` names")


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(each.relative_to(SHIPPED).with_suffix("").as_posix() for each in SHIPPED.glob("*/*.yaml"))


def chain(path: Path, source: str) -> tuple[list[dict[str, Entry]], list[str]]:
    """The entries of a recipe and its parents, the oldest first."""
    layers: list[dict[str, Entry]] = []
    mistakes: list[str] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            raise UserError(f"{source}: `extends` comes back to this file; break the circle")
        seen.append(path.resolve())
        entries, more = read(path, source)
        mistakes += more
        parent = entries.pop("extends", None)
        layers.insert(0, with_names(entries))
        if parent is None:
            return layers, mistakes
        if not isinstance(parent.value, Scalar):
            raise UserError(f"{parent.origin}: extends: a recipe has one parent; name one file")
        near = path.parent / parent.value.text
        if near.is_file():
            path, source = near, Path(os.path.normpath(Path(source).parent / parent.value.text)).as_posix()
        else:
            try:
                path, source = locate(parent.value.text)
            except UserError as error:
                raise UserError(f"{parent.origin}: extends: {error}") from None


def with_names(entries: dict[str, Entry]) -> dict[str, Entry]:
    """`masking: none` means `masking.name`; a section that holds nothing says nothing."""
    plain = {}
    for key, entry in entries.items():
        if key in SECTIONS and isinstance(entry.value, Scalar):
            if entry.value.text:
                plain[f"{key}.name" if hasattr(SECTIONS[key], "name") else key] = entry
        else:
            plain[key] = entry
    return plain


def command_line(overrides) -> tuple[dict[str, Entry], list[str]]:
    """`section.key=value` words as the last layer of a recipe."""
    layer: dict[str, Entry] = {}
    mistakes = []
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            mistakes.append(f"command line: `{word}` is not section.key=value")
            continue
        try:
            entries, _ = parse(f"value: {text}", COMMAND_LINE)
            layer[key] = Entry(entries["value"].value, COMMAND_LINE)
        except (UserError, KeyError):
            layer[key] = Entry(Scalar(text), COMMAND_LINE)
    return with_names(layer), mistakes


def merge(layers: list[dict[str, Entry]], consented: Collection[str] = ()) -> tuple[dict[str, Entry], dict[str, Key], dict[str, str]]:
    """One layer over the other; a name changed by a child drops the inherited keys that the new name does not read."""
    entries: dict[str, Entry] = {}
    before: dict[str, Key] = {}
    for layer in layers:
        renamed = {**entries, **layer}
        names = {section: cls.name for section, cls in SECTIONS.items() if hasattr(cls, "name")}
        refused = {}
        for section in names:
            given = renamed.get(f"{section}.name")
            if given and isinstance(given.value, Scalar):
                names[section] = given.value.text
                if why := not_consented(section, given, consented):
                    refused[section] = why
        keys, unknown = schema(SECTIONS, names, refused)
        entries = {key: entry for key, entry in entries.items() if key in keys and not keys[key].idle or key not in before}
        entries.update(layer)
        before = keys
    return entries, keys, unknown


def has_test(values: Mapping[str, Any]) -> bool:
    """Whether the recipe says where labelled test images are; data without a path (shapes) makes its own."""
    return "data.path" not in values or values.get("data.test_path") is not None or values.get("data.test_split") is not None


def built(values: Mapping[str, Any]) -> dict[str, Section]:
    """The sections from resolved values: own fields, and the rest as arguments."""
    sections = {}
    for section, cls in SECTIONS.items():
        own = {each.name for each in fields(cls)}
        here = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(section + ".")}
        more = {"arguments": MappingProxyType({key: here[key] for key in here if key not in own})} if "arguments" in own else {}
        sections[section] = cls(**{key: here[key] for key in here if key in own}, **more)
    return sections


def told(mistakes: list[str], source: str) -> str:
    """One mistake as one line, several under a line that counts them."""
    if len(mistakes) == 1:
        return mistakes[0]
    return f"{source}: {len(mistakes)} mistakes\n" + "\n".join(f"  {each}" for each in mistakes)
