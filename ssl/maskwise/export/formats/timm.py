"""timm's files (a state dict, with a model name) and folders (config.json and weights, as pushed to the Hub)."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.export.formats.imported_model import SINGLE_NETWORK, ImportedModel
from maskwise.export.formats.research_file import ResearchFile
from maskwise.export.formats.spec_checks import check_arguments, json_object, user_errors
from maskwise.nn.backbones.factory import pretrained_backbone
from maskwise.nn.backbones.feature_maps import FeatureMapBackbone
from maskwise.nn.backbones.generic import GenericBackbone
from maskwise.nn.backbones.pretrained import StateDict
from maskwise.nn.backbones.timm_registry import build_on_meta, timm
from maskwise.nn.transform import CROP_PCT

BACKBONE_SETTINGS = ("image_size", "patch_size", "class_token", "position")
POOLING_ARGUMENTS = ("global_pool", "fc_norm", "use_fc_norm")
IGNORED_ARGUMENTS = ("num_classes", "dynamic_img_size", "dynamic_img_pad", "features_only")
UNUSED = "classifier and tokens of pretraining"
NORM_FIRST = ("SwinTransformer", "SwinTransformerV2", "PoolingVisionTransformer", "MlpMixer")  # norm before pooling


def read(file: ResearchFile, settings: dict) -> ImportedModel:
    """Read a timm file, a state dict or a training file; its model is the training's, else `settings["name"]`.

    Raises UserError without a name or for a mismatch.
    """
    arch, arguments = training_model(file.content)
    if "name" not in settings and arch is None:
        raise UserError(
            f"{file.path} is a timm file and does not say which model it is of: give name=..., such as "
            "name=vit_small_patch16_224"
        )
    options = {**arguments, **{key: settings[key] for key in BACKBONE_SETTINGS if key in settings}}
    model = import_model(settings.get("name", arch), file.networks, str(file.path), options, file.path)
    args = file.content.get("args")
    for key in ("mean", "std"):  # given to timm's training script
        if values := getattr(args, key, None):
            model.spec[key] = [float(value) for value in values]
    model.unused = {**file.unused, **model.unused}
    model.takes = {"name", "patch_size", "class_token", "alias"}
    return model


def training_model(content: dict) -> tuple[str | None, dict]:
    """Return the model's name and arguments that timm's training script stored in a file; (None, {}) without."""
    arch, args = content.get("arch"), content.get("args")
    if not isinstance(arch, str) or not timm.is_model(arch.partition(".")[0]):
        return None, {}
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    stored = args.get("model_kwargs") if isinstance(args.get("model_kwargs"), dict) else {}
    sizes = {"img_size": args["img_size"]} if args.get("img_size") else {}
    pooling = {"global_pool": args["gp"]} if args.get("gp") else {}
    with user_errors(f"arguments of {arch}"):
        return arch, backbone_arguments({**sizes, **pooling, **stored})


def backbone_arguments(arguments: dict) -> dict:
    """Return timm's model arguments under the names of a Backbone, those of timm's pooling included."""
    options = {key: value for key, value in arguments.items() if key not in IGNORED_ARGUMENTS}
    if "img_size" in options:
        options["image_size"] = options.pop("img_size")
    check_arguments(options)
    return options


def recognized(file: ResearchFile) -> bool:
    """Return whether a file has keys found only in timm's transformers, or those of the timm model that it names."""
    state = next(iter(file.networks.values()))
    if {"mask_token", "storage_tokens", "register_tokens"} & state.keys() or file.project:
        return False
    if "reg_token" in state or any(
        key.startswith(("norm_pre.", "fc_norm.", "blocks.0.ls1.", "blocks.0.attn.q_norm", "blocks.0.attn.q_bias"))
        for key in state
    ):
        return True
    arch, arguments = training_model(file.content)
    if arch is None:
        return False
    whole = build_on_meta(arch, **{key: value for key, value in arguments.items() if key != "image_size"})
    return whole is not None and state.keys() <= whole.state_dict().keys()


def is_timm_folder(folder: Path) -> bool:
    """Return whether a folder's config.json names a timm model."""
    return isinstance(json_object(folder / "config.json").get("architecture"), str)


def read_folder(folder: Path, tensors: dict[str, Tensor], weights: Path) -> ImportedModel:
    """Read a folder written by timm; its config.json holds the model's name, arguments, mean and std."""
    config = json_object(folder / "config.json")
    file = ResearchFile.open(tensors, folder)
    with user_errors(folder):
        options = backbone_arguments(config.get("model_args") or {})
        pretrained = config.get("pretrained_cfg") or {}
        stats = {key: [float(value) for value in pretrained[key]] for key in ("mean", "std") if pretrained.get(key)}
        if options.pop("in_chans", 3) != 3:
            options |= stats
        model = import_model(config["architecture"], file.networks, str(folder), options, weights)
        model.spec |= stats
    model.unused = {**file.unused, **model.unused}
    return model


def import_model(
    name: str, networks: dict[str, dict[str, Tensor]], origin: str, options: dict, file: Path | None
) -> ImportedModel:
    """Read networks by role as the timm model `name`, pooled as timm pools it.

    `options`: arguments of a Backbone, and timm's of pooling. Mean and std are those of the model's tag if it has one.
    Raises UserError for weights that do not fit.
    """
    own = {key: value for key, value in options.items() if key not in POOLING_ARGUMENTS}
    states, unused = {}, []
    for role, tensors in networks.items():
        weights = StateDict(origin, tensors)
        refuse_other_patch(name, weights, own)
        backbone = pretrained_backbone(name, weights, **own)
        unused += [key if role == SINGLE_NETWORK else f"{role}.{key}" for key in weights.unused]
        states[role] = {
            key if key.startswith("norm.") else f"backbone.{key}": value for key, value in backbone.state_dict().items()
        }
    backbone.name = name.partition(".")[0]
    pooling, order, note = pooling_of(name, backbone, options)
    spec = {
        "backbone": backbone.spec(),
        "pooling": None if pooling is None else {"name": pooling, "dim": backbone.dim},
        "norm": order,
        "image_size": list(backbone.image_size),
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "crop_pct": CROP_PCT,
    }
    groups = {UNUSED: unused} if unused else {}
    return ImportedModel(origin, "timm", spec, states, unused=groups, file=file, notes=[note] if note else [])


def refuse_other_patch(name: str, weights: StateDict, options: dict) -> None:
    """Raise UserError for a patch of another size than the model's, unless it is asked for: timm would resample it."""
    patch, model = weights.tensors.get("patch_embed.proj.weight"), build_on_meta(name)
    wanted = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if wanted is None or patch is None or patch.ndim != 4 or options.get("patch_size") is not None:
        return
    if tuple(patch.shape[2:]) != tuple(wanted):
        sizes = [" x ".join(map(str, size)) for size in (patch.shape[2:], wanted)]
        raise UserError(
            f"{weights.origin} has patches of {sizes[0]} pixels and {name} has {sizes[1]}: give the name it was "
            f"trained as, or patch_size={patch.shape[2]}"
        )


def pooling_of(name: str, backbone, options: dict) -> tuple[str | None, str, str | None]:
    """Return timm's pooling of a model, the order of pooling and norm, and a note where it is another."""
    if isinstance(backbone, FeatureMapBackbone):
        pooling = "cls" if backbone.has_class_token else "gap"
        return pooling, "before" if backbone.kind in NORM_FIRST else "after", None
    model = build_on_meta(name, **{key: options[key] for key in POOLING_ARGUMENTS if key in options})
    theirs = getattr(model, "global_pool", "token")
    if theirs == "avg":
        return "gap", "before" if isinstance(model.fc_norm, nn.Identity) else "after", None
    if not backbone.has_class_token:
        return None, "after", None
    note = None if theirs in ("token", "") else f"{name} pools by {theirs} in timm; here its class token is the vector"
    return "cls", "after", note


def write(model: ImportedModel, weights: str | None = None) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Return one network as timm's state dict (num_classes=0), and the keys that are left out, by group.

    Raises UserError for a pooling with weights, and for a network without layers that timm's head has.
    """
    role = model.role(weights or "teacher")
    state = model.networks[role]
    if any(key.startswith("pooling.") for key in state):
        raise UserError(
            f"{model.origin} pools with {model.spec['pooling']['name']}, which timm's models lack: "
            "write a folder (--to DIR), which holds it"
        )
    backbone = model.backbone()
    norm = backbone.norm_place if isinstance(backbone, GenericBackbone) else "norm"
    if isinstance(backbone, GenericBackbone) and backbone.head_tensors:
        raise UserError(
            f"{model.origin} lacks {backbone.head_tensors[0]} of timm's head: write a folder (--to DIR), where it is "
            "filled with zeros"
        )
    tensors = {
        key.removeprefix("backbone.").removeprefix("model."): value.clone()
        for key, value in state.items()
        if key.startswith("backbone.") and key != "backbone.mask_token"
    }
    tensors |= {f"{norm}{key[4:]}": value.clone() for key, value in state.items() if key.startswith("norm.")}
    left_out = {"mask token": ["backbone.mask_token"]} if "backbone.mask_token" in state else {}
    return tensors, left_out | model.other_parts(role)
