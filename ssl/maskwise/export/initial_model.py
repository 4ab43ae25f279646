"""`InitialModel`: the model that a run continues from (method.start_from)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.export import load
from maskwise.export.formats import projection_heads as head_keys
from maskwise.export.formats.imported_model import SINGLE_NETWORK, ImportedModel, KeyReport
from maskwise.export.model_location import KEY, locate
from maskwise.nn.backbones.factory import Backbone
from maskwise.nn.backbones.pretrained import mismatch_text
from maskwise.nn.encoder import Encoder, pooling_name

MAX_WARMUP_SHARE = 0.2  # of the run: longest head warm-up chosen by default
BACKBONE_KEYS = {  # recipe key -> attribute of a backbone
    "backbone.embed_dim": "dim",
    "backbone.depth": "depth",
    "backbone.num_heads": "num_heads",
    "backbone.patch_size": "patch_size",
}
STORING = ("run", "export", "timm", "transformers")  # layouts that store num_heads


class InitialModel:
    """Input statistics, position table, weights and heads of the model that a run continues from.

    `spec` describes its encoder; `source` holds its tensors, None when the run continues from its own checkpoint.
    After `load_into`: `matching` reports the keys, `head` is "kept" or the reason for a fresh head, `fresh_pooling`
    tells whether the pooling starts from random weights.
    """

    def __init__(self, name: str, spec: dict, source: ImportedModel | None = None, record: dict | None = None):
        record = record or {}
        self.name = name
        self.spec = spec
        self.source = source
        self.head: str = record.get("head", "")
        self.fresh_pooling: bool = record.get("fresh_pooling", False)
        self.digest: str = record.get("sha256", "")
        self.matching: KeyReport | None = None
        self.notes: list[str] = []

    @classmethod
    def open(cls, name: str, *, backbone: str, gamma: float | None = 1.25) -> InitialModel:
        """Read an initial model: a run or exported folder, a file of any layout, a timm name, or hub:OWNER/NAME.

        `backbone` (the timm name of a file's model) and `gamma` (SimPool's exponent) are used if a file lacks them.
        A timm name is read from the local cache. Raises UserError for a model that is missing or cannot be read.
        """
        path, timm_name = locate(name)
        if timm_name is not None:
            source = load.read_cached_timm(timm_name, path)
        else:
            source = load.read(path, defaults={"unstored_gamma": gamma, "name": backbone})
        source.origin = f"{KEY} {name}"
        initial = cls(name, source.spec, source)
        initial.digest = source.sha256()
        return initial

    @classmethod
    def from_record(cls, record: dict) -> InitialModel:
        """Return the initial model of a run that continues from its own checkpoint, from its `record`."""
        return cls(record["name"], record["spec"], None, record)

    def record(self) -> dict:
        """Return the entry of run.json: what continuing the run needs, and the key report."""
        matching = self.matching or KeyReport({})
        return {
            "name": self.name,
            "file": "" if self.source is None or self.source.file is None else str(self.source.file),
            "sha256": self.digest,
            "layout": "" if self.source is None else self.source.layout,
            "matched": matching.matched,
            "missing": matching.missing,
            "unused": matching.unused,
            "head": self.head,
            "fresh_pooling": self.fresh_pooling,
            "notes": self.notes,
            "spec": self.spec,
        }

    def image_size(self, requested) -> tuple[int, int]:
        """Return the image size of the initial model's position table, in pixels.

        Raises UserError if another size is requested.
        """
        own = tuple(self.spec["backbone"]["image_size"])
        if requested is not None and own != ((requested,) * 2 if isinstance(requested, int) else tuple(requested)):
            raise UserError(
                f"backbone.image_size={requested}, but {KEY} has a position table of {own[0]} x {own[1]} pixels, which "
                "is kept and resampled for each crop: leave backbone.image_size out"
            )
        return own

    def adopt_input_stats(self, encoder: Encoder) -> Encoder:
        """Give an encoder the initial model's mean, std and position resampling."""
        if self.source is None or not self.source.assumed_stats:
            encoder.mean, encoder.std = tuple(self.spec["mean"]), tuple(self.spec["std"])
        position = self.spec["backbone"].get("position", encoder.backbone.position)
        if position != encoder.backbone.position:
            self._note(
                f"positions are resampled as in the start model (`{position}`, not `{encoder.backbone.position}`)"
            )
            encoder.backbone.position = position
        return encoder

    def check(self, encoder: Encoder) -> None:
        """Raise UserError, with the differences and the keys to set, unless the networks are equal."""
        self._check_backbone(encoder.backbone)
        self._check_pooling(encoder)

    def _check_backbone(self, own: nn.Module) -> None:
        spec, source = self.spec, self.source
        if source.layout not in STORING and "num_heads" in spec["backbone"]:
            self._settle_num_heads(own)
        with torch.device("meta"):
            theirs = Backbone(**spec["backbone"])
        differing = {
            key: (getattr(theirs, name), getattr(own, name))
            for key, name in BACKBONE_KEYS.items()
            if getattr(theirs, name) != getattr(own, name)
        }
        if differing:
            differences = ", ".join(
                f"{key.partition('.')[2]} {_size_text(there)} there and {_size_text(here)} here"
                for key, (there, here) in differing.items()
            )
            name = [f"backbone.name={theirs.name}"] if theirs.name != own.name else []
            remedy = " ".join([*name, *(f"{key}={_size_text(there)}" for key, (there, _) in differing.items())])
            raise UserError(
                f"{source.origin} does not fit the recipe's backbone {own.name}: {differences}; set {remedy}"
            )
        if own.has_class_token and not theirs.has_class_token:
            raise UserError(
                f"{source.origin} has no class token and the recipe's backbone has one: "
                "set pooling.name=simpool and backbone.class_token=false"
            )

    def _settle_num_heads(self, own: nn.Module) -> None:
        """Take the recipe's number of heads where it says one, or where the size tells none."""
        backbone = self.spec["backbone"]
        said = "num_heads" in own.timm_args and backbone["embed_dim"] == own.dim
        if said or backbone["num_heads"] is None:
            backbone["num_heads"] = own.num_heads if backbone["embed_dim"] % own.num_heads == 0 else 1

    def _check_pooling(self, encoder: Encoder) -> None:
        pooling = self.spec["pooling"] or {}
        if not pooling.get("name") == pooling_name(encoder.pooling) == "simpool":
            return
        own = encoder.pooling.arguments()
        settings = [(key, pooling.get(key, False), own[key]) for key in ("num_heads", "beta", "learn_gamma")]
        for key, there, here in (("norm", self.spec["norm"], encoder.norm_order), *settings):
            if there != here:
                raise UserError(
                    f"{self.source.origin} does not fit the recipe's pooling: {key} is {_yaml(there)} there and "
                    f"{_yaml(here)} here; set pooling.{key}={_yaml(there)}"
                )
        for key in ("gamma", "min_scope"):
            there, here = pooling[key], getattr(encoder.pooling, key)
            if there != here:
                self._note(f"pooling.{key} is {_yaml(here)} as in the recipe; the start model had {_yaml(there)}")

    def load_into(self, model: nn.Module, head: str = "auto") -> None:
        """Load the weights into a method's student and teacher; a single network is loaded into both.

        With head="auto" projection heads and centers are loaded if they fit, with "fresh" they are not.
        Raises UserError if the networks differ, or the projection heads have different shapes.
        """
        source = self.source
        self.check(model.student.encoder)
        matched: dict[str, int] = {}
        missing: list[str] = []
        unused = {group: list(keys) for group, keys in source.unused.items()}
        unused.setdefault("classifier", []).extend(key for saved in source.classifiers.values() for key in saved.state)
        networks = {role: getattr(model, role) for role in ("student", "teacher") if hasattr(model, role)}
        for role, network in networks.items():
            state, absent, left_out = self._adapted(_state_for(role, source.networks), network.encoder)
            network.encoder.load_state_dict(state)
            matched[role] = len(state) - len(absent)
            missing += [f"{role}.encoder.{key}" for key in absent if role == "student"]
            if left_out:
                unused.setdefault("not in this network", []).extend(f"{role}.{key}" for key in left_out)
        self.head = self._head_status(model, head)
        if self.head == "kept":
            self._load_heads(model, networks, matched, unused)
        else:
            missing.append("the projection head")
            head_names = [f"{role}.head.{key}" for role, state in source.heads.items() for key in state]
            unused.setdefault("projection heads", []).extend(head_names)
            unused.setdefault("centers", []).extend(source.centers)
        self.matching = KeyReport(matched, missing, {group: keys for group, keys in unused.items() if keys})

    def _load_heads(self, model: nn.Module, networks: dict, matched: dict[str, int], unused: dict) -> None:
        """Load projection heads and centers, and add them to the key report."""
        for role, network in networks.items():
            own = network.head.state_dict()
            head = _state_for(role, self.source.heads)
            network.head.load_state_dict({key: value for key, value in head.items() if key in own})
            matched[f"{role} head"] = len(own)
        for name, value in self.source.centers.items():
            center = getattr(model, name, None)
            if center is not None and center.shape == value.shape:
                center.copy_(value)
                matched["centers"] = matched.get("centers", 0) + 1
            else:
                unused.setdefault("centers", []).append(name)

    def _adapted(self, state: dict[str, Tensor], encoder: Encoder) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """Return the state dict to load, its keys that stay at the encoder's values, and unused keys of `state`."""
        own, state, left_out = encoder.state_dict(), dict(state), []
        absent = [key for key in own if key == "backbone.mask_token" and key not in state]
        if "backbone.mask_token" in state and "backbone.mask_token" not in own:
            left_out.append("backbone.mask_token")
        if not encoder.backbone.has_class_token and "backbone.cls_token" in state:
            left_out.append("backbone.cls_token")
            table = state.get("backbone.pos_embed")
            if table is not None and table.shape[1] == own["backbone.pos_embed"].shape[1] + 1:
                state["backbone.pos_embed"] = table[:, 1:]
                self._note("the class token and its row of the position table are left out: this backbone has neither")
        if (self.spec["pooling"] or {}).get("name") != pooling_name(encoder.pooling):
            left_out += [key for key in state if key.startswith("pooling.")]
            absent += [key for key in own if key.startswith("pooling.")]
            self.fresh_pooling = any(key.startswith("pooling.") for key in own)
        state = {key: value for key, value in state.items() if key not in left_out}
        misfit = f"{self.source.origin} does not fit the recipe's {encoder.backbone.name}"
        mismatch = mismatch_text(own.keys() - state.keys() - set(absent), state.keys() - own.keys())
        if mismatch:
            raise UserError(f"{misfit}: it {mismatch}; check backbone.name and the keys of section backbone")
        for key, value in state.items():
            if value.shape != own[key].shape:
                raise UserError(
                    f"{misfit}: {key} is {list(value.shape)} there and {list(own[key].shape)} here; "
                    "check the keys of section backbone"
                )
        return {**state, **{key: own[key] for key in absent}}, absent, left_out

    def _head_status(self, model: nn.Module, head: str) -> str:
        """Return "kept" or the reason for a fresh head; raises UserError for heads of different shapes."""
        source = self.source
        if head == "fresh":
            return "fresh: method.start_head=fresh"
        if source.head is None:
            return f"fresh: {source.headless}"
        if not model.student.head.state_dict():
            return "fresh: this method has no projection head"
        their_pooling = (self.spec["pooling"] or {}).get("name")
        own_pooling = pooling_name(model.student.encoder.pooling)
        if their_pooling != own_pooling:
            return f"fresh: the start model's head belongs to the pooling {their_pooling}, this one is {own_pooling}"
        mine = head_keys.arguments(model.student.head.state_dict())
        theirs = dict(source.head)
        if theirs["patch_prototypes"] and not model.has_patch_loss:
            theirs["patch_prototypes"] = None  # unused by a method without a patch loss
        if mine["layers"] == theirs["layers"] == 1:
            theirs["hidden"] = mine["hidden"]
        differing = [key for key in mine if mine[key] != theirs[key]]
        if differing:
            differences = ", ".join(
                f"{key} {_yaml(theirs[key])} there and {_yaml(mine[key])} here" for key in differing
            )
            remedy = " ".join(f"head.{key}={_yaml(theirs[key])}" for key in differing)
            raise UserError(
                f"{source.origin} has another projection head than the recipe: {differences}; "
                f"set {remedy} to keep it, or method.start_head=fresh for a new one"
            )
        return "kept"

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def warmup_epochs(self, requested: float | None, epochs: float) -> float:
        """Return the epochs in which only the head is trained.

        By default none with a kept head, and one, at most a fifth of the run, with a fresh head.
        """
        if requested is not None:
            return requested
        return 0.0 if self.head == "kept" else min(1.0, MAX_WARMUP_SHARE * epochs)

    def frozen_names(self, names) -> list[str]:
        """Return the parameters frozen during the head warm-up: the student's encoder without a fresh pooling."""
        encoder = [name for name in names if name.startswith("student.encoder.")]
        if not self.fresh_pooling:
            return encoder
        return [name for name in encoder if not name.startswith("student.encoder.pooling.")]

    def summary(self) -> list[str]:
        """Return the console lines at the start of the run."""
        copies = " and ".join(role for role in self.source.networks if role != SINGLE_NETWORK) or "one copy"
        return [
            f"{KEY} {self.name} ({self.source.layout}, {copies}): {self.matching.line()}",
            f"projection head: {self.head}",
            *self.notes,
        ]


def _state_for(role: str, states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors for a role: its own, else those of the first network."""
    return states[role if role in states else next(iter(states))]


def _size_text(value) -> str:
    if isinstance(value, tuple):
        return str(value[0]) if len(set(value)) == 1 else f"[{', '.join(map(str, value))}]"
    return str(value)


def _yaml(value) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
