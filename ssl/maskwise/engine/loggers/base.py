"""`Logger`: the interface of TensorBoard, Weights & Biases and MLflow, and the run that they log."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from maskwise.engine.atomic_file import write_atomic

COMPLETE = "complete"
IDENTITIES = "loggers.json"


@dataclass(frozen=True)
class LoggedRun:
    """A run folder with its recipe.yaml, the step that this start continues from, and where lines are printed."""

    folder: Path
    step: int = 0
    print_line: Callable[[str], None] = lambda text: None

    @property
    def recipe(self) -> dict:
        """The recipe as nested sections, {} without one."""
        import yaml

        path = self.folder / "recipe.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def identity(self, logger: str) -> dict:
        """Return what a logger has remembered of this run, {} at its first start."""
        return self._identities().get(logger, {})

    def remember(self, logger: str, identity: dict) -> None:
        """Keep under which name a logger knows this run, for later starts."""
        write_atomic(self.folder / IDENTITIES, json.dumps({**self._identities(), logger: identity}, indent=2))

    def _identities(self):
        try:
            return json.loads((self.folder / IDENTITIES).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}


class Logger:
    """Log a run to one place. Methods may raise anything: `Loggers` reports it once and goes on without the logger.

    Built with a LoggedRun; a later start of the run continues what an earlier one has logged.
    """

    rewinds = False  # whether records after the step of this start are dropped, so that they are logged again

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers by name at a step."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG file at a step."""

    def report(self, path: Path, step: int) -> None:
        """Log the file of an evaluation's report."""

    def flush(self) -> None:
        """Write everything that was logged, as far as the place does not do so by itself."""

    def close(self, status: str) -> None:
        """Flush and close; status: COMPLETE, or PREEMPTED or FAILED of run_end."""
