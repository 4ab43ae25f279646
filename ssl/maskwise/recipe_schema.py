"""What a recipe may say: the keys come from the sections and from the signatures of what their names name."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import types
import typing
from dataclasses import dataclass, fields, replace

from maskwise.recipe_text import Misread

SIMPLE = (int, float, bool, str)
REQUIRED = object()
UNSET = object()
Ratio = typing.Union[float, tuple[float, ...]]
Count = typing.Optional[int]
Size = typing.Union[int, tuple[int, int], None]

# arguments that the run supplies, or that another section holds
SUPPLIED = {
    "data": {"seed", "channels"},
    "backbone": {"name", "mask_token", "mean", "std"},
    "pooling": {"dim"},
    "method": {
        "encoder", "head", "masking", "all_sum", "world_size", "seed", "teacher_temp", "warmup_teacher_temp",
        "warmup_teacher_temp_epochs", "patch_temp", "warmup_patch_temp", "warmup_patch_temp_epochs", "classifier", "splits", "average",
    },
    "classifier": {"encoder", "classes"},
    "masking": {"seed"},
    "optimizer": {"params", "lr", "weight_decay"},
}  # fmt: skip
# timm arguments that are classes, belong to its classifier, or would not fit RGB images
NOT_FOR_RECIPES = {"block_fn", "block", "aa_layer", "block_args", "device", "dtype", "head_norm_first", "head_hidden_size", "embed_layer", "mlp_layer", "fc_norm", "final_norm", "pool_include_prefix", "in_chans",
                   "use_fc_norm", "attn_pool_num_heads", "attn_pool_mlp_ratio", "head_init_scale"}
KINDS = {
    "data.set": str, "data.classes": typing.Union[str, tuple[str, ...], None],
    "data.path": str, "data.split": typing.Optional[str], "data.per_class": Count, "data.count": int, "data.size": int,
    "backbone.image_size": Size, "backbone.patch_size": Size, "backbone.class_token": typing.Optional[bool],
    "backbone.position": typing.Literal["offset", "size", "offset_always"], "backbone.weights": typing.Optional[str],
    "method.targets": typing.Literal["centering", "sinkhorn"], "method.patch_loss": typing.Literal["image", "token"],
    "method.pixel_loss": typing.Literal["l1", "l2"], "method.loss": typing.Literal["softmax", "bce"], "method.bce_threshold": typing.Optional[float],
    "optimizer.max_grad_norm": typing.Optional[float],
    "masking.ratio": Ratio, "masking.var": Ratio, "masking.ratio_per": typing.Literal["step", "view"], "optimizer.betas": tuple[float, float],
    "pooling.gamma": typing.Optional[float], "pooling.min_scope": typing.Literal["image", "batch"],
    "pooling.variant": typing.Literal["paper", "released"], "pooling.reduce": typing.Literal["max_logit", "concat_project", "max_feature", "mean"],
    "pooling.weight_start": typing.Optional[typing.Literal["normal", "uniform"]], "pooling.init": typing.Literal["gap", "energy", "learned"],
    "pooling.keys": typing.Literal["tokens+pixels", "pixels"], "pooling.similarity": typing.Literal["dot", "euclidean", "cosine"], "pooling.normalise": typing.Literal["softmax", "sigmoid"],
}  # fmt: skip
DEFAULTS = {"backbone.drop_path": 0.1}
# what a method that learns labels does not read, and what only such a one reads; and defaults that are its own
UNLABELLED = (
    "crops.", "head.", "masking.", "teacher.momentum_end", "teacher.temp", "teacher.warmup_temp", "teacher.warmup_temp_epochs", "teacher.patch_temp",
    "teacher.warmup_patch_temp", "optimizer.freeze_last_layer", "evaluate.pictures_every", "method.start_head", "method.head_warmup_epochs",
)  # fmt: skip
LABELLED = ("augment.", "classifier.", "evaluate.top1_every")
LABELLED_DEFAULTS = {"teacher.momentum": None, "evaluate.knn_every": 0, "optimizer.min_lr": 0.0, "optimizer.clip": None}

# what a number may be, and the keys that it holds for; a list's every entry
PIXELS_AT_MOST = 178_956_970  # where Pillow itself takes an image for a decompression bomb
BOUNDS = {
    "at least 0": (
        lambda v: v >= 0,
        """seed crops.local_number crops.jitter augment.jitter augment.mixup augment.cutmix crops.blur_sigma method.lambda1 method.lambda2 method.pixel_weight
        method.start_epoch method.jsd_weight method.head_warmup_epochs teacher.warmup_temp_epochs optimizer.min_lr optimizer.warmup_lr optimizer.warmup_epochs
        optimizer.weight_decay optimizer.weight_decay_end optimizer.clip optimizer.freeze_last_layer evaluate.knn_every evaluate.top1_every
        evaluate.pictures_every speed.workers pooling.tolerance""",
    ),
    "at least 1": (
        lambda v: v >= 1,
        """data.per_class data.count data.size augment.size augment.splits augment.repeats classifier.classes optimizer.lr_per crops.global_size crops.local_size backbone.image_size backbone.patch_size backbone.depth
        backbone.embed_dim backbone.num_heads head.prototypes head.hidden head.bottleneck head.layers head.patch_prototypes train.epochs train.steps
        train.batch_size train.accumulate train.log_every train.save_every train.keep train.max_bad_steps evaluate.k evaluate.limit_bank speed.threads
        pooling.num_heads pooling.groups pooling.tokens pooling.gram_width pooling.gram_groups pooling.embed pooling.mlp_groups pooling.k pooling.iterations pooling.layers pooling.blocks pooling.anchors""",
    ),
    f"from 1 to {PIXELS_AT_MOST}": (lambda v: 1 <= v <= PIXELS_AT_MOST, "data.max_pixels"),
    "above 0": (
        lambda v: v > 0,
        """backbone.mlp_ratio pooling.gamma pooling.gamma_max pooling.gamma_lr pooling.scale pooling.epsilon pooling.sigma pooling.layer_scale method.student_temp teacher.temp teacher.warmup_temp teacher.patch_temp teacher.warmup_patch_temp
        optimizer.lr""",
    ),
    "from 0 to 1": (
        lambda v: 0 <= v <= 1,
        """data.corrupt_ceiling augment.flip augment.erasing augment.mix_prob augment.mix_switch method.bce_threshold crops.flip crops.jitter_prob crops.grey_prob crops.blur_prob crops.solarize_prob method.center_momentum
        masking.ratio masking.var masking.prob masking.show_max teacher.momentum teacher.momentum_end""",
    ),
    "above 0 and at most 1": (lambda v: 0 < v <= 1, "augment.scale crops.global_scale crops.local_scale evaluate.crop_pct"),
    "from 0 to below 1": (lambda v: 0 <= v < 1, "backbone.drop_path augment.smoothing optimizer.momentum optimizer.betas classifier.dropout method.dropout"),
}


@dataclass(frozen=True)
class Key:
    """One key that is read: the kind of its value, and its default (REQUIRED, or UNSET: not recorded unless given)."""

    kind: object
    default: object
    owner: str = ""  # the timm class that a key of section backbone is handed on to
    idle: bool = False  # of no use to what is named: nothing but its default is taken, and a parent's value is not inherited


class Unknown(Exception):
    """A name that its table does not hold; the text says what it holds."""


def tables() -> dict[str, dict[str, type]]:
    """The tables that a section's `name` is looked up in."""
    from maskwise.data.datasets import DATASETS
    from maskwise.engine.optim import OPTIMIZERS
    from maskwise.methods import METHODS
    from maskwise.methods.masking import MASKINGS
    from maskwise.nn import CLASSIFIERS, POOLINGS

    return {"data": DATASETS, "pooling": POOLINGS, "classifier": CLASSIFIERS, "method": METHODS, "masking": MASKINGS, "optimizer": OPTIMIZERS}


def named(section: str, name: str) -> type:
    """The class that `name` names in a section: a row of its table, or `module:Name`; raises Unknown."""
    if section == "backbone":
        from maskwise.nn import Backbone  # before timm, which it readies

        import timm

        if not timm.is_model(name):
            near = nearest(name, timm.list_models())
            raise Unknown(f"timm has no model `{name}`{near}; `timm.list_models('vit_*')` lists them")
        return Backbone
    table = tables()[section]
    if name in table:
        return table[name]
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise Unknown(f"`{name}` cannot be imported: {error}") from None
        if not inspect.isclass(found):
            raise Unknown(f"`{name}` is no class")
        return found
    raise Unknown(f"no {section} `{name}`{nearest(name, table)}; there are {', '.join(table)}, and your own as module:Name")


def nearest(word: str, choices) -> str:
    """`; did you mean ...?` when something close exists."""
    near = difflib.get_close_matches(word, list(choices), 1, 0.6)
    return f"; did you mean `{near[0]}`?" if near else ""


def parameters_of(maker) -> tuple[dict[str, inspect.Parameter], dict[str, object]]:
    """The parameters of a class or function, those that a constructor hands on to its parents included, and their annotations."""
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, object] = {}
    for each in [vars(cls)["__init__"] for cls in maker.__mro__ if "__init__" in vars(cls)] if inspect.isclass(maker) else [maker]:
        own = [parameter for parameter in inspect.signature(each).parameters.values() if parameter.name != "self"]
        try:
            hints = {**typing.get_type_hints(each), **hints}
        except (NameError, TypeError):
            pass
        for parameter in own:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                parameters.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    return parameters, hints


def constructor_keys(section: str, cls: type) -> dict[str, Key]:
    """The keys that the constructor of `cls` reads from a section."""
    parameters, hints = parameters_of(cls)
    keys = {}
    for name, parameter in parameters.items():
        if name in SUPPLIED[section]:
            continue
        dotted = f"{section}.{name}"
        default = REQUIRED if parameter.default is parameter.empty else DEFAULTS.get(dotted, parameter.default)
        if default is None:  # a class may leave a default to its subclasses
            default = getattr(cls, f"default_{name}", None)
        keys[name] = Key(KINDS.get(dotted) or kind_of(hints.get(name), default), default)
    return keys


@functools.lru_cache
def timm_keys(name: str) -> dict[str, Key]:
    """The keys of section backbone that are handed on to the class of timm's model `name`; none is recorded unless given."""
    from maskwise.nn.timm_models import OWN_NAMES, anatomy_of, keywords_of, own_keys

    family = keywords_of(name)
    parameters, hints = parameters_of(family)
    passed = [each for each in parameters.values() if each.name not in {*OWN_NAMES, *NOT_FOR_RECIPES, *getattr(anatomy_of(name), "NAMED", ())}]
    keys = {each.name: Key(kind_of(hints.get(each.name), each.default), UNSET, family.__name__) for each in passed}
    return {**keys, **{own: Key(kind, UNSET, family.__name__) for own, kind in own_keys(name).items()}}


def not_taken(name: str) -> set[str]:
    """Arguments of the backbone that the family of timm's model `name` has no use for."""
    from maskwise.nn.timm_models import anatomy_of

    family = anatomy_of(name)
    return {"patch_size", "class_token", "position"} - {*family.TAKES} if getattr(family, "MAPS", False) else set()


def kind_of(hint, default):
    """The kind of an argument from its annotation, else from its default."""
    if readable(hint):
        return hint
    if type(default) in SIMPLE:
        return type(default)
    if isinstance(default, tuple) and default and all(type(each) in SIMPLE for each in default):
        return tuple[tuple(type(each) for each in default)]
    return typing.Any


def readable(hint) -> bool:
    """Whether a value can be read as what an annotation says."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType, tuple):
        return all(each is Ellipsis or readable(each) for each in typing.get_args(hint))
    return hint in SIMPLE or hint is type(None) or origin is typing.Literal


def schema(sections: dict[str, type], names: dict[str, str], refused: dict[str, str]) -> tuple[dict[str, Key], dict[str, str]]:
    """The dotted keys that a recipe with these names reads, and for each name that is unknown why; sections in `refused` are not looked up."""
    keys = {"seed": Key(int, 0)}
    unknown = dict(refused)
    classes: dict[str, type] = {}
    for section in SUPPLIED:
        if section in refused:
            continue
        try:
            classes[section] = named(section, names[section])
        except Unknown as error:
            unknown[section] = str(error)
    labelled = getattr(classes.get("method"), "learns_labels", False)
    absent = UNLABELLED if labelled else LABELLED
    reads = {section: parameters_of(cls)[0] for section, cls in classes.items()}
    method_reads = reads.get("method", {"patch_temp", "warmup_patch_temp", "lambda2"})
    data_reads = reads.get("data", {"path", "split"})
    withheld = {
        *(f"teacher.{key}" for key in ("patch_temp", "warmup_patch_temp") if key not in method_reads),
        *(["head.patch_prototypes"] if "lambda2" not in method_reads else []),
        *(f"data.test_{key}" for key in ("path", "split") if "path" not in data_reads),
    }
    for section, cls in sections.items():
        hints = typing.get_type_hints(cls)
        for each in fields(cls):
            dotted = f"{section}.{each.name}"
            if each.name != "arguments" and dotted not in withheld:
                keys[dotted] = Key(hints[each.name], each.default)
        if section in classes:
            own = constructor_keys(section, classes[section])
            passed = timm_keys(names[section]) if section == "backbone" else {}
            if section == "backbone":
                own |= {name: replace(own[name], default=UNSET, idle=True) for name in not_taken(names[section])}
            keys.update({f"{section}.{name}": key for name, key in {**own, **{name: passed[name] for name in passed if name not in own}}.items()})
    keys = {dotted: key for dotted, key in keys.items() if not (dotted in absent or f"{dotted.partition('.')[0]}." in absent)}
    for dotted, default in LABELLED_DEFAULTS.items() if labelled else ():
        keys[dotted] = replace(keys[dotted], default=default)
    return keys, {section: why for section, why in unknown.items() if f"{section}." not in absent}


def check_bounds(key: str, value) -> None:
    """Raises Misread when a number lies outside what its key can mean."""
    values = value if isinstance(value, tuple) else (value,)
    for words, (inside, wanted) in BOUNDS.items():
        if key in wanted.split():
            for each in values:
                if isinstance(each, (int, float)) and not isinstance(each, bool) and not inside(each):
                    raise Misread(f"must be {words}, not {each}")


def unread(key: str, keys: dict[str, Key], sections) -> str:
    """The line for a key that nothing reads: nearest match, and what is accepted there."""
    section, _, name = key.partition(".")
    if key in sections:
        return "a section; write its keys below it, indented"
    if not name:
        homes = [each for each in keys if each.endswith("." + section)]
        if homes:
            return f"no section `{section}`; did you mean `{homes[0]}`?"
        return f"no section `{section}`{nearest(section, sections)}; sections are seed, extends, {', '.join(sections)}"
    if section not in sections:
        return f"no section `{section}`{nearest(section, sections)}; sections are seed, extends, {', '.join(sections)}"
    here = [each.partition(".")[2] for each in keys if each.startswith(section + ".")]
    if not here:
        return "method supervised alone reads this section; leave it out" if f"{section}." in LABELLED else f"method supervised does not read section {section}; leave it out"
    homes = [each for each in keys if each.partition(".")[2] == name]
    near = nearest(name, here) or (f"; did you mean `{homes[0]}`?" if homes else "")
    listed = [each for each in here if keys[f"{section}.{each}"].default is not UNSET]
    owner = next((keys[f"{section}.{each}"].owner for each in here if keys[f"{section}.{each}"].owner), "")
    more = f" and the arguments of timm's {owner}" if owner else ""
    return f"nothing reads this key{near}; section {section} accepts {', '.join(listed)}{more}"
