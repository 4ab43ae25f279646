"""Stand in for `python` of a launch script: `-m maskwise ...` that waits before steps until it is asked to stop.

PAUSE_AT=3,6 are the step of the first start of a Slurm job and that of its second; a later start does not wait, nor
does another task of an array than PAUSE_TASK. Each rank writes the file PAUSED.START.RANK and goes on once a signal has
reached it. So a test interrupts a run in the middle however fast the machine is, and its recipe is that of the
undisturbed run.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

from maskwise.engine.trainer import Trainer


def pause(step: int, marker: Path) -> None:
    """Patch Trainer.step to wait before a step."""
    original = Trainer.step

    def waiting_step(trainer, *arguments, **options):
        if trainer.step_index == step:
            marker.touch()
            while not signal.getsignal(signal.SIGUSR1).__self__.asked:
                time.sleep(0.02)
        return original(trainer, *arguments, **options)

    Trainer.step = waiting_step


if __name__ == "__main__":
    steps = [int(step) for step in os.environ.get("PAUSE_AT", "").split(",") if step]
    start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if start < len(steps) and os.environ.get("PAUSE_TASK") in (None, os.environ.get("SLURM_ARRAY_TASK_ID")):
        pause(steps[start], Path(f"{os.environ['PAUSED']}.{start}.{os.environ['RANK']}"))
    sys.argv = sys.argv[2:]  # `-m maskwise`
    runpy.run_module("maskwise", run_name="__main__", alter_sys=True)
