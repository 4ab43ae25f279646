"""Keys of a recipe: the fields of its sections, and the constructor arguments of the classes that it names."""

from __future__ import annotations

import difflib
import functools
import typing
from dataclasses import dataclass, fields, replace
from typing import Annotated

from maskwise.bounds import Above, AtLeast
from maskwise.errors import UserError
from maskwise.process.external_code import NoClass, external_class
from maskwise.recipe.sections import SECTIONS, NamedSection
from maskwise.recipe.signatures import parameters_of, value_type

REQUIRED = object()
UNSET = object()
NAMED_SECTIONS = tuple(section for section, cls in SECTIONS.items() if issubclass(cls, NamedSection))

# timm arguments that are classes, belong to its classifier, or would not fit RGB images
NOT_FOR_RECIPES = {
    "block_fn",
    "block",
    "aa_layer",
    "block_args",
    "device",
    "dtype",
    "head_norm_first",
    "head_hidden_size",
    "embed_layer",
    "mlp_layer",
    "fc_norm",
    "final_norm",
    "pool_include_prefix",
    "in_chans",
    "use_fc_norm",
    "attn_pool_num_heads",
    "attn_pool_mlp_ratio",
    "head_init_scale",
}
# sections whose classes are ours alone: an optimizer has to skip bad steps and to name its moments
OURS_ALONE = ("optimizer",)
# timm annotates no bounds: those of its arguments that a recipe is likely to set
TIMM_BOUNDS = {"depth": AtLeast(1), "embed_dim": AtLeast(1), "num_heads": AtLeast(1), "mlp_ratio": Above(0)}

TEMPERATURES = ("temp", "warmup_temp", "warmup_temp_epochs")
# keys read by only one of the two kinds of methods, and defaults that supervised training changes
SELF_SUPERVISED_KEYS = (
    "crops.",
    "head.",
    "masking.",
    "teacher.momentum_end",
    "teacher.temp",
    "teacher.warmup_temp",
    "teacher.warmup_temp_epochs",
    "teacher.patch_temp",
    "teacher.warmup_patch_temp",
    "optimizer.freeze_last_layer",
    "evaluate.pictures_every",
    "method.start_head",
    "method.head_warmup_epochs",
)
SUPERVISED_KEYS = ("augment.", "classifier.", "evaluate.top1_every")
HEADLESS_KEYS = ("head.", "optimizer.freeze_last_layer", "method.start_head")  # of methods with a projection head
SUPERVISED_DEFAULTS = {
    "teacher.momentum": None,
    "evaluate.knn_every": 0,
    "evaluate.top1_every": 1,
    "optimizer.min_lr": 0.0,
    "optimizer.clip": None,
}
# values of keys that supervised training does not read
SUPERVISED_CONSTANTS = {
    "teacher.momentum_end": None,
    "optimizer.freeze_last_layer": 0,
    "evaluate.pictures_every": 0,
    "method.start_head": "fresh",
    "method.head_warmup_epochs": 0.0,
}


@dataclass(frozen=True)
class Key:
    """One key of a recipe: its type, and its default (REQUIRED, or UNSET: not recorded unless given).

    owner: the timm class that receives a key of section backbone; unused: the named model has no use for the key, so
    that only its default is accepted and a parent's value is not inherited.
    """

    type: object
    default: object
    owner: str = ""
    unused: bool = False


class Unknown(Exception):
    """A name that is not in its table; the text lists the table."""


def tables() -> dict[str, dict[str, type]]:
    """Return the table that the `name` of each section is looked up in."""
    from maskwise.data.datasets import DATASETS
    from maskwise.engine.optim import OPTIMIZERS
    from maskwise.methods import METHODS
    from maskwise.methods.masking import MASKINGS
    from maskwise.nn import CLASSIFIERS, POOLINGS

    return {
        "data": DATASETS,
        "pooling": POOLINGS,
        "classifier": CLASSIFIERS,
        "method": METHODS,
        "masking": MASKINGS,
        "optimizer": OPTIMIZERS,
    }


def named(section: str, name: str) -> type:
    """Return the class of a name: an entry of the section's table, or `module:Name`. Raises Unknown."""
    if section == "backbone":
        import timm

        from maskwise.nn import Backbone  # before timm, which it readies

        if ":" in name:
            own_network(name)
            return Backbone
        if not timm.is_model(name):
            near = nearest(name, timm.list_models())
            known = "`timm.list_models('vit_*')` lists them; your own is module:Class"
            raise Unknown(f"timm has no model `{name}`{near}; {known}")
        return Backbone
    table = tables()[section]
    if name in table:
        return table[name]
    if ":" in name and section not in OURS_ALONE:
        try:
            return external_class(name)
        except NoClass as error:
            raise Unknown(str(error)) from None
    own = "" if section in OURS_ALONE else ", and your own as module:Name"
    raise Unknown(f"no {section} `{name}`{nearest(name, table)}; there are {', '.join(table)}{own}")


def own_network(name: str) -> type:
    """Return the class of a backbone `module:Class`; raises Unknown."""
    from maskwise.nn.backbones.external import network_class

    try:
        return network_class(name)
    except UserError as error:
        raise Unknown(str(error)) from None


def learns_labels(method: str) -> bool:
    """Return whether a method is supervised; an external class need not declare it."""
    return getattr(named("method", method), "learns_labels", False)


def nearest(word: str, choices) -> str:
    """Return `; did you mean ...?` when something close exists."""
    near = close(word, choices)
    return "" if near is None else f"; did you mean `{near}`?"


def close(word: str, choices) -> str | None:
    """Return the choice most similar to a word, None where none is close."""
    return next(iter(difflib.get_close_matches(word, list(choices), 1, 0.6)), None)


def constructor_keys(section: str, cls: type) -> dict[str, Key]:
    """Return the keys of a section that are arguments of the constructor of `cls`."""
    parameters, hints = parameters_of(cls)
    supplied, defaults = SECTIONS[section].set_by_build, SECTIONS[section].defaults
    keys = {}
    for name, parameter in parameters.items():
        if name in supplied:
            continue
        default = REQUIRED if parameter.default is parameter.empty else defaults.get(name, parameter.default)
        if default is None:  # a class may leave a default to its subclasses
            default = getattr(cls, f"default_{name}", None)
        keys[name] = Key(value_type(hints.get(name), default), default)
    return keys


@functools.lru_cache
def timm_keys(name: str) -> dict[str, Key]:
    """Return the keys of section backbone that go to the class of timm's model `name`, all UNSET."""
    from maskwise.nn.backbones.timm_registry import REFUSED_ARGUMENTS, extra_arguments, family_of, timm_class

    family, cls = family_of(name), timm_class(name)
    parameters, hints = parameters_of(cls)
    withheld = {*REFUSED_ARGUMENTS, *NOT_FOR_RECIPES, *(family.set_by_name if family else ())}
    keys = {}
    for parameter in parameters.values():
        if parameter.name not in withheld:
            hint = value_type(hints.get(parameter.name), parameter.default)
            if parameter.name in TIMM_BOUNDS:
                hint = Annotated[hint, TIMM_BOUNDS[parameter.name]]
            keys[parameter.name] = Key(hint, UNSET, cls.__name__)
    return {**keys, **{own: Key(hint, UNSET, cls.__name__) for own, hint in extra_arguments(name).items()}}


def not_taken(name: str) -> set[str]:
    """Return the arguments of Backbone that the family of a timm model, or an own network, has no use for."""
    from maskwise.nn.backbones.families.base import FeatureMapFamily
    from maskwise.nn.backbones.families.generic import GenericFamily, generic_family
    from maskwise.nn.backbones.timm_registry import family_of

    family = generic_family(own_network(name), True) if ":" in name else family_of(name)
    if isinstance(family, GenericFamily):
        return {"patch_size", "position", "drop_path"} - {*family.timm_names}
    if not isinstance(family, FeatureMapFamily):
        return set()
    return {"patch_size", "class_token", "position"} - {*family.timm_names}


def schema(names: dict[str, str], refused: dict[str, str]) -> tuple[dict[str, Key], dict[str, str]]:
    """Return the dotted keys of a recipe with these names, and the reason for each name that is unknown.

    `refused` holds the reasons of sections whose name is not looked up.
    """
    unknown = dict(refused)
    classes: dict[str, type] = {}
    for section in NAMED_SECTIONS:
        if section in refused:
            continue
        try:
            classes[section] = named(section, names[section])
        except Unknown as error:
            unknown[section] = str(error)
    labeled = "method" in classes and learns_labels(names["method"])
    absent = () if "method" not in classes else SELF_SUPERVISED_KEYS if labeled else SUPERVISED_KEYS
    if "method" in classes and not labeled and "head" not in parameters_of(classes["method"])[0]:
        absent = (*absent, *HEADLESS_KEYS)
    withheld = withheld_keys(classes)
    keys = {"seed": Key(Annotated[int, AtLeast(0)], 0)}
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls, include_extras=True)
        for own in fields(cls):
            if own.name != "arguments":
                keys[f"{section}.{own.name}"] = Key(hints[own.name], own.default)
        if section in classes:
            keys.update(
                {f"{section}.{name}": key for name, key in argument_keys(section, classes[section], names).items()}
            )
    keys = {dotted: key for dotted, key in keys.items() if dotted not in withheld and not is_among(dotted, absent)}
    for dotted, default in SUPERVISED_DEFAULTS.items() if labeled else ():
        keys[dotted] = replace(keys[dotted], default=default)
    return keys, {section: why for section, why in unknown.items() if f"{section}." not in absent}


def is_among(dotted: str, listed: tuple[str, ...]) -> bool:
    """Return whether a key, or its whole section, is in a list of keys."""
    return dotted in listed or f"{dotted.partition('.')[0]}." in listed


def withheld_keys(classes: dict[str, type]) -> set[str]:
    """Return the section fields that the method and the dataset of a recipe have no use for."""
    reads = {section: parameters_of(cls)[0] for section, cls in classes.items()}
    method_reads = reads.get("method", {"patch_temp", "warmup_patch_temp", "lambda2"})
    data_reads = reads.get("data", {"path", "split"})
    return {
        *(f"teacher.{key}" for key in ("patch_temp", "warmup_patch_temp") if key not in method_reads),
        *(f"teacher.{key}" for key in TEMPERATURES if "method" in reads and "teacher_temp" not in method_reads),
        *(["head.patch_prototypes"] if "lambda2" not in method_reads else []),
        *(f"data.test_{key}" for key in ("path", "split") if "path" not in data_reads),
    }


def argument_keys(section: str, cls: type, names: dict[str, str]) -> dict[str, Key]:
    """Return the keys of a section that are arguments of the named class, in section backbone also those of timm's."""
    own = constructor_keys(section, cls)
    if section != "backbone":
        return own
    own |= {name: replace(own[name], default=UNSET, unused=True) for name in not_taken(names[section])}
    if ":" in names[section]:
        theirs = constructor_keys(section, own_network(names[section]))
        return {**own, **{name: key for name, key in theirs.items() if name not in own and name != "in_chans"}}
    return {**own, **{name: key for name, key in timm_keys(names[section]).items() if name not in own}}


def meant(key: str, keys: dict[str, Key]) -> str | None:
    """Return the key that `unread` suggests for one that nothing reads, None without a suggestion."""
    section, _, name = key.partition(".")
    if not name:
        return next((dotted for dotted in keys if dotted.endswith("." + section)), None)
    if section not in SECTIONS:
        near = close(section, SECTIONS)
        inside = f"{near}.{name}"
        return None if near is None else inside if inside in keys else meant(inside, keys)
    here = [dotted.partition(".")[2] for dotted in keys if dotted.startswith(section + ".")]
    near = close(name, here)
    if near is not None:
        return f"{section}.{near}"
    return next((dotted for dotted in keys if here and dotted.partition(".")[2] == name), None)


def unread(key: str, keys: dict[str, Key]) -> str:
    """Return the line for a key that nothing reads: the nearest match, and the accepted keys."""
    section, _, name = key.partition(".")
    if key in SECTIONS:
        return "a section; write its keys below it, indented"
    if not name:
        homes = [dotted for dotted in keys if dotted.endswith("." + section)]
        if homes:
            return f"no section `{section}`; did you mean `{homes[0]}`?"
    if section not in SECTIONS:
        return f"no section `{section}`{nearest(section, SECTIONS)}; sections are seed, extends, {', '.join(SECTIONS)}"
    here = [dotted.partition(".")[2] for dotted in keys if dotted.startswith(section + ".")]
    if not here:
        return (
            "method supervised alone reads this section; leave it out"
            if f"{section}." in SUPERVISED_KEYS
            else f"method supervised does not read section {section}; leave it out"
        )
    homes = [dotted for dotted in keys if dotted.partition(".")[2] == name]
    near = nearest(name, here) or (f"; did you mean `{homes[0]}`?" if homes else "")
    listed = [accepted for accepted in here if keys[f"{section}.{accepted}"].default is not UNSET]
    owner = next((keys[f"{section}.{accepted}"].owner for accepted in here if keys[f"{section}.{accepted}"].owner), "")
    more = f" and the arguments of timm's {owner}" if owner else ""
    return f"nothing reads this key{near}; section {section} accepts {', '.join(listed)}{more}"
