"""`maskwise embed`, `maskwise search` and `maskwise dupes`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from maskwise.cli.console import Parser, print_line
from maskwise.cli.model_options import split
from maskwise.errors import UserError

MODEL_HELP = "a run folder, an exported folder, a weights file, timm:NAME or hub:OWNER/NAME"
SHOWN_GROUPS = 10  # on the console
IMAGES_HELP = "a folder, a list file (.txt, .csv, .jsonl ...), a tar file, or `shapes`, the embedded images"


def embed_parser() -> Parser:
    """Options of `maskwise embed`."""
    parser = Parser(
        "maskwise embed",
        description="Write one row per image (path, label, width, height, vector) to a Parquet, CSV or NPY file. The "
        "same command continues an interrupted one; under torchrun the ranks share the images.",
    )
    parser.add_argument("model", metavar="MODEL", type=os.path.expanduser, help=MODEL_HELP)
    parser.add_argument("images", metavar="IMAGES", type=os.path.expanduser, help=IMAGES_HELP)
    parser.add_argument(
        "--to", metavar="FILE", type=os.path.expanduser, required=True, help="x.parquet, x.csv or x.npy"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "options",
        metavar="key=value",
        nargs="*",
        help="features=pooled+patch_mean (joined) or [pooled,patches], precision=bf16, dtype=float16, batch_size=256; "
        "data.name=huggingface, data.split=train and other options of the images; options of maskwise.load",
    )
    return parser


def embed(words: list[str]) -> int:
    """Embed images into a file."""
    given = embed_parser().parse_intermixed_args(words)
    from maskwise.build import embedding
    from maskwise.recipe.evaluation_schedule import options_of

    of_model, words = split(given.options, "embed")
    of_data, words = data_options(words, given.images, "data")
    options = options_of(words, "embed", embedding.embed)
    meta = embedding.embed(given.model, given.images, given.to, data_options=of_data, **options, **of_model)
    unreadable = meta["images"]["count"] - meta["rows"]
    if given.json:
        print_line(json.dumps({"file": given.to, "unreadable": unreadable, **meta}, indent=1))
        return 0
    size = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in meta["dimensions"].items())
    print_line(f"{meta['rows']} images, {size}: {given.to}")
    if unreadable:
        print_line(f"{unreadable} unreadable images: {given.to}.unreadable.csv")
    return 0


def search_parser() -> Parser:
    """Options of `maskwise search`."""
    parser = Parser(
        "maskwise search",
        description="Print the images of an embedding file that are nearest to given images, by the cosine of their "
        "vectors; exact.",
    )
    parser.add_argument("model", metavar="MODEL", type=os.path.expanduser, help=f"that made the file: {MODEL_HELP}")
    parser.add_argument("embeddings", metavar="EMBEDDINGS", type=os.path.expanduser, help="a file of `maskwise embed`")
    parser.add_argument(
        "images",
        metavar="IMAGE",
        type=os.path.expanduser,
        nargs="+",
        help="image files; then k=10, feature=NAME, and the options of maskwise.load, as key=value",
    )
    parser.add_argument("--page", metavar="FILE", type=os.path.expanduser, help="write an HTML page with the images")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def search(words: list[str]) -> int:
    """Search an embedding file."""
    given = search_parser().parse_intermixed_args(words)
    check_outputs(given.page)
    from maskwise.build import embedding
    from maskwise.embedding.search import write_page
    from maskwise.recipe.evaluation_schedule import options_of

    images = [word for word in given.images if os.path.exists(word) or "=" not in word]
    if not images:
        raise UserError("search: no image given; name at least one image file")
    of_model, words = split([word for word in given.images if word not in images], "search")
    options = options_of(words, "search", embedding.search)
    found = embedding.search(given.model, given.embeddings, images, **options, **of_model)
    table = found.table()
    if given.page:
        write_page(found, Path(given.page), f"Nearest images in {given.embeddings}")
    if given.json:
        print_line(json.dumps(table, indent=1))
        return 0
    for entry in table:
        print_line(entry["query"])
        for item in entry["neighbors"]:
            label = f"  label {item['label']}" if "label" in item else ""
            print_line(f"  {item['rank']:>3}  {item['cosine']:7.4f}  {item['path']}{label}")
    if given.page:
        print_line(f"page: {given.page}")
    return 0


def dupes_parser() -> Parser:
    """Options of `maskwise dupes`."""
    parser = Parser(
        "maskwise dupes",
        description="Find near-duplicates among training images, and test images that leak into them, by the cosine "
        "of a model's vectors; exact.",
    )
    parser.add_argument("model", metavar="MODEL", type=os.path.expanduser, help=MODEL_HELP)
    parser.add_argument(
        "train", metavar="TRAIN", type=os.path.expanduser, help=f"{IMAGES_HELP}; or a file of `maskwise embed`"
    )
    parser.add_argument("test", metavar="TEST", type=os.path.expanduser, nargs="?", help="the same, of test images")
    parser.add_argument("--csv", metavar="FILE", type=os.path.expanduser, help="write the groups as a table")
    parser.add_argument("--page", metavar="FILE", type=os.path.expanduser, help="write the groups as an HTML page")
    parser.add_argument(
        "--keep",
        metavar="FILE",
        type=os.path.expanduser,
        help="write the training images without copies and leaks as a list for data.name=list (.txt, .lst or .csv)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "options",
        metavar="key=value",
        nargs="*",
        help="threshold=0.95 (default: measured on copies of these images), feature=pooled, mirrored=true, "
        "engine=torch|faiss, batch_size, precision; data.KEY and test.KEY of the images; options of maskwise.load",
    )
    return parser


def dupes(words: list[str]) -> int:
    """Find near-duplicates and leaks."""
    given = dupes_parser().parse_intermixed_args(words)
    if given.test is not None and "=" in given.test and not os.path.exists(given.test):
        given.options, given.test = [given.test, *given.options], None
    check_outputs(given.csv, given.page, given.keep)
    from maskwise.build import embedding
    from maskwise.embedding import duplicates
    from maskwise.recipe.evaluation_schedule import options_of

    of_model, words = split(given.options, "dupes")
    of_data, words = data_options(words, given.train, "data")
    of_test, words = data_options(words, given.test or given.train, "test")
    options = options_of(words, "dupes", embedding.dupes)
    found, calibration = embedding.dupes(
        given.model,
        given.train,
        given.test,
        keep_list=Path(given.keep) if given.keep else None,
        data_options=of_data,
        test_options=of_test,
        **options,
        **of_model,
    )
    counts = found.summary()
    if given.csv:
        duplicates.write_groups(found, Path(given.csv))
    if given.page:
        duplicates.write_page(found, Path(given.page), f"Near-duplicates in {given.train}")
    if given.keep:
        duplicates.write_list(found, Path(given.keep))
    if given.json:
        measured = dataclasses.asdict(calibration) if calibration else None
        print_line(json.dumps({**counts, "measured": measured, "groups": list(found.rows())}, indent=1))
        return 0
    print_line(calibration.line() if calibration else f"threshold {found.threshold:g}")
    print_line(
        f"{counts['pairs']} pairs within {counts['train']} training images, {counts['leaks']} with "
        f"{counts['test']} test images, {counts['groups']} groups"
    )
    shown = 0
    for row in found.rows():
        if row["group"] > SHOWN_GROUPS:
            break
        shown = row["group"]
        removed = "" if row["kept"] == "yes" else "  removed"
        print_line(f"  {row['group']:>3}  {row['set']:<5}  {row['similarity']:.4f}  {row['path']}{removed}")
    if counts["groups"] > shown:
        print_line(f"  and {counts['groups'] - shown} more groups: --csv FILE or --page FILE has all")
    for name, file in (("groups", given.csv), ("page", given.page)):
        if file:
            print_line(f"{name}: {file}")
    if given.keep:
        print_line(f"{len(found.kept)} images to keep, {counts['removed']} removed: {given.keep}")
    return 0


def check_outputs(*files: str | None) -> None:
    """Raise UserError for a file in a folder that does not exist, before anything is computed."""
    for file in filter(None, files):
        if not os.path.isdir(os.path.dirname(file) or "."):
            raise UserError(f"{file}: its folder does not exist; make it first")


def data_options(words: list[str], images: str, section: str) -> tuple[dict[str, object], list[str]]:
    """Split `SECTION.key=value` words off as arguments of the dataset that `images` names; returns the other words."""
    from maskwise.build.images import images_kind
    from maskwise.data.datasets import DATASETS
    from maskwise.recipe.evaluation_schedule import options_of

    own = [word.removeprefix(f"{section}.") for word in words if word.startswith(f"{section}.")]
    rest = [word for word in words if not word.startswith(f"{section}.")]
    name = next((word.removeprefix("name=") for word in own if word.startswith("name=")), images_kind(images))
    if name not in DATASETS:
        raise UserError(f"{section}.name={name} is unknown; choose {', '.join(DATASETS)}")
    options = options_of(
        [word for word in own if not word.startswith("name=")], f"{section}.name={name}", DATASETS[name]
    )
    return {"name": name, **options}, rest
