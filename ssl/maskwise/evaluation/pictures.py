"""Picture sheets of what an encoder looks at and what maskings make of it, and the curves of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwise.evaluation.features import evaluating
from maskwise.functional import draw
from maskwise.functional.attention import mean_heads

TILE = 160  # pixels of one picture on a sheet


def attention_sheet(encoder, images: Tensor, maskings: Mapping[str, object], sample_ids: Tensor, *, untrained=None, step: int = 0, titles=None) -> np.ndarray:
    """One row an image: the image, the attention of `untrained` (if given), the encoder's, and what each masking hides.

    images uint8 or uint16 [n, C, S, S]; maskings: title -> row of MASKINGS; sample_ids int64 [n] are the keys of the draws -> uint8 [H, W, 3].
    """
    looks = {"teacher": look(encoder, images)}
    if untrained is not None:
        looks = {"untrained": look(untrained, images), **looks}
    attention, grid = looks["teacher"]
    hidden = {}
    for name, masking in maskings.items():
        if attention is None and masking.needs_attention:
            continue
        hidden[name] = masking(None if attention is None else attention[:, None], grid, step=step, sample_ids=sample_ids, views=1)
    rows = []
    for row, image in enumerate(visible(images).permute(0, 2, 3, 1).cpu().numpy()):
        seen = [draw.overlay_heat(image, map_[row].reshape(around).numpy(), 0.75) for map_, around in looks.values() if map_ is not None]
        rows.append([image, *seen, *(draw.overlay_mask(image, mask[row].reshape(grid).numpy()) for mask in hidden.values())])
    names = ["image", *(name for name, (map_, _) in looks.items() if map_ is not None), *hidden]
    return draw.sheet(rows, names, tile=TILE)


def training_sheet(encoder, images: Tensor, masking, sample_ids: Tensor) -> np.ndarray:
    """One row an image: the image, where the encoder looks, and what this masking would hide -> uint8 [H, W, 3]."""
    title = type(masking).__name__.removesuffix("Masking") or "masked"
    return attention_sheet(encoder, images, {title: masking}, sample_ids)


def visible(images: Tensor) -> Tensor:
    """uint8 or uint16 [n, C, S, S] as uint8 [n, 3, S, S]: the high byte, a single band as grey, else the first three bands."""
    if images.dtype == torch.uint16:
        images = (images.to(torch.int32) >> 8).to(torch.uint8)
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def look(encoder, images: Tensor) -> tuple[Tensor | None, tuple[int, int]]:
    """Mean attention over heads of uint8 images [n, 3, S, S] -> float32 [n, N] on the CPU (or None) and the grid."""
    weight = next(encoder.parameters())
    mean, std = (torch.as_tensor(values, dtype=torch.float32, device=weight.device).reshape(-1, 1, 1) for values in (encoder.mean, encoder.std))
    with evaluating(encoder), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        seen = encoder(((images.to(weight.device).float() / torch.iinfo(images.dtype).max - mean) / std).to(weight.dtype))
    return (None if seen.attention is None else mean_heads(seen.attention).float().cpu()), seen.grid


def curves(metrics: str | Path) -> np.ndarray:
    """The curves of a run's metrics.jsonl: losses, entropies of the targets and the k-NN on the way, one above the other -> uint8 [H, W, 3]."""
    lines = [json.loads(line) for line in Path(metrics).read_text(encoding="utf-8").splitlines() if line.strip()]
    steps = [line for line in lines if "loss" in line]
    charts = [draw.chart({name: points(steps, name) for name in ("loss", "cls", "patch")}, "training loss", x_name="step")]
    entropies = {name: found for name in ("teacher_entropy", "teacher_spread") if (found := points(steps, name))}
    if entropies:
        charts.append(draw.chart(entropies, "entropy of the targets, and of their mean (nats)", x_name="step"))
    reports = [{"step": line["step"], **line["numbers"]} for line in lines if line.get("report") == "knn"]
    accuracies = {name: found for name in ("top1", "top5") if (found := points(reports, name))}
    if accuracies:
        charts.append(draw.chart(accuracies, "k-nn of the teacher (per cent)", x_name="step"))
    return np.concatenate(charts)


def points(lines: list[dict], name: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that hold a number under this name."""
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
