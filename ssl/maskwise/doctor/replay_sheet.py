"""A replayed step as a picture, as text and as JSON."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from maskwise.doctor.replay import Replay
from maskwise.evaluation.suite.attention_sheets import TILE, visible
from maskwise.imaging import drawing

NUMBERS = ("loss", "cls", "patch", "pixel", "label", "intra", "inter", "grad_norm")  # of a step, in the text


def picture(replay: Replay, rows: int) -> np.ndarray:
    """Draw the samples with the largest losses as the student saw them -> uint8 [H, W, 3], a row for each.

    Columns: global crops with their masks, then local crops; a supervised run's images have neither.
    """
    samples = len(replay.batch.sample_ids)
    first = pixels(replay.batch.first, samples, replay.statistics)
    crops = [(f"global {i + 1}" if replay.masks is not None else f"view {i + 1}", view) for i, view in enumerate(first)]
    if replay.batch.second is not None and replay.batch.second.ndim == 4:
        second = pixels(replay.batch.second, samples, replay.statistics)
        crops += [(f"local {i + 1}", view) for i, view in enumerate(second)]
    tiles, labels = [], []
    for place in replay.order[:rows]:
        row = [view[place] for _, view in crops]
        for view, masks in enumerate([] if replay.masks is None else replay.masks):
            row[view] = drawing.overlay_mask(row[view], masks[place].reshape(replay.grid).numpy(), alpha=0.75)
        tiles.append(row)
        labels.append(f"{replay.names[place]}  {sample_text(replay, place)}".strip())
    return drawing.sheet(tiles, [title for title, _ in crops], labels, tile=TILE)


def pixels(crops: Tensor, samples: int, statistics: tuple) -> np.ndarray:
    """Return normalized crops [V * B, C, H, W] as uint8 [V, B, H, W, 3]."""
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in statistics)
    values = (crops.float().cpu() * std + mean).mul(255).round().clamp(0, 255).nan_to_num(0).to(torch.uint8)
    return visible(values).permute(0, 2, 3, 1).unflatten(0, (-1, samples)).numpy()


def sample_text(replay: Replay, place: int) -> str:
    """Return the losses of a sample and the masked shares of its crops."""
    parts = [f"{name} {values[place].item():.4g}" for name, values in replay.samples.items()]
    if replay.masks is not None:
        shares = ", ".join(f"{100 * share:.0f}" for share in masked_shares(replay, place))
        parts.append(f"masked {shares} %")
    return "  ".join(parts)


def masked_shares(replay: Replay, place: int) -> list[float]:
    """Return the share of masked patches in each global crop of a sample."""
    return [] if replay.masks is None else replay.masks[:, place].double().mean(dim=-1).tolist()


def text(replay: Replay, rows: int) -> str:
    """Describe a replayed step: its weights, its losses beside the logged ones, the samples with the largest losses."""
    exact = "exact" if replay.weights.exact else f"those of step {replay.step} are not saved: --exact trains up to it"
    lines = [
        f"step {replay.step}, epoch {replay.epoch}: {len(replay.batch.sample_ids)} images of {replay.ranks} "
        f"{'rank' if replay.ranks == 1 else 'ranks'}",
        f"weights: after step {replay.weights.step} ({replay.weights.source}), {exact}",
    ]
    if replay.bad:
        lines.append(f"skipped in training: {', '.join(replay.bad['causes'])} not finite")
    here = {name: replay.losses[name] for name in NUMBERS if name in replay.losses}
    lines.append("batch: " + "  ".join(f"{name} {value:.6g}" for name, value in here.items()))
    if replay.logged:
        logged = {name: replay.logged[name] for name in here if replay.logged.get(name) is not None}
        lines.append("logged: " + "  ".join(f"{name} {value:.6g}" for name, value in logged.items()))
    if not replay.samples:
        lines.append("this method has no losses of single samples")
    elif abs(rest := batch_terms(replay)) > 1e-4 * max(1.0, abs(replay.losses["loss"])):
        lines.append(f"of the loss, {rest:.6g} belongs to the batch as a whole")
    for place in replay.order[:rows] if replay.samples else ():
        lines.append(f"{replay.names[place]}  {sample_text(replay, place)}")
    more = len(replay.batch.sample_ids) - rows
    if replay.samples and more > 0:
        lines.append(f"and {more} with smaller losses")
    return "\n".join([*lines, *replay.notes])


def batch_terms(replay: Replay) -> float:
    """Return the part of the loss that is no mean of losses of samples."""
    return replay.losses["loss"] - float(replay.samples["loss"].mean())


def as_json(replay: Replay) -> dict:
    """Return a replayed step as JSON; values that are not finite become null."""
    samples = [
        {
            "sample": int(replay.batch.sample_ids[place]),
            "image": replay.names[place],
            **{name: finite(values[place].item()) for name, values in replay.samples.items()},
            "masked": masked_shares(replay, place),
        }
        for place in replay.order
    ]
    return {
        "step": replay.step,
        "epoch": replay.epoch,
        "ranks": replay.ranks,
        "weights": {"step": replay.weights.step, "source": replay.weights.source, "exact": replay.weights.exact},
        "losses": {name: finite(value) for name, value in replay.losses.items()},
        "logged": replay.logged,
        "largest": samples[0]["image"] if replay.samples else None,
        "samples": samples,
        **({"bad": {"step": replay.bad["step"], "causes": replay.bad["causes"]}} if replay.bad else {}),
        "notes": replay.notes,
    }


def finite(value):
    """Return a value, None for a float that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
