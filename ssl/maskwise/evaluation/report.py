"""`Report`: the numbers of an evaluation with protocol, data hash and cost."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from pathlib import Path

from maskwise.engine.atomic_file import write_error
from maskwise.errors import UserError
from maskwise.imaging.drawing import write_png


@dataclasses.dataclass
class Report:
    """Numbers of an evaluation and all that is needed to compare them.

    numbers: name -> value, accuracies in per cent; protocol: every setting that changes them; data_hash: hex digest of
    images and labels; cost: seconds, images, images_per_second, device; corrupt: name -> reason of images left out;
    seeds: name of the draw -> seed; epochs: of a trained probe, {"best": numbers, "last": numbers} and the epoch;
    curves: name -> points [(x, y), ...]; notes: what the datasets left out; pictures: name -> uint8 [H, W, 3], saved as
    PNG next to the JSON.
    """

    numbers: dict
    protocol: dict
    data_hash: str
    cost: dict
    corrupt: dict = dataclasses.field(default_factory=dict)
    seeds: dict = dataclasses.field(default_factory=dict)
    epochs: dict = dataclasses.field(default_factory=dict)
    curves: dict = dataclasses.field(default_factory=dict)
    notes: list = dataclasses.field(default_factory=list)
    pictures: dict = dataclasses.field(default_factory=dict, repr=False)

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON, atomically, and each picture as STEM_NAME.png.

        Non-finite numbers become null. Raises UserError if the files cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.content(), indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
            for name, picture in self.pictures.items():
                write_png(path.with_name(f"{path.stem}_{name}.png"), picture)
        except OSError as error:
            raise UserError(write_error(f"the report {path}", error)) from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return path

    def content(self) -> dict:
        """Return all but the pictures in JSON types; non-finite numbers become null."""
        names = [field.name for field in dataclasses.fields(Report) if field.name != "pictures"]
        return _plain({name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report written by `save`. Raises UserError for a file that is missing or not a report."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise UserError(f"{path} is not a report; give a JSON file from a run's reports folder") from None


def cost(begin: float, images: int, device) -> dict:
    """Return the cost entry of a report; begin: time.perf_counter() at its start."""
    seconds = time.perf_counter() - begin
    return {
        "seconds": round(seconds, 3),
        "images": images,
        "images_per_second": round(images / max(seconds, 1e-9), 1),
        "device": str(device),
    }


def joint_hash(*hashes: str) -> str:
    """Return one hex digest of several."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _plain(value):
    """Convert to JSON types: no NaN, no tuples, text keys."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)
