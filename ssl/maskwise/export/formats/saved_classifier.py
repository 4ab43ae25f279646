"""`SavedClassifier`: the classifier of a supervised run, read from its run folder or from an exported folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.export import run_checkpoint
from maskwise.export.formats.spec_checks import check_arguments, json_object, user_errors
from maskwise.nn.backbones.pretrained import check_state
from maskwise.nn.backbones.weights_file import read_tensors
from maskwise.nn.classifiers import CLASSIFIERS

FILE = "classifier.safetensors"
REMEDY = "; export the run again"


@dataclass(frozen=True)
class SavedClassifier:
    """A row of CLASSIFIERS with its options, classes and tensors.

    `origin` is the folder or file it was read from, `count` the number of classes, `classes` their names or None.
    """

    origin: str
    name: str
    options: dict
    count: int
    classes: tuple[str, ...] | None
    state: dict[str, Tensor]

    @property
    def light(self) -> bool:
        """Whether the token heads are left out (MAP-light)."""
        return bool(self.options.get("light"))

    def spec(self) -> dict:
        """Return the JSON-able description that config.json holds."""
        return {
            "name": self.name,
            "options": self.options,
            "count": self.count,
            "classes": None if self.classes is None else list(self.classes),
        }

    def on(self, encoder: nn.Module) -> nn.Module:
        """Build the classifier for features of this encoder, in eval mode; raises UserError for a mismatch."""
        with user_errors(self.origin):
            check_arguments({**self.options, "count": self.count})
            if self.name not in CLASSIFIERS:
                raise UserError(f"unknown classifier {self.name!r}; choose one of {', '.join(CLASSIFIERS)}")
            with torch.device("meta"):  # check sizes before allocating what an untrusted file asks for
                own = CLASSIFIERS[self.name](encoder, self.count, **self.options).state_dict()
            check_state(own, self.state, "its classifier does not fit", REMEDY, REMEDY)
            built = CLASSIFIERS[self.name](encoder, self.count, **self.options)
        built.load_state_dict(self.state)
        return built.eval()

    def lightened(self, encoder: nn.Module) -> SavedClassifier:
        """Return it without the token heads (MAP-light); raises UserError for classifiers without a light form."""
        built = self.on(encoder)
        if not hasattr(built, "drop_token_heads"):
            raise UserError(f"classifier {self.name} of {self.origin} has no light form; leave light out")
        built.drop_token_heads()
        return replace(self, options={**self.options, "light": True}, state=built.state_dict())


def read(folder, weights: str = "teacher") -> SavedClassifier | None:
    """Read the classifier of a run folder's last checkpoint or of an exported folder; None without one.

    Raises UserError for damaged files.
    """
    folder = Path(folder)
    description = json_object(folder / "config.json").get("maskwise")
    if isinstance(description, dict):
        return None if description.get("classifier") is None else read_exported(folder, description["classifier"])
    checkpoint = run_checkpoint.find(folder)
    if checkpoint is None or not (checkpoint.run / "recipe.yaml").is_file():
        return None
    recipe = yaml.safe_load((checkpoint.run / "recipe.yaml").read_text(encoding="utf-8")) or {}
    options = dict(recipe.get("classifier") or {})
    classes = json_object(checkpoint.meta).get("classes")
    if not options or not classes:
        return None
    prefix = f"{weights}.head."
    state = {
        key[len(prefix) :]: value for key, value in read_tensors(checkpoint.model).items() if key.startswith(prefix)
    }
    name = options.pop("name")
    options.pop("classes", None)
    names = tuple(classes["names"]) if classes["names"] else None
    return SavedClassifier(str(folder), name, options, classes["count"], names, state)


def read_exported(folder: Path, spec) -> SavedClassifier:
    """Read the classifier described in an exported folder's config.json, which is untrusted."""
    with user_errors(folder):
        name, options, count, classes = (spec[key] for key in ("name", "options", "count", "classes"))
        if not isinstance(count, int) or not isinstance(options, dict) or classes is not None and len(classes) != count:
            raise ValueError(f"classifier of {count!r} classes")
        classes = None if classes is None else tuple(map(str, classes))
    return SavedClassifier(str(folder), name, options, count, classes, read_tensors(folder / FILE))
