"""`maskwise export` and `maskwise convert`."""

from __future__ import annotations

import argparse
import os

from maskwise.cli.console import Parser, print_line
from maskwise.cli.model_options import free_options
from maskwise.errors import UserError

HUB_ONLY = ("private", "revision", "dry_run")  # options that have no meaning for a folder on disk


def export_parser() -> Parser:
    """Options of `maskwise export`."""
    parser = Parser(
        "maskwise export",
        description="Write the encoder of a run as a folder that opens in timm, transformers and maskwise.load.",
    )
    add = parser.add_argument
    add("model", metavar="RUN", type=os.path.expanduser, help="a run folder, an exported folder or a checkpoint file")
    add(
        "--to",
        metavar="DIR|hub:NAME",
        type=os.path.expanduser,
        required=True,
        help="the folder to write, or hub:owner/name",
    )
    add("--weights", choices=("teacher", "student"), default="teacher", help="which network (default: %(default)s)")
    add("--heads", action="store_true", help="add the projection head and the centers, to continue training from")
    add("--light", action="store_true", help="of a run with classifier map: the averaged tokens alone (MAP-light)")
    add("--onnx", action="store_true", help="add onnx/model.onnx")
    add("--onnx-attention", action="store_true", help="add onnx/model_attention.onnx; its third output is attention")
    add("--pt2", action="store_true", help="add encoder.pt2, a program of torch.export")
    add("--license", metavar="ID", default="unknown", help="license of the weights, such as apache-2.0")
    add("--dataset", metavar="ID", action="append", default=[], help="data in the card's header; may be repeated")
    add("--base-model", metavar="ID", help="the model that this one was fine-tuned from")
    add(
        "--picture",
        choices=("run", "shapes"),
        help="the card's picture: the run's own, or embedded images (default on a public Hub page)",
    )
    add("--private", action="store_true", help="hub: a private repository")
    add("--revision", metavar="NAME", help="hub: the branch to commit to")
    add("--dry-run", action="store_true", help="hub: print what would be uploaded, and upload nothing")
    return parser


def export(words: list[str]) -> int:
    """Export to a folder or to the Hub."""
    given = export_parser().parse_intermixed_args(words)
    options = export_options(given)
    from maskwise.export import release

    if given.to.startswith("hub:"):
        hub_options = {name: getattr(given, name) for name in HUB_ONLY}
        address = release.push_to_hub(given.model, given.to.removeprefix("hub:"), **hub_options, **options)
        print_line(f"{'would be pushed' if given.dry_run else 'pushed'}: {address}")
        return 0
    for name in HUB_ONLY:
        if getattr(given, name):
            raise UserError(f"--{name.replace('_', '-')} is for the Hub: give --to hub:owner/name, or leave it out")
    release.export(given.model, given.to, **{**options, "picture": given.picture or "run"})
    print_line(f"exported: {given.to}")
    return 0


def export_options(given: argparse.Namespace) -> dict:
    """Arguments that a folder and the Hub have in common."""
    programs = {"onnx": given.onnx, "onnx-attention": given.onnx_attention, "pt2": given.pt2}
    return {
        "weights": given.weights,
        "heads": given.heads,
        "light": given.light,
        "onnx": [name for name, wanted in programs.items() if wanted],
        "license": given.license,
        "datasets": given.dataset,
        "base_model": given.base_model,
        "picture": given.picture,
        "say": print_line,
    }


def convert_parser() -> Parser:
    """Options of `maskwise convert`."""
    parser = Parser(
        "maskwise convert",
        description="Read any supported model and write a maskwise folder, or a file in another layout. "
        "key=value: num_heads, gamma, name, position and the other overrides of maskwise.load.",
    )
    add = parser.add_argument
    add("model", metavar="FILE", type=os.path.expanduser, help="a weights file, a run folder or an exported folder")
    add(
        "--to",
        metavar="FILE|DIR",
        type=os.path.expanduser,
        required=True,
        help="a folder, or a file ending in .pth, .pt or .safetensors",
    )
    add("--from", dest="source", metavar="LAYOUT", help="the layout of FILE, where its keys are ambiguous")
    add(
        "--layout",
        metavar="LAYOUT",
        help="the layout of the file to write: dino, ibot, attmask, simpool, timm, dinov2 or dinov3",
    )
    add("--weights", metavar="NAME", help="only the teacher, or only the student")
    add("overrides", metavar="key=value", nargs="*")
    return parser


def convert(words: list[str]) -> int:
    """Convert weights between layouts."""
    given = convert_parser().parse_intermixed_args(words)
    from maskwise.export import convert as converter

    lines = converter.convert(
        given.model,
        given.to,
        layout=given.layout,
        source_layout=given.source,
        weights=given.weights,
        **free_options(given.overrides, "convert"),
    )
    for line in lines:
        print_line(line)
    return 0
