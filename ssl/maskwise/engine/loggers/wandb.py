"""Weights & Biases: offline unless WANDB_MODE asks for the network, one run for all starts of a run folder."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from maskwise.engine.loggers.base import COMPLETE, LoggedRun, Logger
from maskwise.engine.run_end import PREEMPTED

SECONDS = 300  # for W&B's own process to start on a busy machine


class WandbLogger(Logger):
    """Log to `wandb/` in the run folder, from where `wandb sync` uploads; WANDB_MODE=online sends at once.

    WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME and its other variables apply. Charts are over the step of training. Of
    the machine only the list of Python packages is recorded, and neither code nor console.
    """

    def __init__(self, run: LoggedRun):
        mode = os.environ.get("WANDB_MODE") or "offline"
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would send crashes of its own
        import wandb

        identity = run.identity("wandb") or {"id": os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]}
        quiet = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            disable_job_creation=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_service_wait=SECONDS,
            init_timeout=SECONDS,
        )
        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "maskwise",
            name=os.environ.get("WANDB_NAME") or run.folder.name,
            id=identity["id"],
            resume="allow",
            mode=mode,
            dir=str(run.folder),
            config=run.recipe,
            settings=quiet,
        )
        run.remember("wandb", identity)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.keep(run.folder / "recipe.yaml")
        uploads = f"; wandb sync {run.folder}/wandb/offline-run-* uploads it" if mode == "offline" else ""
        run.print_line(f"wandb: {mode}, run {identity['id']}{uploads}")

    def keep(self, path: Path, folder: str = "") -> None:
        """Add a file to those of the run."""
        if path.is_file():
            place = Path(self.run.dir) / folder
            place.mkdir(exist_ok=True)
            self.run.save(shutil.copy(path, place), base_path=self.run.dir, policy="now")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers at a step."""
        self.run.log({"step": step, **values})

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG file at a step."""
        self.run.log({"step": step, f"pictures/{name}": self.wandb.Image(str(path))})

    def report(self, path: Path, step: int) -> None:
        """Add the file of a report."""
        self.keep(path, "reports")

    def close(self, status: str) -> None:
        """End this start of the run; an exit code other than 0 marks a failed one."""
        self.run.finish(exit_code=0 if status in (COMPLETE, PREEMPTED) else 1)
