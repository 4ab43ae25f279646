"""`ImportedModel`: the contents of a weights file or folder under this project's names, with a report on its keys."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.export.formats.projection_heads import IncompatibleHead, arguments
from maskwise.export.formats.saved_classifier import SavedClassifier
from maskwise.export.formats.spec_checks import user_errors
from maskwise.nn.backbones.base import BackboneBase
from maskwise.nn.backbones.factory import Backbone
from maskwise.nn.backbones.pretrained import check_state
from maskwise.nn.encoder import Encoder, encoder_from_spec

SINGLE_NETWORK = "only"  # the role of the network in a file that holds one


@dataclass(frozen=True)
class KeyReport:
    """Keys of a loaded model: number of matched tensors by part, keys missing in the file, unused keys by group."""

    matched: dict[str, int]
    missing: list[str] = field(default_factory=list)
    unused: dict[str, list[str]] = field(default_factory=dict)

    def line(self) -> str:
        """Return the report in one line."""
        counts = ", ".join(f"{part} {count}" for part, count in self.matched.items())
        missing = _abbreviated(self.missing) if self.missing else "none"
        unused = ", ".join(f"{group} {len(keys)}" for group, keys in self.unused.items() if keys) or "none"
        return f"{sum(self.matched.values())} tensors matched ({counts}); missing: {missing}; unused: {unused}"

    def lines(self) -> list[str]:
        """Return the report in lines, one for each group of unused keys."""
        counts = ", ".join(f"{part} {count}" for part, count in self.matched.items())
        groups = [f"unused   {group}: {_abbreviated(keys, 4)}" for group, keys in self.unused.items() if keys]
        return [
            f"matched  {sum(self.matched.values())} tensors ({counts})",
            f"missing  {_abbreviated(self.missing, 8) if self.missing else 'none'}",
            *(groups or ["unused   none"]),
        ]


@dataclass
class ImportedModel:
    """One network, or student and teacher, with their projection heads and centers if present.

    `spec`: arguments of `encoder_from_spec`; its pooling is None for a file without one.
    `networks`, `heads`: role ("teacher", "student" or "only") -> tensors under this project's names.
    `head`: arguments of the ProjectionHead that holds them, else `headless` gives the reason.
    `classifiers`: role -> classifier. `unused`: keys that are not loaded, by group.
    `filled`: tensors the file lacks and the features do not depend on. `notes`: settings not stored in the tensors.
    `takes`: settings that this kind of file does not store and its reader takes. `assumed_stats`: mean and std are
    neither stored nor given.
    """

    origin: str
    layout: str
    spec: dict
    networks: dict[str, dict[str, Tensor]]
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    head: dict | None = None
    headless: str = "it has no projection head"
    centers: dict[str, Tensor] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    file: Path | None = None
    classifiers: dict[str, SavedClassifier] = field(default_factory=dict)
    filled: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    takes: set[str] = field(default_factory=set)
    assumed_stats: bool = False

    def role(self, weights: str) -> str:
        """Return the role of the network for "teacher" or "student"; raises UserError if it is not in the file."""
        if weights in self.networks:
            return weights
        if SINGLE_NETWORK in self.networks:
            return SINGLE_NETWORK
        roles = list(self.networks)
        raise UserError(f"{self.origin} holds no {weights}; it has {', '.join(roles)}: choose weights={roles[0]}")

    def encoder(self, weights: str = "teacher") -> Encoder:
        """Build the encoder with those weights; raises UserError for missing, unknown or misshapen tensors."""
        state = self.check(weights)
        self.require_num_heads()
        with user_errors(self.origin):
            encoder = build(self.spec, state)
        encoder.load_state_dict(state)
        return encoder

    def check(self, weights: str = "teacher") -> dict[str, Tensor]:
        """Return the tensors of a network; raises UserError where they are missing, unknown or misshapen."""
        if self.spec["pooling"] is None:
            raise UserError(
                f"{self.origin} has neither a class token nor SimPool weights: there is nothing to pool with"
            )
        state = self.networks[self.role(weights)]
        with user_errors(self.origin):
            with torch.device("meta"):  # check sizes before allocating what an untrusted file asks for
                own = build(self.spec, state).state_dict()
            check_state(
                own,
                state,
                "it does not fit the encoder",
                "; name its layout (dino, ibot, attmask, simpool, timm, ...) if it was guessed wrong",
            )
        return state

    def require_num_heads(self) -> None:
        """Raise UserError if neither the file nor its size tells the number of attention heads."""
        backbone = self.spec["backbone"]
        if "num_heads" in backbone and backbone["num_heads"] is None:
            raise UserError(
                f"{self.origin} does not store the number of attention heads, and its size (width "
                f"{backbone['embed_dim']}, depth {backbone['depth']}) is not that of one published network: "
                "give num_heads=..., as it was trained"
            )

    @property
    def num_heads(self) -> int:
        """Number of attention heads, which cannot be read from the tensors."""
        if "num_heads" in self.spec["backbone"]:
            return self.spec["backbone"]["num_heads"]
        return self.backbone().num_heads

    @property
    def table_prefix(self) -> int:
        """Number of rows of a transformer's position table before those of the patches."""
        return self.backbone().table_prefix

    def backbone(self) -> BackboneBase:
        """Build the backbone without weights, on the meta device."""
        with torch.device("meta"):
            return Backbone(**self.spec["backbone"])

    def loaded_keys(self, weights: str, classifier: bool = False) -> KeyReport:
        """Report on the keys when one network, with its `classifier` if asked for, is loaded."""
        role = self.role(weights)
        matched = {"encoder" if role == SINGLE_NETWORK else role: len(self.networks[role])}
        with_classifier = classifier and role in self.classifiers
        if with_classifier:
            matched["classifier"] = len(self.classifiers[role].state)
        unused = {group: list(keys) for group, keys in self.unused.items()}
        for other, state in self.networks.items():
            if other != role:
                unused.setdefault(f"the {other}", []).extend(state)
        for other, state in self.heads.items():
            unused.setdefault("projection heads", []).extend(f"{other}.head.{key}" for key in state)
        unused.setdefault("centers", []).extend(self.centers)
        for other, saved in self.classifiers.items():
            if not (with_classifier and other == role):
                unused.setdefault("classifier", []).extend(saved.state)
        return KeyReport(matched, self.filled, unused)

    def all_keys(self) -> KeyReport:
        """Report on the keys when everything that can be held is loaded."""
        matched = {"encoder" if role == SINGLE_NETWORK else role: len(state) for role, state in self.networks.items()}
        matched |= {f"{role} head": len(state) for role, state in self.heads.items()}
        first = next(iter(self.networks))  # an exported folder holds one classifier
        if first in self.classifiers:
            matched["classifier"] = len(self.classifiers[first].state)
        if self.centers:
            matched["centers"] = len(self.centers)
        others = [f"{role}.{key}" for role, saved in self.classifiers.items() if role != first for key in saved.state]
        return KeyReport(matched, self.filled, {**self.unused, "other classifiers": others})

    def other_parts(self, role: str) -> dict[str, list[str]]:
        """Return what a file of one backbone leaves out: the other networks and all heads, by group."""
        others = [f"{other} network" for other in self.networks if other != role]
        others += [f"{other} head" for other in self.heads]
        return {"not of one backbone": others} if others else {}

    def sha256(self) -> str:
        """Return the digest of the weights file; "" without a file."""
        if self.file is None:
            return ""
        digest = hashlib.sha256()
        with open(self.file, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


def add_checkpoint_tensors(model: ImportedModel, tensors: dict[str, Tensor]) -> ImportedModel:
    """Add the tensors of a maskwise checkpoint: `student.encoder.*`, `teacher.head.*`, `center` and so on."""
    for role in ("teacher", "student"):
        for part, target in (("encoder", model.networks), ("head", model.heads)):
            prefix = f"{role}.{part}."
            state = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                target[role] = state
    model.centers = {key: tensors[key] for key in ("center", "patch_center") if key in tensors}
    if model.heads:
        try:
            model.head = arguments(next(iter(model.heads.values())))
        except IncompatibleHead as reason:
            model.headless, model.heads, model.centers = str(reason), {}, {}
    return model


def checkpoint_tensors(model: ImportedModel) -> dict[str, Tensor]:
    """Return a model's tensors under the names of a maskwise checkpoint."""
    parts = (("encoder", model.networks), ("head", model.heads))
    tensors = {
        f"{role}.{part}.{key}": value
        for part, states in parts
        for role, state in states.items()
        for key, value in state.items()
    }
    return {**tensors, **model.centers}


def build(spec: dict, state: dict[str, Tensor]) -> Encoder:
    """Build the encoder of a spec, with a mask token if these weights have one; an unknown number of heads is 1."""
    spec = copy.deepcopy(spec)
    if spec["backbone"].get("num_heads", 1) is None:
        spec["backbone"]["num_heads"] = 1
    spec["backbone"]["mask_token"] = "backbone.mask_token" in state
    return encoder_from_spec(spec)


def _abbreviated(keys: list[str], most: int = 3) -> str:
    return ", ".join(map(str, keys[:most])) + (f" and {len(keys) - most} more" if len(keys) > most else "")
