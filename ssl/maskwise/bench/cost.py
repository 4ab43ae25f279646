"""What a pooling costs: parameters and multiply-adds of each, alone and behind a network, without running anything."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from maskwise.bench.table import table
from maskwise.functional.errors import UserError
from maskwise.nn import POOLINGS, Backbone, Tokens
from maskwise.nn.pooling import framework
from maskwise.nn.pooling.landscape import LANDSCAPE, composed

NETWORKS = ("resnet18", "resnet50", "convnext_small", "vit_small_patch16_224")
# Table 8 of the SimPool paper: millions of parameters, and 10^9 multiply-adds of convolutions and linear layers.
# ResNet-18 with CaiT is printed with the parameters of two blocks and the multiply-adds of one (pooling.md 1.5).
PUBLISHED = {
    "resnet18": {"gap": (11.7, 1.82), "cait": (18.0, 1.85), "slot": (14.6, 1.87), "ge": (11.7, 1.83), "simpool": (12.2, 1.84)},
    "resnet50": {"gap": (25.6, 4.13), "cait": (75.9, 4.60), "slot": (71.7, 4.89), "ge": (26.1, 4.15), "simpool": (33.9, 4.34)},
    "convnext_small": {"gap": (50.2, 8.68), "cait": (57.3, 8.75), "slot": (56.7, 8.79), "ge": (50.3, 8.69), "simpool": (51.4, 8.71)},
    "vit_small_patch16_224": {"cls": (22.1, 4.24), "cait": (23.8, 4.29), "slot": (23.7, 4.30), "ge": (22.1, 4.25), "simpool": (22.3, 4.26)},
}


def parser(make: Callable):
    """The options of `maskwise bench cost`."""
    made = make("maskwise bench cost", description="Parameters and multiply-adds of poolings behind networks: counted, not timed.")
    made.add_argument("--networks", default=",".join(NETWORKS), metavar="A,B", help="timm names (default: %(default)s)")
    made.add_argument("--poolings", default="all", metavar="A,B", help="rows of `maskwise list poolings`, or all (default)")
    made.add_argument("--size", type=int, default=224, help="pixels of an image's side (default: %(default)s)")
    made.add_argument("--classes", type=int, default=1000, help="of a linear classifier behind it, 0 for none (default: %(default)s)")
    return made


def run(options) -> dict:
    """Count; raises UserError for a network or pooling that is not there, or a size or number of classes out of range."""
    if options.size < 1 or options.classes < 0:
        raise UserError(f"bench cost: --size {options.size} --classes {options.classes}: give a size of at least 1, and classes of at least 0")
    wanted = list(POOLINGS) if options.poolings == "all" else options.poolings.split(",")
    for name in wanted:
        if name not in POOLINGS:
            raise UserError(f"bench cost: no pooling {name!r}; there are {', '.join(POOLINGS)}")
    return {
        "bench": "cost", "size": options.size, "classes": options.classes,
        "networks": {name: network(name, wanted, options.size, options.classes) for name in options.networks.split(",")},
    }  # fmt: skip


@torch.no_grad()
def network(name: str, poolings: list[str], size: int, classes: int) -> list[dict]:
    """A row for each pooling that fits the network."""
    rows = []
    known = PUBLISHED.get(name, {}) if size == 224 and classes == 1000 else {}
    counts: dict[bool, tuple] = {}
    for pooling in poolings:
        needs_token = "cls_attention" in POOLINGS[pooling].needs
        with torch.device("meta"):
            if needs_token not in counts:
                backbone = Backbone(name, image_size=size, class_token=None if needs_token else False).eval()
                counts[needs_token] = (backbone, *counted(lambda: backbone(torch.zeros(1, 3, size, size))))
            backbone, found, linear, products = counts[needs_token]
            if needs_token and not backbone.has_class_token:
                continue
        module = POOLINGS[pooling](backbone.dim).eval().requires_grad_(False)  # with its numbers: autocast knows no meta tensors, and some are places to look at
        tokens = Tokens(torch.zeros(found.patches.shape), torch.zeros(found.prefix.shape), found.grid)
        here = sum(counted(lambda: module(tokens))[1:])
        written = here if type(module).__name__ not in LANDSCAPE else sum(counted(lambda: as_written(module, tokens))[1:])
        rows.append(
            {
                "pooling": pooling, "parameters": weights(backbone) + weights(module) + (backbone.dim + 1) * classes, "pooling_parameters": weights(module),
                "multiply_adds": linear + written + backbone.dim * classes, "attention_multiply_adds": products,
                "pooling_multiply_adds": written, "pooling_multiply_adds_here": here, "published": known.get(pooling),
            }
        )  # fmt: skip
    return rows


def as_written(module: nn.Module, tokens: Tokens) -> torch.Tensor:
    """The pooling as the paper's Table 1 writes it: keys and values of every patch."""
    return framework.pool(tokens.patches, *composed(module, tokens.grid))[0]


def counted(compute: Callable) -> tuple[object, int, int]:
    """What `compute` returns; multiply-adds of convolutions and linear layers; of products of two activations."""
    counter = FlopCounterMode(display=False)
    with counter:
        result = compute()
    by_kind = {str(op): flops // 2 for op, flops in counter.get_flop_counts().get("Global", {}).items()}
    between = sum(count for op, count in by_kind.items() if "bmm" in op or "attention" in op)
    return result, sum(by_kind.values()) - between, between


def weights(module: nn.Module) -> int:
    """Its number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def text(result: dict) -> str:
    """A table for each network."""
    parts = []
    for name, rows in result["networks"].items():
        shown: list[list[object]] = [["pooling", "parameters M", "of pooling M", "multiply-adds G", "of pooling M", "here M", "published M", "published G"]]
        for row in rows:
            said = row["published"] or (None, None)
            shown.append(
                [row["pooling"], f"{row['parameters'] / 1e6:.2f}", f"{row['pooling_parameters'] / 1e6:.3f}", f"{row['multiply_adds'] / 1e9:.3f}",
                 f"{row['pooling_multiply_adds'] / 1e6:.2f}", f"{row['pooling_multiply_adds_here'] / 1e6:.2f}", *said]
            )  # fmt: skip
        between = max(row["attention_multiply_adds"] for row in rows) / 1e9
        tail = f"\nthe network's products between activations ({between:.2f} G more) are left out, as in the paper" if between else ""
        parts.append(f"{name}, {result['size']} px, {result['classes']} classes\n{table(shown)}{tail}")
    return "\n\n".join([*parts, "multiply-adds: as the paper writes each pooling; here: what this package multiplies for the same result"])
