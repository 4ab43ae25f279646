"""Finding and building timm's models: what is refused is refused in one line that names the nearest that is not."""

from __future__ import annotations

import difflib
import functools
import re
import warnings

import torch
from torch import nn

from maskwise.functional.errors import UserError
from maskwise.functional.torchvision_ready import ready_torchvision

ready_torchvision()
import timm  # noqa: E402
from timm.layers import PatchEmbed  # noqa: E402

from maskwise.nn import convnext, eva, maxvit, mlp, mobilenet, pit, resnet, swin, swin2, vit  # noqa: E402

ANATOMIES = {
    "VisionTransformer": vit, "Eva": eva, "ResNet": resnet, "ConvNeXt": convnext, "SwinTransformer": swin, "PoolingVisionTransformer": pit, "MlpMixer": mlp,
    "EfficientNet": mobilenet, "MaxxVit": maxvit, "SwinTransformerV2": swin2,
}  # fmt: skip
# timm's files that hold models of these classes
SOURCES = {
    "vision_transformer": vit, "deit": vit, "eva": eva, "resnet": resnet, "convnext": convnext, "swin_transformer": swin, "pit": pit, "mlp_mixer": mlp,
    "efficientnet": mobilenet, "maxxvit": maxvit, "swin_transformer_v2": swin2,
}  # fmt: skip
FALLBACK = "vit_small_patch16_224"
OWN_NAMES = {
    "num_classes": "there is no classifier",
    "global_pool": "the encoder's pooling does that",
    "img_size": "say image_size",
    "drop_path_rate": "say drop_path",
    "pretrained": "say weights=FILE",
    "dynamic_img_size": "any size passes anyway",
    "dynamic_img_pad": "resize the images instead",
    "drop_rate": "only drop_path is drawn by key",
    "pos_drop_rate": "only drop_path is drawn by key",
    "patch_drop_rate": "only drop_path is drawn by key",
    "proj_drop_rate": "only drop_path is drawn by key",
    "attn_drop_rate": "only drop_path is drawn by key",
    "drop_block_rate": "only drop_path is drawn by key",
    "strict_img_size": "any size passes anyway",
    "always_partition": "windows are never wider than the map",
    "rope_shift_coords": "crops move the patches already",
    "rope_jitter_coords": "crops scale the patches already",
    "rope_rescale_coords": "crops scale the patches already",
    "weight_init": "the initialisation is the reference's",
    "fix_init": "the initialisation is the reference's",
}


def build(name, image_size, patch_size, class_token, timm_args) -> nn.Module:
    """The bare timm model, or one line on why there is none: raises UserError."""
    check_name(name)
    timm_args = dict(timm_args)
    taken = sorted(set(timm_args) & set(OWN_NAMES))
    if taken:
        raise UserError(f"backbone.{taken[0]} is not to be set: {OWN_NAMES[taken[0]]}")
    if source(name) not in SOURCES:
        refuse(name, misfit(probe(name)))
    anatomy = anatomy_of(name) or vit
    options = asked(name, anatomy, {"image_size": image_size, "patch_size": patch_size, "class_token": class_token})
    own = {key: timm_args.pop(key) for key in getattr(anatomy, "OWN", {}) if key in timm_args}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of its own renamed models
            model = timm.create_model(name, pretrained=False, **anatomy.PLAIN, **options, **timm_args)
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        refuse(name, misfit(probe(name)))
        if fixed := re.search(r"multiple values for keyword argument '(\w+)'", str(error)):
            raise UserError(f"backbone.{fixed[1]} is not to be set: it is part of the name {name}; choose another name") from None
        first = re.sub(r"^\w+\.__init__\(\) ", "", str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise UserError(f"timm cannot build {name} with {said(options, timm_args)}: {first}") from None
    refuse(name, misfit(model))
    if own:
        anatomy.alter(model, **own)
    if class_token is False and hasattr(anatomy, "drop_class_token"):
        anatomy.drop_class_token(model)
    return model


def anatomy_of(name: str):
    """The row of ANATOMIES that stands for a model's file in timm; None for other files and unknown names."""
    return SOURCES.get(source(name)) if timm.is_model(name) else None


def asked(name: str, anatomy, wanted: dict) -> dict:
    """Sizes and class token as the family's class of timm takes them; raises UserError for what it does not have."""
    options = {}
    for key, value in wanted.items():
        if key in anatomy.TAKES:
            if value is not None and anatomy.TAKES[key]:
                options[anatomy.TAKES[key]] = tuple(value) if isinstance(value, list) else value
        elif value and key != "image_size":  # any image passes a map
            raise UserError(f"backbone.{key}={value} is not to be set: {name} has none")
    return options


def own_keys(name: str) -> dict[str, type]:
    """Arguments of ours that a model's family takes besides timm's, with their types."""
    return getattr(anatomy_of(name), "OWN", {})


def keywords_of(name: str):
    """The timm class whose constructor takes what a recipe passes on; of a model that is refused later the class that it is, if it can be built."""
    if source(name) in SOURCES:
        return SOURCES[source(name)].CLASS
    found = probe(name)
    return vit.CLASS if found is None else type(found)


def said(*options: dict) -> str:
    """Options as a user wrote them."""
    return ", ".join(f"{key}={value}" for each in options for key, value in each.items()) or "these arguments"


def check_name(name: str) -> None:
    """Raises UserError for a name that timm does not know."""
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), 3, 0.5)
    hint = f"the nearest are {', '.join(near)}" if near else f"one it has is {FALLBACK}"
    raise UserError(f"timm has no model {name!r}; {hint}")


def source(name: str) -> str:
    """The file of timm that holds a model."""
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def probe(name: str, **options):
    """The model as timm builds it by default, without memory; None where it cannot be built so."""
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return timm.create_model(name, pretrained=False, **options)
    except Exception:  # whatever a model of another family raises without storage, it is not one of ours
        return None


def shallow(name: str):
    """A model of one of our files with as few blocks as it takes to see what it is made of."""
    found = probe(name, **SOURCES.get(source(name), vit).SHALLOW)
    return probe(name) if found is None else found


def misfit(model) -> str | None:
    """What keeps a timm model from being a backbone here; None if nothing does."""
    if model is None:
        return "it is of another family"
    anatomy = ANATOMIES.get(type(model).__name__)
    if anatomy is None or type(model) is not anatomy.CLASS:
        return f"its class is {type(model).__name__}"
    for block in anatomy.blocks(model):
        if type(block) not in anatomy.BLOCKS:
            return f"its blocks are {type(block).__name__}"
        if hasattr(block, "attn") and type(block.attn) not in anatomy.ATTENTIONS:
            return f"its attention is {type(block.attn).__name__}"
        for name, kinds in getattr(anatomy, "PIECES", {}).items():
            if type(getattr(block, name)) not in kinds:
                return f"its blocks are made of {type(getattr(block, name)).__name__}"
    if hasattr(model, "patch_embed") and type(model.patch_embed) not in getattr(anatomy, "STEMS", (PatchEmbed,)):
        return f"its stem is {type(model.patch_embed).__name__}"
    return None


@functools.lru_cache(maxsize=1)
def candidates() -> tuple[str, ...]:
    """Names in the files of timm that hold our classes; not each of them is supported."""
    return tuple(each for each in timm.list_models() if source(each) in SOURCES)


def refuse(name: str, reason: str | None) -> None:
    """Raises UserError where there is a reason."""
    if reason is None:
        return
    near = (each for each in difflib.get_close_matches(name, candidates(), 8, 0.6) if misfit(shallow(each)) is None)
    raise UserError(
        f"{name} is not supported: {reason}; backbones are VisionTransformer and Eva models of plain blocks on a PatchEmbed stem, ResNet, ConvNeXt, EfficientNet (MobileNet V1, V2), Swin (V1, V2), MaxViT, PiT, ResMLP and MLP-Mixer, "
        f"the nearest is {next(near, FALLBACK)}"
    )
