"""Public functions on trained models: evaluate, evaluate_all, look, report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from maskwise.build import dataset, encoder
from maskwise.build.classifiers import classifier_of
from maskwise.build.images import images_at, value_range_of
from maskwise.build.models import MODEL_OPTIONS, PIXEL_MODELS, opened_model, pixel_model
from maskwise.build.running.run_folder import recipe_of
from maskwise.build.untrained import untrained_of
from maskwise.data.datasets.labels import why_unlabeled
from maskwise.data.notes import notes
from maskwise.distributed.environment import world_size
from maskwise.distributed.world import World
from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.report import Report
from maskwise.export import load
from maskwise.process.streams import print_notice
from maskwise.recipe.evaluation_schedule import requested
from maskwise.recipe.reading import read_recipe

LOOK_LIMIT = 24  # images of a folder or frames of a video


def datasets_at(name: str, role: str, path, channels: int = 3, value_range=None) -> dict:
    """Open the images of a role -> {role: dataset}, or all roles of a benchmark set found at `path`."""
    if isinstance(path, dict):
        return path
    reader = EVALUATIONS[name].readers.get(role)
    if reader and isinstance(path, (str, Path)) and (sets := reader(path)):
        return sets
    return {role: images_at(path, channels=channels, value_range=value_range)}


def loaded_option(key: str, value):
    """Load an option given as a path to a model: `guide` is an encoder, `head` the projection head of a run."""
    if not isinstance(value, (str, Path)):
        return value
    if key == "head":
        from maskwise.export.saved_head import load_head

        return load_head(value)
    return load.load(value) if key == "guide" else value


def takes_classifier(name: str) -> bool:
    """Whether an evaluation scores a classifier, such as that of a supervised run."""
    return "classifier" in EVALUATIONS[name].option_names


def evaluation_data(name: str, model, channels: int, train, test) -> dict:
    """Open the datasets of an evaluation by role, by default those of the run folder `model`.

    Raises UserError where images or labels that the evaluation requires are missing.
    """
    data: dict = {}
    for role, path in (("train", train), ("test", test)):
        if path is not None:
            data = datasets_at(name, role, path, channels, value_range_of(model)) | data
    if not data and isinstance(model, (str, Path)) and (Path(model) / "recipe.yaml").is_file():
        recipe = read_recipe(model)
        opened = {role: dataset(recipe, role) for role in ("train", "test")}
        data = {role: images for role, images in opened.items() if images is not None}
    missing = [role for role in EVALUATIONS[name].requires if role not in data]
    if missing:
        folders = " ".join(f"{role}=FOLDER" for role in missing)
        raise UserError(
            f"evaluate {name}: no {' and no '.join(missing)} images; give {folders} (one subfolder per class)"
        )
    for role in ("train", "test") if EVALUATIONS[name].labels else ():
        if role in data and data[role].labels is None:
            raise UserError(f"evaluate {name}: {why_unlabeled(data[role], f'the {role} images')}")
    return data


def evaluate(
    name: str, model, /, *, train=None, test=None, world: World | None = None, light: bool = False, **options
) -> Report:
    """Run one evaluation on an encoder, a timm model, or anything that `maskwise.load` accepts.

    `pixels` and `whitened_pixels` are models too: baselines of every evaluation, the latter fitted to the training
    images. train, test: folders, list files or datasets; by default the data of the run folder. A model given by path
    is loaded to the GPU, if there is one; an encoder stays on its device. Under torchrun the ranks share the work and
    all return the report. light: for a supervised MAP run, score the averaged tokens alone. options: those of the
    evaluation, and for a model given by path those of `maskwise.load`. Raises UserError for an unknown evaluation or
    missing data.
    """
    if name not in EVALUATIONS:
        raise UserError(f"no evaluation {name}; there are {', '.join(EVALUATIONS)}")
    by_name = isinstance(model, str) and model in PIXEL_MODELS and not Path(model).exists()
    from_path = isinstance(model, (str, Path)) and not by_name
    model = os.path.expanduser(model) if from_path else model
    of_model = {key: options.pop(key) for key in MODEL_OPTIONS if key in options}
    encoder_ = pixel_model(model, of_model) if by_name else opened_model(model, of_model)
    data = evaluation_data(name, model, len(encoder_.mean), train, test)
    fitted = by_name and model == "whitened_pixels"
    if fitted and "train" not in data:
        raise UserError(f"evaluate {name}: whitened_pixels are fitted to training images; give train=FOLDER")
    options = {key: loaded_option(key, value) for key, value in options.items()}
    started = None
    if world is None and (from_path or by_name or world_size() > 1):
        started = World.start()
    world = world or started or World()
    classifier = None
    if from_path and takes_classifier(name) and options.get("probe") is None:
        classifier = classifier_of(model, encoder_, of_model.get("weights", "teacher"), light)
    if classifier is not None:
        options["classifier"] = classifier.to(world.device)
    elif light:
        raise UserError(f"evaluate {name}: light=true needs a supervised run with classifier map; leave it out")
    with (started or World()).fail_together():
        encoder_ = encoder_.to(world.device) if from_path or by_name else encoder_
        if fitted:
            encoder_.fit(data["train"], world)
        report = EVALUATIONS[name](encoder_, data, world, **options)
        report.notes = notes(data)
        report.protocol |= {"loaded_with": of_model} if of_model else {}
        if from_path and Path(model).is_dir() and world.is_main:
            try:
                report.save(Path(model) / "reports" / f"{name}.json")
            except UserError as error:  # a folder that cannot be written can be evaluated
                print_notice(f"{error}; the report is not saved there")
    return report


def evaluate_all(
    model,
    folder,
    out,
    *,
    also=(),
    baselines: bool = True,
    probe=None,
    recipe: str | None = None,
    limit: int | None = None,
    batch_size: int = 256,
    say=print,
    **of_model,
) -> dict:
    """Run every evaluation that a folder of datasets allows; reports, pictures, TensorBoard and table.md go to `out`.

    also: evaluations that train a model or record every layer, each a name or a line `NAME option=value ...`;
    baselines: beside k-NN, that of the untrained network and of pixels; probe: score by this linear probe; limit:
    images of each labeled set; recipe: the recipe whose published numbers are listed for comparison, by default that of
    the run; of_model: options of `maskwise.load`. Returns {task: Report}.
    """
    from maskwise.evaluation.suite.run_all import run_all

    from_path = isinstance(model, (str, Path))
    encoder_ = opened_model(model, of_model)
    also = requested((also,) if isinstance(also, str) else also)
    world = World.start()
    with world.fail_together():
        encoder_ = encoder_.to(world.device) if from_path else encoder_
        options = {
            "recipe": recipe or (recipe_of(model) if from_path else None),
            "also": also,
            "baselines": baselines_beside(model, encoder_) if baselines else None,
            "probe": probe,
            "limit": limit,
            "batch_size": batch_size,
        }
        return run_all(encoder_, folder, os.path.expanduser(out), world, **options, say=say)


def baselines_beside(model, encoder_):
    """Return the k-NN baselines as a callable(data, world, k=, batch_size=), with the model's untrained network."""
    from maskwise.evaluation.baselines import baselines

    untrained = untrained_of(model)
    if untrained is not None:
        untrained = untrained.to(next(encoder_.parameters()).device)
    return partial(baselines, untrained=untrained)


def look(
    model,
    images,
    out,
    masking: str | None = None,
    ratio: float = 0.5,
    *,
    mass: float | None = None,
    blocks: bool = False,
    beside: Sequence[str] = (),
    size: int | None = None,
    limit: int = LOOK_LIMIT,
    point: Sequence[float] | None = None,
    json: str | os.PathLike | None = None,
    **of_model,
) -> Path:
    """Draw what a model sees in images: a PNG sheet, an interactive HTML page, or a folder with both.

    images: one or several, each a file, a folder, a video or what `encoder.transform` takes. out: ends with .png or
    .html; without an ending it is a folder for the page, a sheet of each image, and the numbers as JSON. Sheet and page
    show whole images: attention of every head and block, the patches that hold `mass` of it, the masks of every
    masking at `ratio`, boxes of LOST and DINO-seg, similarities to the patch at `point` (x, y from 0 to 1), principal
    components. size: side in pixels of the square whose area an image gets, by default the model's; limit: images of
    each folder or video, evenly spread. With a .png, three options draw smaller sheets of square crops of `size`:
    masking, one masking's masks; blocks, the class token's attention in every block; beside, the attention of further
    models; mass alone too. json: a file for the numbers: boxes and counts of patches. of_model: options of
    `maskwise.load` for a model given by path. Returns `out`.
    """
    from maskwise.build.look import LookOptions, draw

    chosen = LookOptions(masking, ratio, mass, blocks, tuple(listed(beside)), size, limit, point, json)
    return draw(model, opened_model(model, of_model), listed(images), Path(out).expanduser(), chosen)


def listed(images) -> list:
    """Return images as a list; a file, a PIL image, an array or a tensor [C, H, W] is one image."""
    is_one = isinstance(images, (str, os.PathLike, Image.Image)) or getattr(images, "ndim", 4) < 4
    return [images] if is_one else list(images)


def report(run) -> Report:
    """Report on a finished run: k-NN against the untrained encoder and raw pixels, masks on objects, curves."""
    from maskwise.evaluation.suite.run_report import run_report

    folder = Path(run).expanduser()
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a run folder (it has no recipe.yaml); give the --out of a training run")
    recipe = read_recipe(folder)
    test = dataset(recipe, "test")
    if test is None:
        raise UserError(f"{run} has no labeled test images; use `maskwise evaluate knn {run} train=... test=...`")
    return run_report(load.load(folder), encoder(recipe), folder, {"train": dataset(recipe), "test": test})
