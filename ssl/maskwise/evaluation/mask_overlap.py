"""Overlap of masks with objects: how much of the masked area lies on objects, and how much of the objects is masked."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from maskwise.bounds import Count, Probability
from maskwise.data.benchmark_sets import boxed
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.evaluation.features.reading import read
from maskwise.evaluation.protocol import Options, as_tuple
from maskwise.evaluation.report import Report, cost
from maskwise.functional.attention import patch_attention
from maskwise.methods.masking import MASKINGS

COVER = 0.5  # a patch is on an object when at least this share of its pixels is
OF_THE_IMAGES = ("chance", "best")  # numbers that no encoder changes
COMPARED = ("attmask_high", "attmask_low", "attmask_hint", "random", "block")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskOverlapOptions(Options):
    """Options of mask overlap.

    ratio: share of patches to mask; maskings: by default those of AttMask, random and block-wise; untrained: another
    encoder whose attention guides the same maskings; limit: the first images only; seed: of the maskings.
    """

    evaluation = "mask overlap"

    ratio: Probability = 0.3
    maskings: str | Sequence[str] = ()
    untrained: object = None
    limit: Count | None = None
    batch_size: Count = 128
    seed: int = 0


def mask_overlap(encoder, data, world=None, **options) -> Report:
    """Measure which share of masked patches lies on objects, and of the objects is masked -> Report, in per cent.

    data: images with `.mask(i)`, `.boxes(i)` or `.box(i)`, or {"test": images}. options: those of `MaskOverlapOptions`.
    Numbers: `{masking}`, the share of masked patches that lie on objects (precision); `{masking}_recall`, the share of
    patches on objects that are masked; both also as `..._untrained` for maskings that follow attention; `chance`, the
    share of all patches that lie on objects; `best`, the precision of masks of the first masking's size that take
    patches on objects first; `attention` (and `attention_untrained`), the share of the attention on objects. Sums are
    over all images. Ranks share the images. Raises UserError for data without objects, an unknown
    masking and one that needs an attention that the encoder does not have.
    """
    begin, chosen = time.perf_counter(), MaskOverlapOptions(**options)
    dataset = data["test"] if isinstance(data, dict) else data
    if not hasattr(dataset, "mask") and not boxed.has_boxes(dataset):
        raise UserError(
            "mask overlap: these images have no object masks or boxes; use shapes, or the layout of VOC, COCO, CUB or "
            "the lists of wsolevaluation"
        )
    modules = maskings(encoder, chosen)
    count = len(dataset) if chosen.limit is None else min(chosen.limit, len(dataset))
    rows = torch.arange(count) if world is None else torch.arange(world.rank, count, world.size)
    corrupt: dict[str, str] = {}
    counts = overlap_counts(encoder, dataset, rows, modules, chosen.batch_size, corrupt)
    if chosen.untrained is not None:
        guided = {name: module for name, module in modules.items() if module.needs_attention}
        by_untrained = overlap_counts(chosen.untrained, dataset, rows, guided, chosen.batch_size, corrupt)
        counts |= {f"{name}_untrained": value for name, value in by_untrained.items() if name not in OF_THE_IMAGES}
    names = list(counts)
    totals = torch.tensor([counts[name] for name in names], dtype=torch.float64)
    if world is not None:
        totals = world.all_sum(totals)
    return Report(
        numbers={name: 100 * float(on) / max(float(total), 1e-12) for name, (on, total) in zip(names, totals)},
        protocol={
            "evaluation": "mask_overlap",
            "ratio": chosen.ratio,
            "ground_truth": "masks" if hasattr(dataset, "mask") else "boxes",
            "cover": COVER,
            "images": count,
            "seed": chosen.seed,
        },
        data_hash=fingerprint(dataset),
        cost=cost(begin, count, next(encoder.parameters()).device),
        corrupt=corrupt,
    )


def maskings(encoder, chosen: MaskOverlapOptions) -> dict:
    """Return {name: masking}. Raises UserError for an unknown one and for attention that the encoder does not have."""
    names = as_tuple(chosen.maskings) or COMPARED
    if unknown := [name for name in names if name not in MASKINGS]:
        raise UserError(f"mask overlap: no masking {unknown[0]!r}; choose from {', '.join(MASKINGS)}")
    built = {
        name: MASKINGS[name](ratio=chosen.ratio, var=0.0, prob=1.0, seed=chosen.seed)
        for name in names
        if name != "none"
    }
    if getattr(getattr(encoder, "pooling", None), "gives_attention", True):
        return built
    guided = [name for name, module in built.items() if module.needs_attention]
    if chosen.maskings and guided:
        raise UserError(
            f"mask overlap: {guided[0]} needs attention, and this encoder's pooling computes none; leave it out"
        )
    return {name: module for name, module in built.items() if name not in guided}


def overlap_counts(
    encoder, dataset, rows: Tensor, modules: dict, batch_size: int, corrupt: dict[str, str]
) -> dict[str, list[float]]:
    """Sum over images -> {name: [amount on objects, total amount]} of the numbers of `mask_overlap`."""
    counts: dict[str, list[float]] = {}

    def add(name: str, part: Tensor, total: Tensor) -> None:
        sums = counts.setdefault(name, [0.0, 0.0])
        sums[0] += float(part.double().sum())
        sums[1] += float(total.double().sum())

    sizes: dict[int, tuple[int, int]] = {}

    def view(image: Tensor, i: int) -> Tensor:
        sizes[i] = tuple(image.shape[-2:])
        return encoder.transform(image)

    device = next(encoder.parameters()).device
    with extract.evaluating(encoder), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for index, images in read(dataset, view, rows, batch_size, corrupt):
            features = encoder(images.to(device))
            on_objects = objects(encoder, dataset, index, features.grid, sizes)
            attention = None
            if features.attention is not None:
                attention = patch_attention(features.attention, encoder.pooling.k).float().cpu()
                add("attention", attention * on_objects, attention)
            add("chance", on_objects, torch.ones_like(on_objects))
            for number, (name, module) in enumerate(modules.items()):
                per_view = attention[:, None] if module.needs_attention else None
                mask = module(per_view, features.grid, step=0, sample_ids=index, views=1)
                add(name, mask & on_objects, mask)
                add(f"{name}_recall", mask & on_objects, on_objects)
                if number == 0:
                    masked = mask.sum(dim=1)
                    add("best", torch.minimum(masked, on_objects.sum(dim=1)), masked)
    return counts


def objects(encoder, dataset, index: Tensor, grid: tuple[int, int], sizes: Mapping = MappingProxyType({})) -> Tensor:
    """Return the patches of the encoder's crops that lie on objects, bool [n, N], row-major.

    sizes: (height, width) of the images by index, for data with boxes only.
    """
    covers = []
    for i in index.tolist():
        mask = boxed.object_mask(dataset, i, sizes.get(i)).to(torch.uint8) * 255
        cover = encoder.uint8_crop(mask.expand(len(encoder.mean), -1, -1))[0].float() / 255
        height, width = grid
        covers.append(cover.unflatten(1, (width, -1)).unflatten(0, (height, -1)).mean(dim=(1, 3)).flatten())
    return torch.stack(covers) >= COVER
