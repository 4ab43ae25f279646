"""Accuracy with salient patches blackened: masked ImageNet (AttMask) and the non-salient test (MAP)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.features.views import MaskedOut
from maskwise.evaluation.protocol import as_tuple, labeled_sets
from maskwise.evaluation.report import Report, cost
from maskwise.evaluation.scoring.scorer import ScorerOptions, differences, scorer_of, top1
from maskwise.functional import keyed_random, masks
from maskwise.functional.attention import patch_attention
from maskwise.imaging.resize import resize_image

PRESETS = {"attmask": (0.1, 0.3, 0.5, 0.7), "map": tuple(r / 10 for r in range(10))}
MODES = ("high", "low", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedOptions(ScorerOptions):
    """Options of masked accuracy.

    preset: ratios .1 .3 .5 .7 (attmask) or 0 .. .9 (map), or give `ratios`; modes: "high" blackens the int(ratio * N)
    most attended patches, "low" the least, "random" any, the control; guide: the encoder whose attention, averaged over
    heads, ranks the patches (the papers: DINO ViT-B/16), by default the evaluated encoder itself.
    """

    evaluation = "masked"

    preset: str = "attmask"
    ratios: float | Sequence[float] = ()
    modes: str | Sequence[str] = ("high", "random")
    guide: object = None
    seed: int = 0


def masked(encoder, data: dict, world=None, **options) -> Report:
    """Score data["test"] with a share of the patches black -> Report, top-1 and its drop in per cent.

    The drop is from the top-1 of unmasked images. options: those of `MaskedOptions`; the classifier is a probe, else
    k-NN votes of data["train"]. Pixels become 0 before normalization.
    """
    begin, chosen = time.perf_counter(), MaskedOptions(**options)
    ratios, modes = as_tuple(chosen.ratios) or PRESETS.get(chosen.preset), as_tuple(chosen.modes)
    check(chosen, ratios, modes)
    data = labeled_sets("masked", data, "test")
    scorer = scorer_of(encoder, data, chosen, world)
    test, guide = data["test"], encoder if chosen.guide is None else chosen.guide
    transform = scorer.encoder.transform
    crop = transform.crop if hasattr(transform, "crop") else scorer.encoder.uint8_crop
    shared = {"world": world, "batch_size": chosen.batch_size}
    seen = crop if chosen.guide is None else resized_for(guide, crop)
    salience, grid = attention_of(guide, test, seen, scorer.encoder, **shared)
    columns = scorer.columns("test", test)
    clean = scorer.score(test)
    numbers = {"top1": top1(clean.scores, columns[clean.labels])}
    key = keyed_random.make_key(keyed_random.MASK, chosen.seed, torch.arange(len(test)))
    noise = keyed_random.uniform(key, salience.shape[1])
    for mode in modes:
        for ratio in ratios:
            mask = patch_mask(salience, ratio, mode, noise)
            scored = scorer.score(test, MaskedOut(crop, mask, grid))
            numbers[f"{mode}_{ratio:g}_top1"] = top1(scored.scores, columns[scored.labels])
            numbers[f"{mode}_{ratio:g}_drop"] = numbers["top1"] - numbers[f"{mode}_{ratio:g}_top1"]
    own = ["the encoder's own attention instead of DINO ViT-B/16's"] if chosen.guide is None else []
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "masked",
            "preset": None if chosen.ratios else chosen.preset,
            "ratios": list(ratios),
            "modes": list(modes),
            "grid": list(grid),
            "differences": [*differences(scorer, "the ImageNet linear probe on cls4"), *own],
            "guide": "the encoder itself" if chosen.guide is None else "another encoder",
            "fill": "black before normalizing",
            **scorer.about,
            "queries": len(clean.labels),
        },
        data_hash=clean.hash,
        cost=cost(begin, len(clean.labels) * (1 + len(modes) * len(ratios)), next(encoder.parameters()).device),
        corrupt={**scorer.corrupt, **clean.corrupt},
        seeds={"random": chosen.seed} if "random" in modes else {},
    )


def check(chosen: MaskedOptions, ratios, modes: tuple[str, ...]) -> None:
    """Raise UserError for options that cannot be evaluated, before any image is read."""
    if ratios is None or any(not 0 <= ratio <= 1 for ratio in ratios):
        raise UserError(
            f"masked: preset {chosen.preset!r} with ratios {chosen.ratios}; give attmask or map, or ratios from 0 to 1"
        )
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise UserError(f"masked: no mode {unknown[0]!r}; choose from {', '.join(MODES)}")


def resized_for(guide, crop):
    """Return a view: an image cropped, then resized to the guide's own size, if it has one."""
    size = getattr(guide, "image_size", None)
    return crop if size is None else lambda image: resize_image(crop(image), tuple(size))


def attention_of(guide, dataset, crop, encoder, *, world=None, batch_size: int = 256) -> tuple[Tensor, tuple[int, int]]:
    """Return the guide's attention on every image, one map of its heads or queries, float32 [images, N], and the grid.

    crop: the part of an image that the guide sees; encoder: whose device is used. Unreadable images get 0. Raises
    UserError for a guide without attention.
    """
    rows = extract.rank_share(len(dataset), world, batch_size)
    device = next(encoder.parameters()).device
    attention, places, grid, corrupt = [], [torch.zeros(0, dtype=torch.int64)], None, {}
    for index, _, features in extract.stream(
        guide,
        dataset,
        rows=rows,
        view=lambda image, i: crop(image),
        batch_size=batch_size,
        attention=True,
        device=device,
        corrupt=corrupt,
    ):
        if features.attention is None:
            raise UserError("masked: this encoder's pooling computes no attention; give guide=MODEL with attention")
        attention.append(patch_attention(features.attention, guide.pooling.k).float().cpu())
        places.append(index)
        grid = features.grid
    if world is not None and world.size > 1:
        grids = [rank_grid for rank_grid in world.gather_objects(grid) if rank_grid is not None]
        grid = grids[0] if grids else None
    extract.require_images(0 if grid is None else 1, dataset, corrupt)
    patches = grid[0] * grid[1]
    mine, places = torch.cat(attention) if attention else torch.zeros(0, patches), torch.cat(places)
    if world is not None and world.size > 1:
        mine, places = world.gather(mine), world.gather(places)
    salience = torch.zeros(len(dataset), patches)
    salience[places] = mine
    return salience, tuple(grid)


def patch_mask(salience: Tensor, ratio: float, mode: str, noise: Tensor) -> Tensor:
    """Select the patches to blacken: float [n, N] -> bool [n, N], exactly int(ratio * N) per row."""
    if mode == "random":
        return masks.random_mask([ratio] * len(noise), (1, noise.shape[1]), noise=noise)
    return masks.attention_mask(salience, ratio, mode=mode)
