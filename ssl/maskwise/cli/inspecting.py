"""`maskwise show`, `maskwise list` and `maskwise bench`."""

from __future__ import annotations

import os
import sys

from maskwise.cli.console import Parser, check_folder_of, print_line
from maskwise.errors import UserError
from maskwise.process.streams import is_terminal


def show_parser() -> Parser:
    """Options of `maskwise show`."""
    parser = Parser("maskwise show", description="Print a recipe with all defaults, and where each value comes from.")
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a recipe file, a run folder, or a shipped recipe such as debug/tiny"
    )
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    return parser


def show(words: list[str]) -> int:
    """Print a resolved recipe."""
    given = show_parser().parse_intermixed_args(words)
    from maskwise.recipe.reading import read_recipe

    recipe = read_recipe(given.recipe, *given.overrides)
    print_line(f"# {recipe.source}, hash {recipe.hash()}\n{recipe.explained()}", end="")
    return 0


def list_parser() -> Parser:
    """Options of `maskwise list`."""
    parser = Parser("maskwise list", description="Print the choices for a recipe key, read from the code's tables.")
    parser.add_argument(
        "table",
        metavar="TABLE",
        nargs="?",
        help="poolings, maskings, methods, backbones, datasets, evaluations, recipes or keys",
    )
    return parser


def list_table(words: list[str]) -> int:
    """Print one table, or the names of the tables."""
    given = list_parser().parse_args(words)
    import shutil

    from maskwise.cli.tables import LISTINGS, listing

    if given.table is None:
        print_line("\n".join(f"maskwise list {name:<12} {make.__doc__}" for name, make in LISTINGS.items()))
    else:
        width = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None
        print_line(listing(given.table).text(width))
    return 0


def bench_parser() -> Parser:
    """Options of `maskwise bench`; each benchmark adds its own."""
    from maskwise.bench import BENCHES

    parser = Parser(
        "maskwise bench",
        description=f"Run a benchmark: {', '.join(BENCHES)}. `maskwise bench BENCHMARK --help` prints its options.",
    )
    parser.add_argument("benchmark", metavar="BENCHMARK", choices=tuple(BENCHES))
    add_json_option(parser)
    return parser


def add_json_option(parser) -> None:
    """Add the option that all benchmarks have."""
    parser.add_argument("--json", metavar="FILE", type=os.path.expanduser, help="write the measurements there")


def bench(words: list[str]) -> int:
    """Run a benchmark, print its tables and write its JSON."""
    import importlib

    from maskwise.bench import BENCHES, record

    if not words or words[0] in ("-h", "--help"):
        print_line(bench_parser().format_help().rstrip())
        raise SystemExit(0)
    if words[0] not in BENCHES:
        raise UserError(f"no benchmark `{words[0]}`; there are {', '.join(BENCHES)}")
    module = importlib.import_module(BENCHES[words[0]])
    parser = module.parser(Parser)
    add_json_option(parser)
    given = parser.parse_intermixed_args(words[1:])
    check_folder_of("--json", given.json)
    result = module.run(given)
    if given.json:
        record.write(given.json, result)
    print_line(module.text(result))
    return 0
