"""Parameters, multiply-adds and throughput of whole networks: recipes, and rows of MAP's tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maskwise import build
from maskwise.bench.map_tables import Row
from maskwise.bench.throughput import images_per_second
from maskwise.nn import CLASSIFIERS, Encoder
from maskwise.recipe.reading import read_recipe


class Timing(NamedTuple):
    """Measurement of throughput: images per call, seconds per network, device."""

    batch: int
    seconds: float
    device: torch.device


class Counted(NamedTuple):
    """Result of a computation; multiply-adds of its convolutions and linear layers, and of products of activations."""

    result: object
    linear: int
    products: int


class Network(nn.Module):
    """An encoder and, unless it is None, a classifier of its features, in inference; trained: number of weights."""

    def __init__(self, encoder: Encoder, classifier: nn.Module | None):
        super().__init__()
        self.encoder, self.classifier = encoder, classifier
        self.trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, C], or the pooled vectors without a classifier."""
        layers = () if self.classifier is None else self.classifier.layers
        features = self.encoder(images, attention=False, layers=layers)
        return features.pooled if self.classifier is None else self.classifier(features)


def network_of(recipe_name: str, overrides: tuple[str, ...], classes: int) -> Network:
    """Build the network of a recipe: of a supervised one with its classifier, unless `classes` is 0."""
    recipe = read_recipe(recipe_name, *overrides, try_model=False)
    encoder = build.encoder(recipe)
    classifier = None
    if recipe.learns_labels and classes:
        classifier = CLASSIFIERS[recipe.classifier.name](encoder, classes, **recipe.classifier.keywords())
    return Network(encoder, classifier)


def row_cost(row: Row, size: int | None, classes: int, timing: Timing | None) -> dict:
    """Count the weights and multiply-adds of a row at an image size, by default its own, and time it."""
    network = network_of(
        row.recipe, row.overrides + (() if size is None else (f"backbone.image_size={size}",)), classes
    )
    sides = network.encoder.image_size
    counted = count(lambda: network(torch.zeros(1, 3, *sides)))
    images, millions, gigas, top1 = row.published
    return {
        "label": row.label,
        "recipe": row.recipe,
        "overrides": list(row.overrides),
        "size": list(sides),
        "parameters": network.trained,
        "multiply_adds": counted.linear,
        "attention_multiply_adds": counted.products,
        "images_per_second": throughput(network, sides, timing),
        "published": {"images_per_second": images, "parameters_m": millions, "multiply_adds_g": gigas, "top1": top1},
    }


def throughput(network: Network, size: tuple[int, int], timing: Timing | None) -> float | None:
    """Return images per second, None without timing."""
    if timing is None:
        return None
    return images_per_second(network.to(timing.device), size, timing.batch, timing.device, timing.seconds)


def count(compute: Callable[[], object]) -> Counted:
    """Run a computation and count its multiply-adds."""
    counter = FlopCounterMode(display=False)
    with counter:
        result = compute()
    by_kind = {str(op): flops // 2 for op, flops in counter.get_flop_counts().get("Global", {}).items()}
    products = sum(number for op, number in by_kind.items() if "bmm" in op or "attention" in op)
    return Counted(result, sum(by_kind.values()) - products, products)


def num_parameters(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
