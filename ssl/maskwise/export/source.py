"""`Source`: what a file, a folder or a timm name holds, in this project's names, and what became of each of its keys."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from maskwise.export.heads import Unfit, arguments
from maskwise.export.specs import told
from maskwise.export.trained_classifier import TrainedClassifier
from maskwise.functional.errors import UserError
from maskwise.nn.backbone import Backbone
from maskwise.nn.encoder import Encoder, encoder_from_spec
from maskwise.nn.weights import fit

ONLY = "only"


@dataclass(frozen=True)
class Matching:
    """What became of the keys: how many tensors were matched by part, which of ours had none, which of theirs nobody reads."""

    matched: dict[str, int]
    missing: list[str] = field(default_factory=list)
    unused: dict[str, list[str]] = field(default_factory=dict)

    def line(self) -> str:
        """All of it in one line."""
        counts = ", ".join(f"{part} {count}" for part, count in self.matched.items())
        missing = _some(self.missing) if self.missing else "none"
        unused = ", ".join(f"{group} {len(keys)}" for group, keys in self.unused.items() if keys) or "none"
        return f"{sum(self.matched.values())} tensors matched ({counts}); missing: {missing}; unused: {unused}"

    def lines(self) -> list[str]:
        """The same, a line for each group of unused keys."""
        counts = ", ".join(f"{part} {count}" for part, count in self.matched.items())
        groups = [f"unused   {group}: {_some(keys, 4)}" for group, keys in self.unused.items() if keys]
        return [
            f"matched  {sum(self.matched.values())} tensors ({counts})",
            f"missing  {_some(self.missing, 8) if self.missing else 'none'}",
            *(groups or ["unused   none"]),
        ]


@dataclass
class Source:
    """An encoder in one copy or as student and teacher, with their projection heads and centers where there are any.

    `spec` is what `encoder_from_spec` takes (its pooling None where the file has none); `networks` and `heads` map
    "teacher", "student" or "only" to tensors under our names; `head` holds the arguments of a ProjectionHead that takes
    them, or `headless` says why there is none; `classifiers` maps to what the network learnt of labels; `unused` lists by group the keys that
    nothing here reads, `filled` what the file lacks and nobody reads, `notes` what no tensor tells.
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
    classifiers: dict[str, TrainedClassifier] = field(default_factory=dict)
    filled: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def role(self, weights: str) -> str:
        """The network that is meant by "teacher" or "student"; raises UserError where there is another and not that one."""
        if weights in self.networks:
            return weights
        if ONLY in self.networks:
            return ONLY
        raise UserError(f"{self.origin} holds no {weights}; it has {', '.join(self.networks)}: choose weights={next(iter(self.networks))}")

    def encoder(self, weights: str = "teacher") -> Encoder:
        """The encoder with those weights; raises UserError for a key too many, too few or of another shape."""
        if self.spec["pooling"] is None:
            raise UserError(f"{self.origin} has neither a class token nor SimPool weights: there is nothing to pool with")
        state = self.networks[self.role(weights)]
        with told(self.origin):
            with torch.device("meta"):  # before memory is taken for what a file may have made up
                own = build(self.spec, state).state_dict()
            fit(own, state, "it does not fit the encoder", "; name its layout (dino, ibot, attmask, simpool, timm, ...) if it was guessed wrong")
            encoder = build(self.spec, state)
        encoder.load_state_dict(state)
        return encoder

    @property
    def num_heads(self) -> int:
        """Attention heads, which no tensor tells."""
        if "num_heads" in self.spec["backbone"]:
            return self.spec["backbone"]["num_heads"]
        with torch.device("meta"):
            return Backbone(**self.spec["backbone"]).num_heads

    def taken(self, weights: str, classifier: bool = False) -> Matching:
        """What became of the keys when one network, or it and its `classifier`, is taken and the rest left."""
        role = self.role(weights)
        others = {f"the {other}": list(state) for other, state in self.networks.items() if other != role}
        heads = {"projection heads": [f"{other}.head.{key}" for other, state in self.heads.items() for key in state], "centers": list(self.centers)}
        name = "encoder" if role == ONLY else role
        kept = {each: len(self.classifiers[each].state) for each in (role,) if classifier and each in self.classifiers}
        left = {"classifier": [key for each, held in self.classifiers.items() if each not in kept for key in held.state]}
        return Matching({name: len(self.networks[role]), **{"classifier": count for count in kept.values()}}, self.filled, {**self.unused, **others, **heads, **left})

    def everything(self) -> Matching:
        """What became of the keys when all that can be held is taken."""
        networks = {"encoder" if role == ONLY else role: len(state) for role, state in self.networks.items()}
        heads = {f"{role} head": len(state) for role, state in self.heads.items()}
        first = next(iter(self.networks))  # a folder has a place for one
        heads |= {"classifier": len(self.classifiers[first].state)} if first in self.classifiers else {}
        left = {"other classifiers": [f"{role}.{key}" for role, held in self.classifiers.items() if role != first for key in held.state]}
        return Matching({**networks, **heads, **({"centers": len(self.centers)} if self.centers else {})}, self.filled, {**self.unused, **left})

    def sha256(self) -> str:
        """Digest of the file that the weights came from; "" where there is none."""
        if self.file is None:
            return ""
        digest = hashlib.sha256()
        with open(self.file, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


def trained(source: Source, tensors: dict[str, Tensor]) -> Source:
    """Fill a source from the tensors of one of our checkpoints: `student.encoder.`, `teacher.head.`, `center` and so on."""
    for role in ("teacher", "student"):
        for part, home in (("encoder", source.networks), ("head", source.heads)):
            front = f"{role}.{part}."
            state = {key[len(front) :]: value for key, value in tensors.items() if key.startswith(front)}
            if state:
                home[role] = state
    source.centers = {key: tensors[key] for key in ("center", "patch_center") if key in tensors}
    if source.heads:
        try:
            source.head = arguments(next(iter(source.heads.values())))
        except Unfit as reason:
            source.headless, source.heads, source.centers = str(reason), {}, {}
    return source


def tensors_of(source: Source) -> dict[str, Tensor]:
    """A source's tensors under the names of our checkpoints."""
    parts = (("encoder", source.networks), ("head", source.heads))
    named = {f"{role}.{part}.{key}": value for part, home in parts for role, state in home.items() for key, value in state.items()}
    return {**named, **source.centers}


def build(spec: dict, state: dict[str, Tensor]) -> Encoder:
    """The encoder of a spec, with a mask token where these weights have one."""
    spec = copy.deepcopy(spec)
    spec["backbone"]["mask_token"] = "backbone.mask_token" in state
    return encoder_from_spec(spec)


def _some(keys: list[str], most: int = 3) -> str:
    return ", ".join(map(str, keys[:most])) + (f" and {len(keys) - most} more" if len(keys) > most else "")
