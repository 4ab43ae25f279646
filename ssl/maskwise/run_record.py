"""What a run folder tells of its run: the recipe, and on what it was started."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from maskwise.data import decoders
from maskwise.distributed.world import World
from maskwise.engine.disk import write_whole
from maskwise.export.start import Start
from maskwise.functional.errors import UserError
from maskwise.recipe import Recipe, read_recipe


def known_run(folder: Path, recipe: Recipe) -> dict:
    """run.json of a run that this recipe may continue, {} where there is none; a changed recipe is refused with its diff."""
    if not (folder / "recipe.yaml").is_file():
        return {}
    changed = read_recipe(folder, consented=recipe.code()).diff(recipe)
    if changed:
        raise UserError(f"{folder} holds a run of another recipe ({'; '.join(changed)}); give the same recipe, or another --out")
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "run.json").read_text())
    return {}


def write_run(folder: Path, recipe: Recipe, world: World, precision: str, images: int, start: Start | None = None) -> None:
    """recipe.yaml (resolved) and run.json: what this run is, and on what it was started. Raises UserError when the disk refuses."""
    about = {
        "precision": precision, "recipe_hash": recipe.hash(), "images": images, "decoder": decoders.resolved(recipe.data.decoder),
        **this_start(world), "command": " ".join(["maskwise", *sys.argv[1:]]),
    }  # fmt: skip
    if start:
        about["start"] = start.about()
    for name, text in (("run.json", json.dumps(about, indent=2)), ("recipe.yaml", recipe.resolved_yaml())):
        write_whole(folder / name, text)


def this_start(world: World) -> dict:
    """Ranks, device, time and versions of a start; run.json lists one for each time the run was started, with its first step."""
    return {
        "ranks": world.size, "device": device_name(world.device), "commit": commit(), "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "threads": torch.get_num_threads(), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip


def recipe_of(run) -> str | None:
    """The name of the shipped recipe that a run was started from, as its run.json tells, or None."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        words = json.loads((Path(run) / "run.json").read_text())["command"].split()
        return "/".join(Path(words[words.index("train") + 1]).with_suffix("").parts[-2:])
    return None


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def commit() -> str:
    """The commit of the checkout that this package runs from, with `+` when files differ from it; "" outside one."""
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
