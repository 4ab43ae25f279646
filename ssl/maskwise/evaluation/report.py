"""`Report`: what an evaluation found, by which protocol, on which data, at what cost."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

from maskwise.functional.draw import write_png
from maskwise.functional.errors import UserError


@dataclasses.dataclass
class Report:
    """Numbers of an evaluation and what is needed to compare them.

    numbers: name -> value, flat, accuracies in per cent; protocol: every setting that moves them; data_hash: hex digest of
    the images and labels; cost: seconds, images, images_per_second, device; corrupt: name -> reason of images left out; seeds: what
    was drawn -> its seed; epochs: of something trained, {"best": numbers, "last": numbers} and at which epoch; curves: name -> points
    [(x, y), ...]; pictures: name -> uint8 [H, W, 3], saved beside the JSON and not in it.
    """

    numbers: dict
    protocol: dict
    data_hash: str
    cost: dict
    corrupt: dict = dataclasses.field(default_factory=dict)
    seeds: dict = dataclasses.field(default_factory=dict)
    epochs: dict = dataclasses.field(default_factory=dict)
    curves: dict = dataclasses.field(default_factory=dict)
    pictures: dict = dataclasses.field(default_factory=dict, repr=False)

    def save(self, path: str | Path) -> Path:
        """Write as JSON, aside and then in place, and each picture as STEM_NAME.png beside it; numbers that are not finite become null.

        Raises UserError where it cannot.
        """
        path = Path(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            told = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "pictures"}
            aside.write_text(json.dumps(_plain(told), indent=2) + "\n", encoding="utf-8")
            os.replace(aside, path)
            for name, picture in self.pictures.items():
                write_png(path.with_name(f"{path.stem}_{name}.png"), picture)
        except OSError as error:
            raise UserError(f"cannot write the report {path}: {error.strerror}; choose a folder that you may write to") from None
        return path

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote. Raises UserError for a file that is missing or is no report."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise UserError(f"{path} is not a report; give a JSON file from a run's reports folder") from None


def _plain(value):
    """JSON knows no NaN, no tuples and no keys but text."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)
