"""Sheets of images, attention maps and masks, and the training curves of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwise.engine.run_curves import ACCURACY, LOSSES, TARGETS, curve, report_curve
from maskwise.engine.run_log import read_metrics
from maskwise.evaluation.baselines import NAME, rows
from maskwise.evaluation.features.extract import evaluating
from maskwise.evaluation.report import Report
from maskwise.functional.attention import patch_attention
from maskwise.imaging import drawing
from maskwise.imaging.charts import line_chart
from maskwise.methods.masking import masking_name

TILE = 160  # pixels of one picture on a sheet


def attention_sheet(
    encoder, images: Tensor, maskings: Mapping[str, object], sample_ids: Tensor, *, untrained=None, step: int = 0
) -> np.ndarray:
    """Draw each image, its attention by `untrained` (if given) and by the encoder, and the mask of each masking.

    images uint8 or uint16 [n, C, S, S]; maskings: title -> masking module; sample_ids int64 [n] are the keys of the
    draws. Maskings by attention are left out where the encoder gives none. Returns uint8 [H, W, 3], one row per image.
    """
    attention, grid = attention_map(encoder, images)
    maps = {"teacher": (attention, grid)}
    if untrained is not None:
        maps = {"untrained": attention_map(untrained, images), **maps}
    maps = {name: (values, map_grid) for name, (values, map_grid) in maps.items() if values is not None}
    per_view = None if attention is None else attention[:, None]
    masks = {
        name: masking(per_view, grid, step=step, sample_ids=sample_ids, views=1)
        for name, masking in maskings.items()
        if attention is not None or not masking.needs_attention
    }
    rows = []
    for i, image in enumerate(visible(images).permute(0, 2, 3, 1).cpu().numpy()):
        heats = [drawing.overlay_heat(image, v[i].reshape(map_grid).numpy(), 0.75) for v, map_grid in maps.values()]
        covered = [drawing.overlay_mask(image, mask[i].reshape(grid).numpy()) for mask in masks.values()]
        rows.append([image, *heats, *covered])
    return drawing.sheet(rows, ["image", *maps, *masks], tile=TILE)


def training_sheet(encoder, images: Tensor, masking, sample_ids: Tensor) -> np.ndarray:
    """Draw each image, the encoder's attention and the mask of one masking -> uint8 [H, W, 3]."""
    return attention_sheet(encoder, images, {masking_name(masking): masking}, sample_ids)


def visible(images: Tensor) -> Tensor:
    """Convert uint8 or uint16 [n, C, S, S] to uint8 [n, 3, S, S].

    Of 16 bits the high byte is taken; of many channels the first three, of fewer than three the first as gray.
    """
    if images.dtype == torch.uint16:
        images = (images.to(torch.int32) >> 8).to(torch.uint8)
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def attention_map(encoder, images: Tensor) -> tuple[Tensor | None, tuple[int, int]]:
    """Return the attention that maskings follow, float32 [n, N] on the CPU or None, and the grid, of uint8 images."""
    inputs = normalized(encoder, images)
    with evaluating(encoder), torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        features = encoder(inputs)
    if features.attention is None:
        return None, features.grid
    return patch_attention(features.attention, encoder.pooling.k).float().cpu(), features.grid


def normalized(encoder, images: Tensor) -> Tensor:
    """Return uint8 or uint16 images [n, C, S, S] as the encoder takes them, on its device and in its dtype."""
    weight = next(encoder.parameters())
    mean, std = (
        torch.as_tensor(values, dtype=torch.float32, device=weight.device).reshape(-1, 1, 1)
        for values in (encoder.mean, encoder.std)
    )
    values = (images.to(weight.device).float() / torch.iinfo(images.dtype).max - mean) / std
    return values.to(weight.dtype)


def curves(metrics: str | Path) -> np.ndarray:
    """Draw the losses, target entropies and k-NN accuracies of a metrics.jsonl -> uint8 [H, W, 3]."""
    records = read_metrics(metrics)
    pictures = [line_chart({key: curve(records, key) for key in LOSSES}, "training loss", x_name="step")]
    targets = {label: points for key, label in TARGETS.items() if (points := curve(records, key))}
    if targets:
        pictures.append(line_chart(targets, "teacher targets (nats)", x_name="step"))
    names = {"top1": "top-1", "top5": "top-5"}
    accuracy = {label: points for key, label in names.items() if (points := report_curve(records, "knn", key))}
    if accuracy:
        steps = [step for step, _ in next(iter(accuracy.values()))]
        accuracy |= flat_lines(Path(metrics).parent, (steps[0], steps[-1]))
        pictures.append(line_chart(accuracy, ACCURACY, x_name="step"))
    return np.concatenate(pictures)


def flat_lines(run: Path, steps: tuple[float, float]) -> dict[str, list[tuple[float, float]]]:
    """Return the baselines of a run as lines between two steps; {} for a run without any."""
    path = run / "reports" / f"{NAME}.json"
    if not path.is_file():
        return {}
    return {name: [(step, value) for step in sorted(set(steps))] for name, value in rows(Report.load(path)).items()}
