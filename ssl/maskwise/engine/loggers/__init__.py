"""The loggers of a run: LOGGERS is their table, `Loggers` those of one run, none of which can end it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from maskwise.engine.loggers.base import LoggedRun, Logger
from maskwise.errors import UserError, printable

# name -> module and class, imported where a run asks for it, and the package that it needs
LOGGERS = {
    "tensorboard": ("maskwise.engine.loggers.tensorboard", "TensorBoardLogger", "tensorboard"),
    "wandb": ("maskwise.engine.loggers.wandb", "WandbLogger", "wandb"),
    "mlflow": ("maskwise.engine.loggers.mlflow", "MLflowLogger", "mlflow"),
}
TRAIN = "train"  # the kind of record that a logged step is; others are the names of evaluations and pictures
LONGEST = 200  # characters of an error in a notice


def check_loggers(names: Sequence[str]) -> None:
    """Raise UserError for a logger whose package is not installed; nothing is imported."""
    for name in names:
        package = LOGGERS[name][2]
        if importlib.util.find_spec(package) is None:
            others = [other for other in names if other != name]
            rest = f"[{', '.join(others)}]" if others else "null"
            raise UserError(
                f"train.loggers: {name} needs the package {package}, which is not installed: "
                f"pip install 'maskwise[{name}]', or train.loggers={rest}"
            )


class Loggers:
    """The loggers `names` of a run; one that fails prints one line, and the run continues without it.

    logged: (step, kind) of records that an earlier start wrote after this one's first step. They are not sent a second
    time to loggers that cannot drop them. Raises OSError if TensorBoard's file cannot be opened in the run folder.
    """

    def __init__(self, names: Sequence[str], run: LoggedRun, logged: Iterable[tuple[int, str]] = ()):
        self.run, self.logged = run, set(logged)
        self.open: dict[str, Logger] = {}
        for name in names:
            module, cls, _ = LOGGERS[name]
            try:
                self.open[name] = getattr(importlib.import_module(module), cls)(run)
            except Exception as error:
                if name == "tensorboard":
                    raise
                self._notice(name, error)

    def scalars(self, values: dict[str, float], step: int, kind: str = TRAIN) -> None:
        """Log numbers by name; those that are not numbers are left out."""
        numbers = {key: value for key, value in values.items() if is_number(value)}
        self._each(lambda logger: logger.scalars(numbers, step), step, kind)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG file."""
        self._each(lambda logger: logger.picture(name, path, step), step, name)

    def report(self, path: Path, step: int, kind: str) -> None:
        """Log the file of a report."""
        self._each(lambda logger: logger.report(path, step), step, kind)

    def flush(self) -> None:
        """Flush each logger."""
        self._each(lambda logger: logger.flush())

    def close(self, status: str) -> None:
        """Close each logger."""
        self._each(lambda logger: logger.close(status))
        self.open = {}

    def _each(self, call: Callable[[Logger], None], *record):
        for name, logger in list(self.open.items()):
            if record in self.logged and not logger.rewinds:
                continue
            try:
                call(logger)
            except Exception as error:
                del self.open[name]
                self._notice(name, error)

    def _notice(self, name, error):
        reason = " ".join(str(error).split())[:LONGEST] or type(error).__name__
        self.run.print_line(f"{name}: {printable(reason)}; the run continues without this logger until its next start")


def is_number(value) -> bool:
    """Return whether a value is a number, and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
