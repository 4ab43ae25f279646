"""`Provenance`: facts about an encoder's training for its model card, read from a run folder."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from maskwise.export import run_checkpoint
from maskwise.export.folder import licenses
from maskwise.export.folder.licenses import UNKNOWN
from maskwise.export.folder.local_paths import HUB_NAME, model_name, without_paths
from maskwise.export.formats.spec_checks import json_object
from maskwise.methods import METHODS

RECIPE_HEADER = "# The recipe that these weights were trained with; paths are shortened to their last name.\n"


@dataclass(frozen=True)
class Provenance:
    """Training facts of an encoder.

    recipe: text of the resolved recipe with shortened paths. run: content of run.json.
    reports: name -> numbers, protocol and so on, for this checkpoint only. picture: a PNG.
    license: of the weights. address: the name on the Hub. Raises UserError for a license that the Hub does not know.
    """

    name: str = "encoder"
    weights: str = "teacher"
    step: int | None = None
    license: str = UNKNOWN
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    recipe: str | None = None
    run: dict = field(default_factory=dict)
    reports: dict[str, dict] = field(default_factory=dict)
    picture: bytes | None = None
    address: str | None = None

    def __post_init__(self):
        licenses.check(self.license)

    @property
    def sections(self) -> dict:
        """The recipe as a mapping, {} without one."""
        return (yaml.safe_load(self.recipe) or {}) if self.recipe else {}

    @property
    def is_self_supervised(self) -> bool:
        """Whether the recipe's method is one that learns without labels."""
        method = METHODS.get((self.sections.get("method") or {}).get("name"))
        return method is not None and not method.learns_labels

    @property
    def method(self) -> str:
        """Method and masking, such as "ibot with attmask_high"; "" without a recipe."""
        sections = self.sections
        names = [str((sections.get(section) or {}).get("name", "")) for section in ("method", "masking")]
        return " with ".join(name for name in names if name and name != "none")


def read_provenance(folder: Path) -> dict:
    """Read the Provenance fields of a run's checkpoint, as keyword arguments; {} for another folder."""
    checkpoint = run_checkpoint.find(folder)
    folder = Path(folder) if checkpoint is None else checkpoint.run
    if not (folder / "recipe.yaml").is_file():
        return {}
    sections = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")) or {}
    data, method, backbone = (sections.get(name) or {} for name in ("data", "method", "backbone"))
    source = str(data.get("set") or data.get("path") or data.get("name") or "")
    is_hub_name = data.get("name") == "huggingface" and HUB_NAME.fullmatch(source)
    dataset = source if is_hub_name else slug(Path(source).name)
    step = None if checkpoint is None else checkpoint.step
    start, shortened = method.get("start_from") or backbone.get("weights"), without_paths(sections)
    if is_hub_name:
        shortened["data"]["path"] = data["path"]
    return {
        "name": folder.resolve().name,
        "step": step,
        "datasets": (dataset,) if source else (),
        "base_model": None if start is None else model_name(str(start)),
        "recipe": RECIPE_HEADER + yaml.safe_dump(shortened, sort_keys=False),
        "run": without_paths(
            {key: value for key, value in json_object(folder / "run.json").items() if key != "command"}
        ),
        "reports": reports_of(folder / "reports", step),
    }


def reports_of(folder: Path, step: int | None) -> dict[str, dict]:
    """Read the reports on this checkpoint: those of this step, and those without a step in their file name."""
    reports = {}
    for path in sorted(Path(folder).glob("*.json")):
        name, has_step, report_step = path.stem.partition("_step_")
        report = json_object(path)
        is_current = not has_step or (report_step.isdigit() and int(report_step) == step)
        if isinstance(report.get("numbers"), dict) and is_current:
            reports[name if name not in reports else path.stem] = without_paths(report)
    return reports


def slug(text: str) -> str:
    """Return a name of letters, digits, dots, dashes and underscores only."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")
