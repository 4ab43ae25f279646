"""The heads of released MAP files: multi-token attention pooling and its classifiers under the reference's names.

The names are those of its public source (Lab-LVM/imagenet-models, MAP/models/map.py; pooling.md 3.1 and 6); no released file was at hand.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from maskwise.export import map_networks
from maskwise.export.specs import told
from maskwise.export.trained_classifier import TrainedClassifier
from maskwise.functional.errors import UserError
from maskwise.nn.classifiers import CLASSIFIERS

INDEX = "gram_token_extraction.bp_index"  # where the triangle's entries lie: a function of its width
FRONTS = ("head.", "fc.")
PLACES = (  # the beginning of a name there and here; {} is the number of a group, or of a token in it
    ("mmcap.multi_scale.concat_conv.", "fuse.join."),
    ("mmcap.channel_convertor.", "fuse.join."),
    ("mmcap.mmcap.{}.gram_token_extraction.ch_reduction.", "map.groups.{}.source.reduce."),
    ("mmcap.mmcap.{}.gram_token_extraction.bp_reduction.", "map.groups.{}.source.expand."),
    ("mmcap.mmcap.{}.x_cls", "map.groups.{}.source.token"),
    ("mmcap.mmcap.{}.attention.0.attn.w1.", "map.groups.{}.block.attention.before."),
    ("mmcap.mmcap.{}.attention.0.attn.w2.", "map.groups.{}.block.attention.after."),
    ("mmcap.mmcap.{}.attention.0.attn.", "map.groups.{}.block.attention."),
    ("mmcap.mmcap.{}.attention.0.", "map.groups.{}.block."),
    ("heads.{}.norm.{}.", "heads.{}.norms.{}."),
    ("heads.{}.head.{}.", "heads.{}.heads.{}."),
    ("heads.{}.norm.", "heads.{}.norm."),
    ("heads.{}.head.", "heads.{}.head."),
    ("heads.{}.", "heads.{}.head."),  # a plain linear layer
    ("self_dt_heads.{}.", "averaged_heads.{}."),
)


def moved(key: str, back: bool = False) -> str | None:
    """A name there as ours, or with `back` ours as theirs; None where nothing begins so."""
    for pair in PLACES:
        start, end = pair[::-1] if back else pair
        found = re.match(re.escape(start).replace(r"\{\}", r"(\d+)"), key)
        if found:
            return end.format(*found.groups()) + key[found.end() :]
    return None


def take(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move a MAP head's tensors out of `state`, under their own names; {} where there is none."""
    front = next((front for front in FRONTS if any(key.startswith(f"{front}mmcap.") for key in state)), None)
    return {} if front is None else {key: state.pop(key) for key in list(state) if key.startswith(front)}


def fill_norm(state: dict[str, Tensor], kind: str) -> list[str]:
    """Give a network the final norm that MAP's has not, as 1 and 0; what was missing."""
    width = map_networks.last_width(state, kind)
    if "norm.weight" in state or width is None:
        return []
    state["norm.weight"], state["norm.bias"] = torch.ones(width), torch.zeros(width)
    return ["norm.weight and norm.bias (MAP reads no final norm: 1 and 0)"]


def read(taken: dict[str, Tensor], encoder: nn.Module, path: Path, overrides: dict) -> tuple[TrainedClassifier, list[str], list[str]]:
    """A head's tensors as a classifier of `encoder` (which may be on the meta device), the keys that hold nothing learned, and what no tensor tells.

    Raises UserError, naming a key of the file, for one that has no place here, is missing or of another shape.
    """
    front = next(iter(taken)).partition(".")[0] + "."
    state, index = {}, [key for key in taken if key.endswith(INDEX)]
    names = {}
    for key, value in taken.items():
        if key in index:
            continue
        ours = moved(key[len(front) :])
        if ours is None:
            raise UserError(f"{path}: {key} has no place in a MAP classifier of this project; rename it with alias=THEIRS=OURS if it is another name of a part that has one")
        flat = ".mlp.fc" in ours and value.ndim == 4
        state[f"head.{ours}"], names[f"head.{ours}"] = value.flatten(2) if flat else value, key
    try:
        options, count, notes = options_of({key.removeprefix("head."): value for key, value in state.items()}, any("multi_scale" in key for key in taken), overrides)
    except KeyError as error:
        raise UserError(f"{path} lacks {front}{moved(error.args[0], back=True)}: its MAP head is not whole") from None
    for key in index:
        width = options["gram_width"]
        if not torch.equal(taken[key].flatten(), torch.triu_indices(width, width, device=taken[key].device)[0] * width + torch.triu_indices(width, width)[1]):
            raise UserError(f"{path}: {key} is not the upper triangle of a matrix {width} wide, row by row: this is another MAP than is known here")
    with told(path), torch.device("meta"):
        own = CLASSIFIERS["map"](encoder, count, **options).state_dict()
    for key, value in state.items():
        if key not in own:
            raise UserError(f"{path}: {names[key]} has no place in a MAP classifier of this project")
        if value.shape != own[key].shape:
            raise UserError(f"{path}: {names[key]} is {list(taken[names[key]].shape)} there and {list(own[key].shape)} here: its parts do not belong together, or to this network")
    for key in own:
        if key not in state:
            raise UserError(f"{path} lacks {front}{moved(key.removeprefix('head.'), back=True)}: its MAP head is not whole")
    return TrainedClassifier(str(path), "map", options, count, None, state), index, notes


def options_of(state: dict[str, Tensor], several: bool, overrides: dict) -> tuple[dict, int, list[str]]:
    """The arguments of a MAPClassifier with these tensors over `several` stages or the last, the number of classes, and what no tensor tells; KeyError for one that is missing."""
    first = "map.groups.0."
    gram = any(key.startswith(f"{first}source.reduce.") for key in state)
    dim, embed = state[f"{first}block.norm1.weight"].shape[0], state[f"{first}block.attention.q.weight"].shape[0]
    hidden, inside = state[f"{first}block.mlp.fc1.weight"].shape[:2]
    light = not any(key.startswith("heads.") for key in state)
    split = "heads.0.norms.0.weight" in state or "heads.0.heads.0.weight" in state
    averages = any(key.startswith("averaged_heads.") for key in state)
    talking = f"{first}block.attention.before.weight" in state
    usual = max(1, dim // 32)
    heads = state[f"{first}block.attention.before.weight"].shape[0] if talking else overrides.get("pooling_heads", usual)
    classes = state["averaged_heads.0.head.bias" if light else "heads.0.heads.0.bias" if split else "heads.0.head.bias"].shape[0]
    options = {
        "layers": None if several else [-1],
        "dim": dim, "groups": 1 + max(int(key.split(".")[2]) for key in state if key.startswith("map.groups.")), "gram": gram, "embed": embed, "heads": heads,
        "talking": talking, "average": "mean" if averages else None, "mlp_ratio": hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim,
        "mlp_groups": dim // inside, "head": "split" if split else "joint", "norm": light or split or "heads.0.norm.weight" in state, "light": light,
    }  # fmt: skip
    if gram:
        width, expand = state[f"{first}source.reduce.0.weight"].shape[0], state[f"{first}source.expand.0.weight"]
        options |= {"tokens": expand.shape[0] // dim, "gram_width": width, "gram_groups": width * (width + 1) // 2 // expand.shape[1]}
    else:
        options["tokens"] = state[f"{first}source.token"].shape[1]
    granted = "resampling, the grid of the last stage but one and keys of tokens and pixels are the reference's"
    notes = [f"no tensor tells: {'' if talking or 'pooling_heads' in overrides else f'{usual} heads of attention are a guess (else pooling_heads=), '}{granted}"]
    return options, classes, notes
