"""Per-layer activation statistics: feature diversity and dead neurons."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.functional.metrics import feature_variance

FLOORED = ("ReLU", "ReLU6")  # exactly 0 where they do not fire
SMOOTH = (
    "GELU",
    "GELUTanh",
    "QuickGELU",
    "QuickGELUTanh",
    "SiLU",
    "Swish",
    "Mish",
    "HardSwish",
    "Hardswish",
    "LeakyReLU",
    "PReLU",
    "ELU",
    "CELU",
    "SELU",
)
THRESHOLD = 1e-3  # of the root mean square of a smooth activation's output for the image


@dataclasses.dataclass
class Neurons:
    """An activation layer over a dataset, shares in 0..1.

    silent: activations that do not fire, mean over images; units: neurons (a channel at a position) that fire for no
    image; channels: channels that fire at no position for any image.
    """

    name: str
    silent: float
    units: float
    channels: float


@dataclasses.dataclass
class Observation:
    """Diversity of the layers {"spatial": [L], "channel": [L]}, neurons in order of execution, index of the images."""

    diversity: dict[str, list[float]]
    neurons: list[Neurons]
    index: Tensor
    corrupt: dict[str, str]


def observe(encoder, dataset, *, world=None, batch_size: int = 64) -> Observation:
    """Run an encoder over a dataset and record the activations of its backbone.

    Diversity is that of the residual stream after every block of a transformer, without prefix tokens, or of the
    feature map of the stem and every stage. A neuron fires above 0 after a ReLU, and after a smooth activation from
    THRESHOLD of the root mean square of the layer's output for that image. Squeeze-and-excitation gates are not
    counted. Raises UserError for an encoder without a backbone, and if no image can be read.
    """
    backbone = getattr(encoder, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise UserError(
            f"analysis needs the layers of a network and {type(encoder).__name__} has none; give an encoder with a "
            "backbone"
        )
    widths = getattr(backbone, "stage_dims", None)
    layers = tuple(range(backbone.depth if widths is None else len(widths)))
    rows = extract.rank_share(len(dataset), world, batch_size)
    recorder, corrupt, places = Recorder(backbone), {}, [torch.zeros(0, dtype=torch.int64)]
    with recorder:
        for index, _, _ in extract.stream(
            encoder, dataset, rows=rows, batch_size=batch_size, layers=layers, corrupt=corrupt
        ):
            recorder.count(len(index))
            places.append(index)
    parts = [recorder.sums()] if world is None else world.gather_objects(recorder.sums())
    index = torch.cat(places) if world is None else world.gather(torch.cat(places))
    if world is not None:
        corrupt = {name: reason for part in world.gather_objects(corrupt) for name, reason in part.items()}
    extract.require_images(len(index), dataset, corrupt)
    return Observation(*joined([part for part in parts if part["images"]]), index.sort().values, corrupt)


class Recorder:
    """Record activations of a backbone by forward hooks inside the context; call `count` after every batch."""

    def __init__(self, backbone: nn.Module):
        self.backbone, self.handles, self.images = backbone, [], 0
        self.stages: tuple[Tensor, ...] = ()
        self.grid = (1, 1)
        self.diversity: list[dict[str, float]] = []
        self.silent: dict[str, float] = {}
        self.active: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}
        self.last: dict[str, bool] = {}

    def __enter__(self) -> Recorder:
        self.handles.append(self.backbone.register_forward_hook(self._stages))
        for name, module, last in activations(self.backbone):
            self.last[name] = last
            self.handles.append(
                module.register_forward_hook(lambda module, _, out, name=name: self._neurons(name, module, out))
            )
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()

    def _stages(self, module, _, tokens) -> None:
        prefix = getattr(module, "num_prefix", 0)
        self.stages = tuple(
            stage if stage.ndim == 4 else stage[:, prefix:].transpose(1, 2).unflatten(2, tokens.grid)
            for stage in tokens.stages
        )

    def _neurons(self, name: str, module: nn.Module, out: Tensor) -> None:
        repeat = self.calls[name] = self.calls.get(name, -1) + 1
        name = name if not repeat else f"{name}#{repeat + 1}"  # a module may be called several times
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
        active = fires.any(dim=0)
        self.active[name] = active | self.active[name] if name in self.active else active

    def count(self, images: int) -> None:
        """Add the statistics of a batch of this many images."""
        variances = [feature_variance(stage) for stage in self.stages]
        if not self.diversity:
            self.diversity = [dict.fromkeys(variance, 0.0) for variance in variances]
        for total, variance in zip(self.diversity, variances):
            for name, value in variance.items():
                total[name] += images * value
        self.images += images
        self.calls.clear()
        self.stages = ()

    def sums(self) -> dict:
        """Return the sums so far, for `joined`."""
        return {
            "images": self.images,
            "diversity": self.diversity,
            "silent": self.silent,
            "active": {name: active.cpu() for name, active in self.active.items()},
        }


def joined(parts: list[dict]) -> tuple[dict[str, list[float]], list[Neurons]]:
    """Join the sums of all ranks into means over all images."""
    images = sum(part["images"] for part in parts)
    layers = range(len(parts[0]["diversity"]) if parts else 0)
    diversity = {
        name: [sum(part["diversity"][i][name] for part in parts) / images for i in layers]
        for name in ("spatial", "channel")
    }
    neurons = []
    for name in parts[0]["active"] if parts else ():
        active = torch.stack([part["active"][name] for part in parts]).any(dim=0)
        units, channels = 1 - float(active.double().mean()), 1 - float(active.any(dim=0).double().mean())
        neurons.append(Neurons(name, sum(part["silent"][name] for part in parts) / images, units, channels))
    return diversity, neurons


def activations(backbone: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield (name, module, channels_last) of the activation layers without squeeze-and-excitation.

    channels_last: whether 4-dimensional outputs have their channels last.
    """
    parts = dict(backbone.named_modules())
    for name, module in parts.items():
        if type(module).__name__ in (*FLOORED, *SMOOTH) and not {"se", "attn_se", "gate"} & set(name.split(".")):
            parent = parts[name.rpartition(".")[0]]
            yield name, module, isinstance(getattr(parent, "fc1", None), nn.Linear)
