"""Records in a run folder: the resolved recipe, and run.json with the machine and versions of each start."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from maskwise import __version__
from maskwise.data.class_matching import class_names
from maskwise.data.decoding import jpeg
from maskwise.data.own_crops import title
from maskwise.distributed.world import World
from maskwise.engine.atomic_file import write_atomic
from maskwise.export.initial_model import InitialModel
from maskwise.recipe.recipe import Recipe


def read_run(folder: Path) -> dict:
    """Return run.json of a run folder, {} where there is no run, or no run.json that can be read."""
    if not (folder / "recipe.yaml").is_file():
        return {}
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else {}
    return {}


def write_run(
    folder: Path,
    recipe: Recipe,
    world: World,
    precision: str,
    images: dict,
    start: InitialModel | None = None,
    inherited: dict | None = None,
    transform: Callable | None = None,
) -> None:
    """Write recipe.yaml (resolved) and run.json; images: their `contents`; inherited: entries of an extended run;
    transform: of the user, recorded by name.

    Raises UserError when the disk refuses.
    """
    record = {
        "precision": precision,
        "recipe": recipe.source,
        "recipe_hash": recipe.hash(),
        "images": images["count"],
        "data": images,
        "decoder": jpeg.resolve_decoder(recipe.data.decoder),
        **start_record(world),
        "command": shlex.join(["maskwise", *sys.argv[1:]]),
    }
    if transform is not None:
        record["transform"] = title(transform)
    if start:
        record["start"] = start.record()
    record |= inherited or {}
    for name, text in (("run.json", json.dumps(record, indent=2)), ("recipe.yaml", recipe.resolved_yaml())):
        write_atomic(folder / name, text)


def start_record(world: World) -> dict:
    """Return ranks, device, time and versions of a start; run.json lists each start with its first step."""
    return {
        "ranks": world.size,
        "device": device_name(world.device),
        "commit": commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "versions": {"maskwise": __version__, "python": platform.python_version(), "torch": torch.__version__},
    }


def checkpoint_record(recipe: Recipe, classes: int | None, data) -> dict:
    """Return the metadata of a run's checkpoints: recipe, commit, and the classes of a supervised run."""
    record = {"recipe": recipe.resolved_yaml(), "recipe_hash": recipe.hash(), "commit": commit()}
    if classes is not None:
        record["classes"] = {"count": classes, "names": class_names(data)}
    return record


def recipe_of(run) -> str | None:
    """Return the name of the shipped recipe in a run's recorded command, None where it names none."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        command = json.loads((Path(run) / "run.json").read_text(encoding="utf-8"))["command"]
        words = shlex.split(command)
        return "/".join(Path(words[words.index("train") + 1]).with_suffix("").parts[-2:])
    return None


def device_name(device: torch.device) -> str:
    """Return the model of a GPU, or the number of CPU cores and their architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def commit() -> str | None:
    """Return the commit of the checkout that holds this package, with `+` if files differ; None outside a checkout.

    An installed package is in no checkout, even if its environment lies in one of another project.
    """
    file = Path(__file__).resolve()
    if git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return git(file.parent, "describe", "--always", "--dirty=+", "--abbrev=12")


def git(folder: Path, *words: str) -> str | None:
    """Return what a git command in a folder prints, None where it fails."""
    options = {"cwd": folder, "capture_output": True, "text": True, "encoding": "utf-8", "timeout": 5}
    try:
        answer = subprocess.run(["git", *words], **options)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
