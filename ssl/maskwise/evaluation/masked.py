"""Accuracy when the most salient patches are blackened: AttMask's masked ImageNet and MAP's non-salient test."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from maskwise.evaluation import features
from maskwise.evaluation.judge import differences, judge, top1
from maskwise.evaluation.report import Report
from maskwise.evaluation.views import Covered
from maskwise.functional import draws, masks
from maskwise.functional.attention import mean_heads
from maskwise.functional.errors import UserError

PRESETS = {"attmask": (0.1, 0.3, 0.5, 0.7), "map": tuple(r / 10 for r in range(10))}
MODES = ("high", "low", "random")


def masked(
    encoder, data: dict, world=None, *, preset: str = "attmask", ratios: Sequence[float] = (), modes: Sequence[str] = ("high", "random"), guide=None,
    classifier=None, probe=None, k: int = 20, temperature: float = 0.07, feature: str = "pooled", batch_size: int = 256, seed: int = 0, cache=None,
) -> Report:  # fmt: skip
    """Top-1 of data["test"] with a share of the patches black, and the drop from whole images -> Report, in per cent.

    guide: the encoder whose attention, averaged over heads, says what is salient (the papers: DINO ViT-B/16); by default the encoder
    itself, which the protocol tells. modes: "high" blackens int(ratio * N) most attended patches, "low" the least, "random" any, the
    control. Pixels become 0 before normalising. preset: ratios .1 .3 .5 .7 (attmask) or 0 .. .9 (map), or give `ratios`. classifier:
    a probe; else the k-NN votes of data["train"]. attmask.md 5.7, evaluation.md 13, pooling.md 3.5.
    """
    begin = time.perf_counter()
    asked = tuple(ratios) or PRESETS.get(preset)
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if asked is None or any(not 0 <= ratio <= 1 for ratio in asked):
        raise UserError(f"masked: preset {preset!r} with ratios {list(ratios)}; give attmask or map, or ratios from 0 to 1")
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise UserError(f"masked: no mode {unknown[0]!r}; choose from {', '.join(MODES)}")
    if data.get("test") is None or data["test"].labels is None:
        raise UserError("masked needs labelled test images; give test=FOLDER with one subfolder per class")
    judging = judge(encoder, data, classifier, probe=probe, world=world, k=k, temperature=temperature, feature=feature, batch_size=batch_size, cache=cache)
    test, looking = data["test"], encoder if guide is None else guide
    crop = judging.encoder.uncoloured if not hasattr(judging.encoder.transform, "crop") else judging.encoder.transform.crop
    salience, grid = attention_of(looking, test, crop, judging.encoder, world=world, batch_size=batch_size)
    place = judging.columns("test", test)
    clean = judging(test)
    numbers = {"top1": top1(clean.scores, place[clean.labels])}
    noise = draws.uniform(draws.mix(draws.MASK, seed, torch.arange(len(test))), salience.shape[1])
    for mode in modes:
        for ratio in asked:
            hidden = hide(salience, ratio, mode, noise)
            seen = judging(test, Covered(crop, hidden, grid))
            numbers[f"{mode}_{ratio:g}_top1"] = top1(seen.scores, place[seen.labels])
            numbers[f"{mode}_{ratio:g}_drop"] = numbers["top1"] - numbers[f"{mode}_{ratio:g}_top1"]
    seconds, images = time.perf_counter() - begin, len(clean.labels) * (1 + len(modes) * len(asked))
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "masked", "preset": None if ratios else preset, "ratios": list(asked), "modes": list(modes), "grid": list(grid),
            "differences": [*differences(judging, "the ImageNet linear probe on cls4"), *(["the encoder's own attention instead of DINO ViT-B/16's"] if guide is None else [])],
            "guide": "the encoder itself" if guide is None else "another encoder", "fill": "black before normalising", **judging.about, "queries": len(clean.labels),
        },
        data_hash=clean.hash,
        cost={"seconds": round(seconds, 3), "images": images, "images_per_second": round(images / seconds, 1), "device": str(next(encoder.parameters()).device)},
        corrupt={**judging.corrupt, **clean.corrupt},
        seeds={"random": seed} if "random" in modes else {},
    )  # fmt: skip


masked.needs = ("test",)


def attention_of(guide, dataset, crop, encoder, *, world=None, batch_size: int = 256) -> tuple[Tensor, tuple[int, int]]:
    """Mean attention over heads of every image of a dataset, as `encoder` crops it -> float32 [images, N] and the grid; 0 where unreadable.

    Raises UserError for a guide without attention.
    """
    rows = torch.arange(len(dataset))
    if world is not None and world.size > 1:
        rows = rows[rows // batch_size % world.size == world.rank]
    device = next(encoder.parameters()).device
    found, places, grid = [], [torch.zeros(0, dtype=torch.int64)], None
    for index, _, seen in features.stream(guide, dataset, rows=rows, view=lambda image, i: crop(image), batch_size=batch_size, attention=True, device=device):
        if seen.attention is None:
            raise UserError("masked: this encoder's pooling makes no attention; give guide=MODEL, one that does")
        found.append(mean_heads(seen.attention).float().cpu())
        places.append(index)
        grid = seen.grid
    if world is not None and world.size > 1:
        grids = [each for each in world.gather_objects(grid) if each is not None]
        grid = grids[0] if grids else None
    if grid is None:
        raise UserError(f"none of the {len(dataset)} images can be read; give images")
    patches = grid[0] * grid[1]
    mine, places = torch.cat(found) if found else torch.zeros(0, patches), torch.cat(places)
    if world is not None and world.size > 1:
        mine, places = world.gather(mine), world.gather(places)
    salience = torch.zeros(len(dataset), patches)
    salience[places] = mine
    return salience, tuple(grid)


def hide(salience: Tensor, ratio: float, mode: str, noise: Tensor) -> Tensor:
    """Which patches go black: float [n, N] -> bool [n, N], exactly int(ratio * N) a row."""
    if mode == "random":
        return masks.random_mask([ratio] * len(noise), (1, noise.shape[1]), noise=noise)
    return masks.attention_mask(salience, ratio, mode=mode)
