"""`TrainedClassifier`: what a supervised run has learnt beside its encoder, read from the run or from an exported folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from maskwise.export.specs import json_object, plausible, told
from maskwise.functional.errors import UserError
from maskwise.nn.classifiers import CLASSIFIERS
from maskwise.nn.weights import fit, read_tensors

FILE = "classifier.safetensors"


@dataclass(frozen=True)
class TrainedClassifier:
    """A row of CLASSIFIERS by name, its options, how many classes it tells apart, their names or None, and its tensors; origin is where it lay."""

    origin: str
    name: str
    options: dict
    count: int
    classes: tuple[str, ...] | None
    state: dict[str, Tensor]

    @property
    def light(self) -> bool:
        """Whether the tokens' heads are left out (MAP-light)."""
        return bool(self.options.get("light"))

    def spec(self) -> dict:
        """What config.json says of it; JSON-able."""
        return {"name": self.name, "options": self.options, "count": self.count, "classes": None if self.classes is None else list(self.classes)}

    def on(self, encoder: nn.Module) -> nn.Module:
        """The classifier for features of this encoder, in eval mode; raises UserError where it does not fit."""
        with told(self.origin):
            plausible({**self.options, "count": self.count})
            if self.name not in CLASSIFIERS:
                raise UserError(f"no classifier {self.name!r}; there are {', '.join(CLASSIFIERS)}")
            with torch.device("meta"):  # before memory is taken for what a file may have made up
                own = CLASSIFIERS[self.name](encoder, self.count, **self.options).state_dict()
            fit(own, self.state, "its classifier does not fit", "; export the run anew", "; export the run anew")
            built = CLASSIFIERS[self.name](encoder, self.count, **self.options)
        built.load_state_dict(self.state)
        return built.eval()

    def lightened(self, encoder: nn.Module) -> TrainedClassifier:
        """Without what it needs for training alone (MAP-light); raises UserError where it knows no such form."""
        built = self.on(encoder)
        if not hasattr(built, "lighten"):
            raise UserError(f"classifier {self.name} of {self.origin} has no light form; leave light out")
        built.lighten()
        return TrainedClassifier(self.origin, self.name, {**self.options, "light": True}, self.count, self.classes, built.state_dict())


def read(folder, weights: str = "teacher") -> TrainedClassifier | None:
    """The classifier of a run folder's last checkpoint or of an exported folder; None where there is none. Raises UserError for files that are broken."""
    folder = Path(folder)
    described = json_object(folder / "config.json").get("maskwise")
    if isinstance(described, dict):
        return None if described.get("classifier") is None else exported(folder, described["classifier"])
    last = folder / "checkpoints" / "last"
    if not (folder / "recipe.yaml").is_file() or not last.is_file():
        return None
    options = dict((yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")) or {}).get("classifier") or {})
    checkpoint = last.parent / last.read_text().strip()
    known = json_object(checkpoint / "meta.json").get("classes")
    if not options or not known:
        return None
    front = f"{weights}.head."
    state = {key[len(front) :]: value for key, value in read_tensors(checkpoint / "model.safetensors").items() if key.startswith(front)}
    name, _ = options.pop("name"), options.pop("classes", None)
    return TrainedClassifier(str(folder), name, options, known["count"], tuple(known["names"]) if known["names"] else None, state)


def exported(folder: Path, spec) -> TrainedClassifier:
    """The classifier that an exported folder's config.json describes; it may come from anybody."""
    with told(folder):
        name, options, count, classes = (spec[key] for key in ("name", "options", "count", "classes"))
        if not isinstance(count, int) or not isinstance(options, dict) or classes is not None and len(classes) != count:
            raise ValueError(f"classifier of {count!r} classes")
        classes = None if classes is None else tuple(map(str, classes))
    return TrainedClassifier(str(folder), name, options, count, classes, read_tensors(folder / FILE))
