"""Structure shared by research training files: networks by role, key prefixes, aliases, unused keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from maskwise.errors import UserError
from maskwise.export.formats import key_beginnings
from maskwise.export.formats.imported_model import SINGLE_NETWORK
from maskwise.nn.backbones.pretrained import strip_prefixes

ROLES = {  # entry of a file -> role
    "teacher": "teacher",
    "state_dict_ema": "teacher",
    "model_ema": "teacher",
    "student": "student",
    "state_dict": "student",
    "model": "student",
}
CENTERS = {"dino_loss": {"center": "center"}, "ibot_loss": {"center": "center", "center2": "patch_center"}}
IMAGENET_STATS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
OTHER_ENTRIES = "other entries of the file"


@dataclass
class ResearchFile:
    """A weights file of any project: its networks by role under the names in the file, without names of wrappers.

    `content` is the whole file, `unused` its keys that belong to no network, by group, `project` the one whose training
    code wrote it, "" if its keys do not tell.
    """

    path: Path
    content: dict
    networks: dict[str, dict[str, Tensor]]
    unused: dict[str, list[str]] = field(default_factory=dict)
    project: str = ""

    @classmethod
    def open(cls, content: dict, path: Path, alias=()) -> ResearchFile:
        """Find the networks in a file; raises UserError if there is none, or an alias matches no key."""
        chosen, rest = _entries(content, path)
        unused: dict[str, list[str]] = {OTHER_ENTRIES: rest} if rest else {}
        project, networks = "", {}
        for role in sorted(chosen, key=lambda role: role != "teacher"):
            state = strip_prefixes(chosen[role], ("module",))
            if chosen[role] is not content:
                add_unused(
                    unused, "no tensors", [k for k, value in state.items() if not isinstance(value, Tensor)], role
                )
            state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            if part := next((key for key in state if key.rpartition(".")[2] in ("_flat_param", "flat_param")), None):
                raise UserError(
                    f"{path} holds {part}, a part of FSDP's flattened parameters, and not the network: give the "
                    "teacher_checkpoint.pth of its evaluations, or gather the parameters in the code that wrote it"
                )
            if role == SINGLE_NETWORK:
                project, found, parts = key_beginnings.split(state)
            else:
                network, beside = key_beginnings.inside(state)
                found, parts = {role: network}, key_beginnings.by_part(beside)
            networks |= found
            for name, keys in parts.items():
                add_unused(unused, name, keys, role)
        if project == "lightly_train" and _differ(networks):  # a distillation's teacher is another network
            teacher = networks.pop("teacher")
            add_unused(unused, "the teacher, another network", teacher, "teacher")
            networks = {SINGLE_NETWORK: networks["student"]}
        networks = {role: apply_aliases(state, alias, path) for role, state in networks.items()}
        return cls(path, content, networks, unused, project)


def _differ(networks: dict[str, dict[str, Tensor]]) -> bool:
    """Return whether two networks have different tensors, mask tokens aside."""
    shapes = [{key: value.shape for key, value in state.items() if key != "mask_token"} for state in networks.values()]
    return len(shapes) == 2 and shapes[0] != shapes[1]


def _entries(content: dict, path: Path) -> tuple[dict[str, dict], list[str]]:
    """Return the state dicts in a file by role, and the names of its other entries."""
    nested = [
        key
        for key, value in content.items()
        if isinstance(value, dict) and any(isinstance(entry, Tensor) for entry in value.values())
    ]
    entries = [key for key in ROLES if key in nested]
    if not entries and (set(nested) - set(CENTERS)):
        raise UserError(
            f"{path} has no teacher, student or state_dict; it has {', '.join(map(str, content))}: "
            "is it an encoder's file?"
        )
    if not entries:
        return {SINGLE_NETWORK: content}, [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if len(entries) == 1 and entries[0] not in ("teacher", "student"):
        chosen = {SINGLE_NETWORK: entries[0]}
    else:
        chosen = {ROLES[key]: key for key in reversed(entries)}
    rest = [str(key) for key in content if key not in chosen.values()]
    return {role: content[key] for role, key in chosen.items()}, rest


def apply_aliases(state: dict[str, Tensor], alias, path: Path) -> dict[str, Tensor]:
    """Rename key prefixes THEIRS to OURS for each "THEIRS=OURS"; raises UserError for an alias without a match."""
    for pair in (alias,) if isinstance(alias, str) else alias:
        theirs, equals, ours = str(pair).partition("=")
        if not equals or not any(key.startswith(theirs) for key in state):
            example = next(iter(state), "norm_old.")
            raise UserError(
                f"{path}: alias {pair} matches no key; write THEIRS=OURS with the beginning of a key, such as {example}"
            )
        state = {ours + key[len(theirs) :] if key.startswith(theirs) else key: value for key, value in state.items()}
    return state


def take(state: dict[str, Tensor], wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Move the entries with wanted keys out of `state`."""
    return {key: state.pop(key) for key in list(state) if wanted(key)}


def add_unused(unused: dict[str, list[str]], group: str, keys: Iterable, role: str) -> None:
    """Add keys to a group of unused keys, prefixed by the role where a file has two networks."""
    keys = [str(key) if role == SINGLE_NETWORK else f"{role}.{key}" for key in keys]
    if keys:
        unused.setdefault(group, []).extend(keys)
