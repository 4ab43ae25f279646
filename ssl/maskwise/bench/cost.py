"""`maskwise bench cost`: parameters, multiply-adds and throughput of poolings, of recipes and of MAP's tables."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn

from maskwise.bench import algorithm1, record
from maskwise.bench.map_tables import SIZES, TABLES, Row
from maskwise.bench.network_cost import Counted, Network, Timing, count, num_parameters, row_cost, throughput
from maskwise.bench.table import table
from maskwise.bench.table1 import TABLE1, parts_of
from maskwise.distributed.world import World
from maskwise.errors import UserError
from maskwise.nn import POOLINGS, Backbone, Encoder, LinearClassifier, Tokens

NETWORKS = ("resnet18", "resnet50", "convnext_small", "vit_small_patch16_224")
# Table 8 of the SimPool paper: millions of parameters, and 10^9 multiply-adds of convolutions and linear layers.
# ResNet-18 with CaiT is printed with the parameters of two blocks and the multiply-adds of one.
PUBLISHED = {
    "resnet18": {
        "gap": (11.7, 1.82),
        "cait": (18.0, 1.85),
        "slot": (14.6, 1.87),
        "ge": (11.7, 1.83),
        "simpool": (12.2, 1.84),
    },
    "resnet50": {
        "gap": (25.6, 4.13),
        "cait": (75.9, 4.60),
        "slot": (71.7, 4.89),
        "ge": (26.1, 4.15),
        "simpool": (33.9, 4.34),
    },
    "convnext_small": {
        "gap": (50.2, 8.68),
        "cait": (57.3, 8.75),
        "slot": (56.7, 8.79),
        "ge": (50.3, 8.69),
        "simpool": (51.4, 8.71),
    },
    "vit_small_patch16_224": {
        "cls": (22.1, 4.24),
        "cait": (23.8, 4.29),
        "slot": (23.7, 4.30),
        "ge": (22.1, 4.25),
        "simpool": (22.3, 4.26),
    },
}


COLUMNS = [
    "pooling",
    "parameters M",
    "of pooling M",
    "multiply-adds G",
    "of pooling M",
    "here M",
    "published M",
    "published G",
]


ROW_COLUMNS = ["network", "pixels", "parameters M", "multiply-adds G", "published M", "published G", "published top-1"]


def parser(make: Callable[..., ArgumentParser]) -> ArgumentParser:
    """Define the options of `maskwise bench cost`."""
    made = make(
        "maskwise bench cost",
        description="Parameters and multiply-adds of poolings behind networks, of recipes, or of MAP's tables, and "
        "with --throughput images per second.",
    )
    add = made.add_argument
    add("overrides", metavar="section.key=value", nargs="*", help="changes to the recipes of --recipes")
    add("--networks", metavar="A,B", help=f"timm names, with --poolings (default: {','.join(NETWORKS)})")
    add("--poolings", default="all", metavar="A,B", help="rows of `maskwise list poolings`, or all (default)")
    add("--recipes", metavar="A,B", help="whole networks of recipes instead, with their classifiers")
    add("--tables", metavar="A,B", help=f"rows of MAP's tables and figures instead: {', '.join(TABLES)}")
    add("--size", type=int, help="pixels of an image's side (default: 224; of a recipe: its own)")
    add("--classes", type=int, default=1000, help="of the classifier, 0 for none (default: %(default)s)")
    add("--throughput", action="store_true", help="also time inference in float32: images per second")
    add("--batch", type=int, default=16, help="images at a time for --throughput (default: %(default)s)")
    add("--seconds", type=float, default=3.0, help="of timing per network for --throughput (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu or cuda, for --throughput (default: %(default)s)")
    return made


def run(options: Namespace) -> dict:
    """Count and time; raises UserError for an unknown name and for numbers out of range."""
    check(options)
    timing, about, device = None, None, None
    if options.throughput:
        device = World.start(options.device).device
        timing = Timing(options.batch, options.seconds, device)
        about = {"batch": options.batch, "seconds": options.seconds, "precision": "fp32"}
    result = {
        "bench": "cost",
        "record": record.describe(device),
        "size": options.size,
        "classes": options.classes,
        "throughput": about,
    }
    if options.recipes or options.tables:
        rows = {name: TABLES[name] for name in (options.tables or "").split(",") if name}
        if options.recipes:
            names = options.recipes.split(",")
            rows["recipes"] = [Row(name, name, tuple(options.overrides)) for name in names]
        result["tables"] = {name: table_costs(name, rows[name], options, timing) for name in rows}
    if options.networks or "tables" not in result:
        size = result["size"] = options.size or 224
        poolings = list(POOLINGS) if options.poolings == "all" else options.poolings.split(",")
        result["networks"] = {
            name: network_costs(name, poolings, size, options.classes, timing)
            for name in (options.networks or ",".join(NETWORKS)).split(",")
        }
    return result


def check(options: Namespace) -> None:
    """Raise UserError for options that name nothing or are out of range."""
    if options.size is not None and options.size < 1 or options.classes < 0:
        raise UserError(
            f"bench cost: --size {options.size} --classes {options.classes}: "
            "give a size of at least 1, and classes of at least 0"
        )
    if options.batch < 1 or options.seconds < 0:
        raise UserError(
            f"bench cost: --batch {options.batch} --seconds {options.seconds}: "
            "give a batch of at least 1, and seconds of at least 0"
        )
    for name in () if options.poolings == "all" else options.poolings.split(","):
        if name not in POOLINGS:
            raise UserError(f"bench cost: no pooling {name!r}; there are {', '.join(POOLINGS)}")
    for name in options.tables.split(",") if options.tables else ():
        if name not in TABLES:
            raise UserError(f"bench cost: no table {name!r}; there are {', '.join(TABLES)}")
    if options.overrides and not options.recipes:
        raise UserError(f"bench cost: {options.overrides[0]} changes a recipe, and none is given; add --recipes NAME")


def table_costs(name: str, rows: list[Row], options: Namespace, timing: Timing | None) -> list[dict]:
    """Count and time the rows of one table, at each of its image sizes."""
    sizes = (options.size,) if options.size or name not in SIZES else SIZES[name]
    return [row_cost(row, size, options.classes, timing) for size in sizes for row in rows]


@torch.no_grad()
def network_costs(name: str, poolings: list[str], size: int, classes: int, timing: Timing | None = None) -> list[dict]:
    """Count each pooling that fits the network, behind it and a linear classifier, and time the whole."""
    published = PUBLISHED.get(name, {}) if size == 224 and classes == 1000 else {}
    backbones: dict[bool, tuple[Backbone, Counted]] = {}
    rows = []
    for pooling in poolings:
        needs_token = "cls_attention" in POOLINGS[pooling].needs
        if needs_token not in backbones:
            backbones[needs_token] = counted_backbone(name, size, needs_token)
        backbone, counted = backbones[needs_token]
        if needs_token and not backbone.has_class_token:
            continue
        # Not on the meta device: autocast does not support it, and some poolings index by value.
        module = POOLINGS[pooling](backbone.dim).eval().requires_grad_(False)
        shapes = counted.result
        tokens = Tokens(torch.zeros(shapes.patches.shape), torch.zeros(shapes.prefix.shape), shapes.grid)
        here = total_multiply_adds(lambda: module(tokens))
        as_published = total_multiply_adds(lambda: pool_by_table1(module, tokens)) if type(module) in TABLE1 else here
        rows.append(
            {
                "pooling": pooling,
                "parameters": num_parameters(backbone) + num_parameters(module) + (backbone.dim + 1) * classes,
                "pooling_parameters": num_parameters(module),
                "multiply_adds": counted.linear + as_published + backbone.dim * classes,
                "attention_multiply_adds": counted.products,
                "pooling_multiply_adds": as_published,
                "pooling_multiply_adds_here": here,
                "images_per_second": pooling_throughput(name, module, size, classes, timing),
                "published": published.get(pooling),
            }
        )
    return rows


def counted_backbone(name: str, size: int, with_class_token: bool) -> tuple[Backbone, Counted]:
    """Build a backbone on the meta device and count one image."""
    with torch.device("meta"):
        backbone = Backbone(name, image_size=size, class_token=None if with_class_token else False).eval()
        return backbone, count(lambda: backbone(torch.zeros(1, 3, size, size)))


def pooling_throughput(name: str, pooling: nn.Module, size: int, classes: int, timing: Timing | None) -> float | None:
    """Time a network with a pooling and a linear classifier; None without timing."""
    if timing is None:
        return None
    with_class_token = "cls_attention" in pooling.needs
    encoder = Encoder(Backbone(name, image_size=size, class_token=None if with_class_token else False), pooling)
    network = Network(encoder, LinearClassifier(encoder, classes) if classes else None)
    images = throughput(network, (size, size), timing)
    pooling.cpu()
    return images


def pool_by_table1(module: nn.Module, tokens: Tokens) -> Tensor:
    """Pool as written in the paper's Table 1, with keys and values of every patch."""
    return algorithm1.pool(tokens.patches, *parts_of(module, tokens.grid))[0]


def total_multiply_adds(compute: Callable[[], object]) -> int:
    """Count all multiply-adds of a computation."""
    counted = count(compute)
    return counted.linear + counted.products


def text(result: dict) -> str:
    """Format a table for each network and each table of rows."""
    parts = [table_text(name, rows) for name, rows in result.get("tables", {}).items()]
    parts += [network_text(name, rows, result) for name, rows in result.get("networks", {}).items()]
    if "networks" in result:
        parts.append("multiply-adds: of each pooling as the paper writes it; here: of this package's implementation")
    if timed := result["throughput"]:
        about = result["record"]
        parts.append(
            f"images/s: {about['hardware']}, {about['threads']} threads, torch {about['torch']}, float32, batch "
            f"{timed['batch']}, commit {about['commit'] or 'unknown'}, {about['date']} {about['time']}, "
            f"load {about['load']}"
        )
    return "\n\n".join(parts)


def network_text(name: str, rows: list[dict], result: dict) -> str:
    """Format the table of a network's poolings."""
    columns, timed = list(COLUMNS), result["throughput"] is not None
    lines: list[list[object]] = [columns + ["images/s"] * timed]
    lines += [_cells(row) + [row["images_per_second"]] * timed for row in rows]
    part = f"{name}, {result['size']} px, {result['classes']} classes\n{table(lines)}"
    products = max(row["attention_multiply_adds"] for row in rows) / 1e9
    if products:
        part += f"\nexcluded, as in the paper: {products:.2f} G of products between the network's activations"
    return part


def table_text(name: str, rows: list[dict]) -> str:
    """Format rows of recipes; relative throughput is that of the first row, which other devices share best."""
    timed = rows[0]["images_per_second"] is not None
    speeds = ["images/s", "ms/image", "relative", "published images/s", "published relative"]
    lines: list[list[object]] = [ROW_COLUMNS + speeds * timed]
    for row in rows:
        published = row["published"]
        cells = [
            row["label"],
            "x".join(map(str, row["size"])),
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['multiply_adds'] / 1e9:.3f}",
            *(_decimal(published[key]) for key in ("parameters_m", "multiply_adds_g", "top1")),
        ]
        lines.append(cells + (_speeds(row, rows[0]) if timed else []))
    return f"{name}\n{table(lines)}"


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _speeds(row: dict, first: dict) -> list[object]:
    images, published = row["images_per_second"], row["published"]["images_per_second"]
    reference = first["published"]["images_per_second"]
    return [
        images,
        1000 / images,
        images / first["images_per_second"],
        published,
        published / reference if published and reference else None,
    ]


def _cells(row: dict) -> list[object]:
    return [
        row["pooling"],
        f"{row['parameters'] / 1e6:.2f}",
        f"{row['pooling_parameters'] / 1e6:.3f}",
        f"{row['multiply_adds'] / 1e9:.3f}",
        f"{row['pooling_multiply_adds'] / 1e6:.2f}",
        f"{row['pooling_multiply_adds_here'] / 1e6:.2f}",
        *(row["published"] or (None, None)),
    ]
