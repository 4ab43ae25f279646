"""The verbs for what is trained: evaluate, look, report."""

from __future__ import annotations

import contextlib
import inspect
import os
from pathlib import Path

import torch

from maskwise import labelled
from maskwise.build import dataset, encoder
from maskwise.data.datasets import DATASETS
from maskwise.distributed.world import World
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.report import Report
from maskwise.export import layouts
from maskwise.functional.errors import UserError
from maskwise.methods.masking import MASKINGS
from maskwise.recipe import read_recipe
from maskwise.run_record import recipe_of


def images_at(path, split: str | None = None, channels: int = 3):
    """A labelled or unlabelled folder, or a list file, as the evaluations take it; a dataset is handed through."""
    if hasattr(path, "image"):
        return path
    kind = "list" if Path(path).expanduser().is_file() else "folder"
    return DATASETS[kind](path=path, split=split, channels=channels)


def laid_out(name: str, role: str, path, channels: int = 3) -> dict:
    """The images at a path by role: as the evaluation's own layout has them where it has one, else a folder; datasets pass through."""
    reader = getattr(EVALUATIONS[name], "readers", {}).get(role)
    if isinstance(path, dict):
        return path
    return (reader(path) if reader and isinstance(path, (str, Path)) else {}) or {role: images_at(path, channels=channels)}


def handed(key: str, value):
    """An option that stands for a model: `guide` is an encoder, `head` the projection head of a run."""
    if not isinstance(value, (str, Path)):
        return value
    if key == "head":
        from maskwise.export.run_head import load_head

        return load_head(value)
    return layouts.load(value) if key == "guide" else value


def takes_classifier(name: str) -> bool:
    """Whether an evaluation scores a classifier, such as the one that a supervised run has learnt."""
    return "classifier" in inspect.signature(EVALUATIONS[name]).parameters


def evaluate(name: str, model, *, train=None, test=None, world: World | None = None, light: bool = False, **options) -> Report:
    """Run an evaluation on an encoder, or on what `maskwise.load` accepts; train and test are folders or datasets.

    Where they are not given, a run folder's own data serve. What is loaded here goes to this machine's GPU, if there is one, an
    encoder stays where it is; under torchrun the ranks share the work and all get the report. light: of a supervised MAP run, its
    averaged tokens alone. Raises UserError for an unknown evaluation or missing data.
    """
    if name not in EVALUATIONS:
        raise UserError(f"no evaluation {name}; there are {', '.join(EVALUATIONS)}")
    built = layouts.load(model) if isinstance(model, (str, Path)) else model
    data = {}
    for role, path in (("train", train), ("test", test)):
        if path is not None:
            data |= laid_out(name, role, path, len(built.mean))
    if not data and isinstance(model, (str, Path)) and (Path(model) / "recipe.yaml").is_file():
        recipe = read_recipe(model)
        data = {role: found for role in ("train", "test") if (found := dataset(recipe, role)) is not None}
    options = {key: handed(key, value) for key, value in options.items()}
    missing = [role for role in getattr(EVALUATIONS[name], "needs", ("train", "test")) if role not in data]
    if missing:
        raise UserError(f"evaluate {name}: no {' and no '.join(missing)} images; give {' '.join(f'{role}=FOLDER' for role in missing)} (one subfolder per class)")
    for role, found in data.items():
        if role in ("train", "test") and found.labels is None and getattr(EVALUATIONS[name], "labels", True):
            raise UserError(f"evaluate {name}: {role} has no labels; give a folder with one subfolder per class")
    loaded = isinstance(model, (str, Path))
    ours = World.start() if world is None and (loaded or os.environ.get("WORLD_SIZE", "1") != "1") else None
    world = world or ours or World()
    if loaded and takes_classifier(name) and options.get("probe") is None and (trained := labelled.classifier_of(model, built, light=light)) is not None:
        options["classifier"] = trained.to(world.device)
    elif light:
        raise UserError(f"evaluate {name}: light=true is for a run that has learnt labels with classifier map; leave it out")
    with (ours or World()).together():
        report = EVALUATIONS[name](built.to(world.device) if loaded else built, data, world, **options)
        if loaded and Path(model).is_dir() and world.is_main:
            with contextlib.suppress(OSError):
                (Path(model) / "reports").mkdir(exist_ok=True)
                report.save(Path(model) / "reports" / f"{name}.json")
    return report


def evaluate_all(model, folder, out, *, also=(), probe=None, recipe: str | None = None, limit: int | None = None, batch_size: int = 256, say=print) -> dict:
    """Run every evaluation that a folder of datasets allows; reports, pictures, TensorBoard and table.md go to `out`.

    recipe: whose published numbers stand beside ours, by default the one that the run was started from. Returns {task: Report}.
    """
    from maskwise.evaluation.all import everything

    built = layouts.load(model) if isinstance(model, (str, Path)) else model
    loaded = isinstance(model, (str, Path))
    also = (also,) if isinstance(also, str) else tuple(also)
    world = World.start()
    with world.together():
        built = built.to(world.device) if loaded else built
        options = {"recipe": recipe or (recipe_of(model) if loaded else None), "also": also, "probe": probe, "limit": limit, "batch_size": batch_size}
        return everything(built, folder, out, world, **options, say=say)


def look(model, images, out, masking: str = "attmask_high", ratio: float = 0.5) -> Path:
    """Draw images, the encoder's attention and the mask that a masking makes of it; one PNG sheet at `out`."""
    from maskwise.data.bands import CorruptImage, decode
    from maskwise.evaluation.pictures import training_sheet
    from maskwise.functional.draw import write_png

    built = layouts.load(model) if isinstance(model, (str, Path)) else model
    if masking not in MASKINGS:
        raise UserError(f"no masking {masking}; there are {', '.join(MASKINGS)}")
    shown = []
    for path in images:
        if not Path(path).is_file():
            raise UserError(f"{path} is not a file; give image files")
        try:
            shown.append(built.uncoloured(decode(path, str(path), len(built.mean))))
        except CorruptImage as error:
            raise UserError(f"cannot read the image {path}: {error}") from None
    if not shown:
        raise UserError("no images to look at; name at least one")
    options = {} if masking == "none" else {"ratio": ratio, "var": 0.0, "prob": 1.0}
    sheet = training_sheet(built, torch.stack(shown), MASKINGS[masking](seed=0, **options), torch.arange(len(shown)))
    write_png(out, sheet)
    return Path(out)


def report(run) -> Report:
    """The tables and pictures of a finished run: k-NN beside the untrained encoder and raw pixels, what is hidden, curves."""
    from maskwise.evaluation.quickstart import quickstart

    folder = Path(run)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a run folder (it has no recipe.yaml); give the --out of a training run")
    recipe = read_recipe(folder)
    test = dataset(recipe, "test")
    if test is None:
        raise UserError(f"{run} names no labelled test images; use `maskwise evaluate knn {run} train=... test=...`")
    return quickstart(layouts.load(folder), encoder(recipe), folder, {"train": dataset(recipe), "test": test})
