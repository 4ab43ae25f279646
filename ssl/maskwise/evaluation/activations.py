"""What the layers of a network do while it looks at images: how unlike their features are, and which neurons never wake."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from maskwise.evaluation import features
from maskwise.functional.errors import UserError
from maskwise.functional.metrics import feature_variance

FLOORED = ("ReLU", "ReLU6")  # what they do not pass is 0 exactly
SMOOTH = ("GELU", "GELUTanh", "QuickGELU", "QuickGELUTanh", "SiLU", "Swish", "Mish", "HardSwish", "Hardswish", "LeakyReLU", "PReLU", "ELU", "CELU", "SELU")
THRESHOLD = 1e-3  # of the root mean square of a smooth activation's output for the image


@dataclasses.dataclass
class Neurons:
    """A layer of activations over a dataset, shares in 0..1.

    silent: of activations that do not fire, mean over images; units: of neurons (a channel at a place) that fire for no image;
    channels: of channels that fire nowhere for any image.
    """

    name: str
    silent: float
    units: float
    channels: float


@dataclasses.dataclass
class Observation:
    """Diversity of the layers, {"spatial": [L], "channel": [L]}; neurons of the activations in the order they are met; images seen, corrupt."""

    diversity: dict[str, list[float]]
    neurons: list[Neurons]
    index: Tensor
    corrupt: dict[str, str]


def observe(encoder, dataset, *, world=None, batch_size: int = 64) -> Observation:
    """Run an encoder over a dataset and watch its backbone.

    Diversity is that of the residual stream after every block of a transformer, prefix left out, or of the stem's and every
    stage's map. A neuron fires above 0 behind a ReLU, and behind a smooth activation where it is not below THRESHOLD of the root mean
    square of the layer's output for that image. Squeeze-and-excitation gates are not counted. Raises UserError for an
    encoder without a backbone, and where no image can be read.
    """
    backbone = getattr(encoder, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise UserError(f"analysis looks into a network's layers and {type(encoder).__name__} has none; give an encoder with a backbone")
    widths = getattr(backbone, "stage_dims", None)
    layers = tuple(range(backbone.depth if widths is None else len(widths)))
    rows = torch.arange(len(dataset))
    if world is not None and world.size > 1:
        rows = rows[rows // batch_size % world.size == world.rank]
    watch, corrupt, places = Watch(backbone), {}, [torch.zeros(0, dtype=torch.int64)]
    with watch:
        for index, _, _ in features.stream(encoder, dataset, rows=rows, batch_size=batch_size, layers=layers, corrupt=corrupt):
            watch.count(len(index))
            places.append(index)
    parts = [watch.told()] if world is None else world.gather_objects(watch.told())
    seen = torch.cat(places) if world is None else world.gather(torch.cat(places))
    if world is not None:
        corrupt = {name: reason for part in world.gather_objects(corrupt) for name, reason in part.items()}
    if not len(seen):
        raise UserError(f"none of the {len(dataset)} images can be read; give images")
    return Observation(*joined([part for part in parts if part["images"]]), seen.sort().values, corrupt)


class Watch:
    """Hooks on a backbone and its activations, while it is a context; `count` is told of every batch's images."""

    def __init__(self, backbone: nn.Module):
        self.backbone, self.handles, self.images = backbone, [], 0
        self.stages: tuple[Tensor, ...] = ()
        self.grid = (1, 1)
        self.sums: list[dict[str, float]] = []
        self.silent: dict[str, float] = {}
        self.awake: dict[str, Tensor] = {}
        self.met: dict[str, int] = {}
        self.last: dict[str, bool] = {}

    def __enter__(self) -> Watch:
        self.handles.append(self.backbone.register_forward_hook(self._stages))
        for name, module, last in activations(self.backbone):
            self.last[name] = last
            self.handles.append(module.register_forward_hook(lambda module, _, out, name=name: self._neurons(name, module, out)))
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()

    def _stages(self, module, _, tokens) -> None:
        prefix = getattr(module, "num_prefix", 0)
        self.stages = tuple(each if each.ndim == 4 else each[:, prefix:].transpose(1, 2).unflatten(2, tokens.grid) for each in tokens.stages)

    def _neurons(self, name: str, module: nn.Module, out: Tensor) -> None:
        again = self.met[name] = self.met.get(name, -1) + 1
        name = name if not again else f"{name}#{again + 1}"  # one module may stand at several places
        out = out.detach().float()
        if type(module).__name__ in FLOORED:
            fires = out > 0
        else:
            scale = out.flatten(1).square().mean(dim=1).sqrt().view(-1, *[1] * (out.ndim - 1))
            fires = (out.abs() >= THRESHOLD * scale) & (scale > 0)
        if out.ndim == 4 and not self.last[name.partition("#")[0]]:
            fires = fires.movedim(1, -1)
        fires = fires.flatten(1, -2) if fires.ndim > 2 else fires[:, None]  # [B, places, C]
        self.silent[name] = self.silent.get(name, 0.0) + float((~fires).flatten(1).double().mean(dim=1).sum())
        awake = fires.any(dim=0)
        self.awake[name] = awake | self.awake[name] if name in self.awake else awake

    def count(self, images: int) -> None:
        """A batch of so many images has passed."""
        found = [feature_variance(stage) for stage in self.stages]
        if not self.sums:
            self.sums = [dict.fromkeys(each, 0.0) for each in found]
        for total, each in zip(self.sums, found):
            for name, value in each.items():
                total[name] += images * value
        self.images += images
        self.met.clear()
        self.stages = ()

    def told(self) -> dict:
        """The sums so far, for `joined`."""
        return {"images": self.images, "sums": self.sums, "silent": self.silent, "awake": {name: each.cpu() for name, each in self.awake.items()}}


def joined(parts: list[dict]) -> tuple[dict[str, list[float]], list[Neurons]]:
    """What the watches of all ranks have told, as means over all images."""
    images = sum(part["images"] for part in parts)
    layers = range(len(parts[0]["sums"]) if parts else 0)
    diversity = {name: [sum(part["sums"][i][name] for part in parts) / images for i in layers] for name in ("spatial", "channel")}
    neurons = []
    for name in parts[0]["awake"] if parts else ():
        awake = torch.stack([part["awake"][name] for part in parts]).any(dim=0)
        units, channels = 1 - float(awake.double().mean()), 1 - float(awake.any(dim=0).double().mean())
        neurons.append(Neurons(name, sum(part["silent"][name] for part in parts) / images, units, channels))
    return diversity, neurons


def activations(backbone: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """The activation layers of a network but for those of squeeze-and-excitation: name, module, whether channels are the last axis of its 4-dim output."""
    parts = dict(backbone.named_modules())
    for name, module in parts.items():
        if type(module).__name__ in (*FLOORED, *SMOOTH) and not {"se", "attn_se", "gate"} & set(name.split(".")):
            parent = parts[name.rpartition(".")[0]]
            yield name, module, isinstance(getattr(parent, "fc1", None), nn.Linear)
