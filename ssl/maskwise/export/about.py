"""`About`: where an encoder comes from, as its card tells it; read off a run folder's plain files."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from maskwise.export.specs import json_object
from maskwise.functional.errors import UserError

UNKNOWN = "unknown"  # the Hub's word for a licence that nobody has stated
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class About:
    """What is known of an encoder beside its weights.

    `recipe` is the resolved recipe's text without folders of the machine; `run` what run.json says; `reports` name ->
    numbers, protocol and so on, of this checkpoint only; `picture` a PNG. `licence` is the weights' own; `address` the name on the Hub.
    """

    name: str = "encoder"
    weights: str = "teacher"
    step: int | None = None
    licence: str = UNKNOWN
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    recipe: str | None = None
    run: dict = field(default_factory=dict)
    reports: dict[str, dict] = field(default_factory=dict)
    picture: bytes | None = None
    address: str | None = None

    def __post_init__(self):
        if not LICENCE.fullmatch(self.licence):
            raise UserError(f"licence={self.licence!r} is no licence identifier: give one such as apache-2.0, mit or cc-by-nc-4.0")

    @property
    def sections(self) -> dict:
        """The recipe as a mapping, {} where there is none."""
        return (yaml.safe_load(self.recipe) or {}) if self.recipe else {}

    @property
    def method(self) -> str:
        """Method and masking in a word or two, such as "ibot with attmask_high"; "" where no recipe tells."""
        sections = self.sections
        names = [str((sections.get(section) or {}).get("name", "")) for section in ("method", "masking")]
        return " with ".join(name for name in names if name and name != "none")


def about_run(folder: Path) -> dict:
    """The fields of `About` that a run folder tells of its last checkpoint, as keyword arguments; {} for another folder."""
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        return {}
    sections = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")) or {}
    data, method, backbone = (sections.get(name) or {} for name in ("data", "method", "backbone"))
    source = str(data.get("set") or data.get("path") or data.get("name") or "")
    named = data.get("name") == "huggingface" and re.fullmatch(r"[\w.-]+/[\w.-]+", source)  # the Hub's own name of it
    base = method.get("start_from") or backbone.get("weights")
    step = _step(folder)
    return {
        "name": folder.resolve().name,
        "step": step,
        "datasets": (source if named else slug(Path(source).name),) if source else (),
        "base_model": None if base is None else Path(base).name if Path(base).exists() else shortened(str(base).removeprefix("hub:").partition("@")[0]),
        "recipe": HEAD + yaml.safe_dump(shortened(sections), sort_keys=False),
        "run": shortened({key: value for key, value in json_object(folder / "run.json").items() if key != "command"}),
        "reports": reports_of(folder / "reports", step),
    }


HEAD = "# The recipe that these weights were trained with; folders of the machine are cut to their last name.\n"


def reports_of(folder: Path, step: int | None) -> dict[str, dict]:
    """The reports of a folder that measure this checkpoint: those without a step in their name, and those of this step."""
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        name, mark, of = path.stem.partition("_step_")
        report = json_object(path)
        if isinstance(report.get("numbers"), dict) and (not mark or (of.isdigit() and int(of) == step)):
            found[name if name not in found else path.stem] = shortened(report)
    return found


def shortened(value):
    """A value with absolute paths cut to their last name: nobody else has these folders, and they may tell who trained."""
    if isinstance(value, dict):
        return {key: shortened(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [shortened(entry) for entry in value]
    if isinstance(value, str) and re.match(r"(/|~|\.\.?/|[A-Za-z]:[\\/])", value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def slug(text: str) -> str:
    """A name with letters, digits, dots, dashes and underscores only."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


def _step(folder: Path) -> int | None:
    try:
        text = (folder / "checkpoints" / "last").read_text().strip()
    except OSError:
        return None
    digits = text.rpartition("_")[2]
    return int(digits) if digits.isdigit() else None
