"""`maskwise evaluate`, `maskwise baselines` and `maskwise look`."""

from __future__ import annotations

import argparse
import json
import os

from maskwise.cli.console import Parser, check_folder_of, print_line
from maskwise.cli.model_options import split
from maskwise.errors import UserError
from maskwise.process.progress import showing
from maskwise.process.streams import is_first_rank

KINDS = {".png": "sheet", ".html": "page", ".htm": "page"}  # of files that `look` writes


def evaluate_parser() -> Parser:
    """Options of `maskwise evaluate`."""
    parser = Parser(
        "maskwise evaluate",
        description="Evaluate a model: knn, linear ...; train=DIR test=DIR and the options of that evaluation, "
        "such as k=[10,20]; num_heads, gamma and the other options of maskwise.load for a weights file.",
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="an evaluation, such as knn or linear (`maskwise list evaluations` prints them); "
        "all: every one that the datasets in --data allow",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=os.path.expanduser,
        help="a run folder, an exported folder or a checkpoint file; pixels or whitened_pixels for these baselines",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=os.path.expanduser,
        help="write the report there as JSON; with `all`: the folder for reports, pictures and table.md",
    )
    parser.add_argument("--data", metavar="DIR", type=os.path.expanduser, help="with `all`: a folder of datasets")
    parser.add_argument("options", metavar="key=value", nargs="*")
    return parser


def evaluate(words: list[str]) -> int:
    """Run one evaluation, or all of them, and print the numbers."""
    given = evaluate_parser().parse_intermixed_args(words)
    if given.name == "all":
        return evaluate_all(given)
    from maskwise import api
    from maskwise.recipe.evaluation_schedule import options_of
    from maskwise.recipe.schema import nearest

    if given.name not in api.EVALUATIONS:
        names = ", ".join(api.EVALUATIONS)
        raise UserError(f"no evaluation {given.name}{nearest(given.name, api.EVALUATIONS)}; there are {names}")
    if given.data is not None:
        raise UserError(f"evaluate {given.name}: --data goes with `all`; give train=DIR test=DIR")
    of_model, words = split(given.options, f"evaluate {given.name}")
    options = options_of(words, f"evaluate {given.name}", api.evaluate, api.EVALUATIONS[given.name].options)
    with showing(given.name):
        report = api.evaluate(given.name, given.model, **of_model, **options)
    for key, value in report.numbers.items():
        rounded = isinstance(value, float) and not 0 < abs(value) < 0.01
        print_line(f"{key:<24} {value:.2f}" if rounded else f"{key:<24} {value}")
    for note in report.notes:
        print_line(note)
    for line in report.protocol.get("differences", ()):
        print_line(f"differs from {report.protocol.get('preset', 'the paper')}: {line}")
    if given.out:
        report.save(given.out)
        print_line(f"report: {given.out}")
    return 0


def evaluate_all(given: argparse.Namespace) -> int:
    """Run every evaluation that the datasets in --data allow."""
    if given.data is None:
        raise UserError("evaluate all: no data; give --data DIR, a folder that holds datasets")
    from maskwise import api
    from maskwise.recipe.evaluation_schedule import options_of

    of_model, words = split(given.options, "evaluate all")
    options = options_of(words, "evaluate all", api.evaluate_all)
    out = given.out or (os.path.join(given.model, "evaluations") if os.path.isdir(given.model) else "evaluations")
    with showing("all"):
        reports = api.evaluate_all(given.model, given.data, out, **of_model, **options, say=print_line)
    print_line(f"{len(reports)} evaluations: {os.path.join(out, 'table.md')}")
    return 0


def baselines_parser() -> Parser:
    """Options of `maskwise baselines`."""
    parser = Parser(
        "maskwise baselines",
        description="Print k-NN accuracy without training: of an untrained network, of raw and of PCA-whitened pixels; "
        "for a recipe or run, or for labeled images (without test images, a tenth of each class is held out).",
    )
    parser.add_argument(
        "source",
        metavar="FOLDER|RECIPE",
        type=os.path.expanduser,
        help="a folder with one subfolder per class, or with train/ and val/ of these, or a list file; or a recipe "
        "file, a shipped recipe, a run folder",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=os.path.expanduser,
        help="write the report there, with command, commit, date and machine; `-`: to standard output instead",
    )
    parser.add_argument(
        "options",
        metavar="key=value",
        nargs="*",
        help="test=FOLDER, k=[10,20], size=PIXELS, limit_train=N, limit_test=N, batch_size=N; of a folder also "
        "backbone=NAME image_size=PIXELS seed=N; of a recipe section.key=value",
    )
    return parser


def baselines(words: list[str]) -> int:
    """Print the baselines of k-NN, or write them as JSON."""
    given = baselines_parser().parse_intermixed_args(words)
    check_folder_of("--json", given.json)
    from maskwise.bench import record
    from maskwise.build.baselines import baselines as measure
    from maskwise.distributed.world import World
    from maskwise.evaluation.baselines import table
    from maskwise.recipe.evaluation_schedule import options_of
    from maskwise.recipe.reading import read_recipe

    overrides = [word for word in given.options if "." in word.partition("=")[0]]
    others = [word for word in given.options if word not in overrides]
    options = options_of(others, "baselines", measure)
    source = given.source
    if not is_images(source):
        source = read_recipe(source, *overrides)
    elif overrides:
        raise UserError(f"baselines: {overrides[0]} goes with a recipe, and {source} holds images")
    piped = given.json == "-"
    with showing(None if piped else "baselines"):
        report = measure(source, **options)
    if given.json is None:
        print_line(table(report))
        return 0
    seed = next(iter(report.seeds.values()), None)
    result = {"record": record.describe(World.start().device, seed=seed), **report.content()}
    if piped:
        print_line(json.dumps(result, indent=1))
    else:
        if is_first_rank():
            record.write(given.json, result)
        print_line(table(report))
    return 0


def is_images(source: str) -> bool:
    """Whether a path is that of images: a folder that is no run, or a list file."""
    if os.path.isdir(source):
        return not os.path.isfile(os.path.join(source, "recipe.yaml"))
    return os.path.isfile(source) and not source.endswith((".yaml", ".yml"))


def look_parser() -> Parser:
    """Options of `maskwise look`."""
    parser = Parser(
        "maskwise look",
        description="Draw what a model sees in images: attention of every head and block, masks, boxes of objects, "
        "similar patches; as a PNG sheet, an interactive HTML page, or a folder with both.",
    )
    parser.add_argument(
        "model", metavar="MODEL", type=os.path.expanduser, help="a run folder, an exported folder or a checkpoint file"
    )
    parser.add_argument(
        "images",
        metavar="IMAGE|FOLDER|VIDEO",
        type=os.path.expanduser,
        nargs="+",
        help="images, folders of images or frames, videos; then size=PIXELS ratio=SHARE mass=SHARE point=[X,Y] "
        "limit=N, on a PNG masking=NAME, blocks=true, mass=SHARE or beside=[MODEL,...] alone, and the options of "
        "maskwise.load, as key=value",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=os.path.expanduser,
        default="look.png",
        help="FILE.png: a sheet, FILE.html: an interactive page, a name without an ending: a folder with the page, "
        "one sheet for each image, and the numbers (default: %(default)s)",
    )
    parser.add_argument(
        "--json", metavar="FILE", type=os.path.expanduser, help="write boxes and counts of patches there"
    )
    return parser


def look(words: list[str]) -> int:
    """Draw what a model sees in images."""
    given = look_parser().parse_intermixed_args(words)
    check_folder_of("--json", given.json)
    images = [word for word in given.images if os.path.exists(word) or "=" not in word]
    if not images:
        raise UserError("look: no image given; name at least one image file")
    from maskwise import api
    from maskwise.recipe.evaluation_schedule import options_of

    of_model, words = split([word for word in given.images if word not in images], "look")
    options = options_of(words, "look", api.look)
    options |= {"json": given.json} if given.json else {}
    with showing("look"):
        api.look(given.model, images, given.out, **of_model, **options)
    print_line(f"{KINDS.get(os.path.splitext(given.out)[1].lower(), 'folder')}: {given.out}")
    return 0
