"""What a masking hides: the share of hidden patches that lie on objects, where the objects are known."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from maskwise.evaluation import features
from maskwise.evaluation.report import Report
from maskwise.functional.attention import mean_heads
from maskwise.functional.errors import UserError
from maskwise.methods.masking import MASKINGS

COVER = 0.5  # a patch is on an object when at least this share of its pixels is


def hiding(
    encoder,
    data,
    world=None,
    *,
    ratio: float = 0.3,
    maskings: Sequence[str] = ("attmask_high", "attmask_hint", "random", "block"),
    untrained=None,
    limit: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> Report:
    """Hide `ratio` of the patches of every image by each masking and count those on objects -> Report, in per cent.

    data: a dataset with `.mask(i)` bool [H, W], or {"test": one}; limit: its first images only. Numbers: one for each masking;
    `{masking}_untrained` for those that follow attention, by the encoder `untrained`; `chance`, the share of all patches that lie on
    objects; `attention` (and `attention_untrained`), the share of the attention on patches that falls there. Ranks share the images.
    Raises UserError for data without masks and for a masking that is unknown.
    """
    begin = time.perf_counter()
    dataset = data["test"] if isinstance(data, dict) else data
    if not hasattr(dataset, "mask"):
        raise UserError("hiding: these images have no object masks; use data with `.mask(i)`, such as shapes")
    unknown = [name for name in maskings if name not in MASKINGS]
    if unknown:
        raise UserError(f"hiding: no masking {unknown[0]!r}; choose from {', '.join(MASKINGS)}")
    rules = {name: MASKINGS[name](ratio=ratio, var=0.0, prob=1.0, seed=seed) for name in maskings if name != "none"}
    encoders = {"": encoder} if untrained is None else {"": encoder, "_untrained": untrained}
    count = len(dataset) if limit is None else min(limit, len(dataset))
    mine = torch.arange(count) if world is None else torch.arange(world.rank, count, world.size)

    hit: dict[str, list[float]] = {}
    corrupt: dict[str, str] = {}

    def add(name: str, share: Tensor, of: Tensor) -> None:
        total = hit.setdefault(name, [0.0, 0.0])
        total[0] += float(share.double().sum())
        total[1] += float(of.double().sum())

    for suffix, looking in encoders.items():
        device = next(looking.parameters()).device
        with features.evaluating(looking), torch.no_grad(), torch.autocast(device.type, enabled=False):
            for index, images in features.read(dataset, looking.transform, mine, batch_size, corrupt):
                seen = looking(images.to(device))
                on = objects(looking, dataset, index, seen.grid)
                attention = None if seen.attention is None else mean_heads(seen.attention).float().cpu()
                if attention is not None:
                    add(f"attention{suffix}", attention * on, attention)
                if not suffix:
                    add("chance", on, torch.ones_like(on))
                for name, rule in rules.items():
                    if suffix and not rule.needs_attention:
                        continue
                    hidden = rule(attention[:, None] if rule.needs_attention else None, seen.grid, step=0, sample_ids=index, views=1)
                    add(f"{name}{suffix}", hidden & on, hidden)
    names = list(hit)
    totals = torch.tensor([hit[name] for name in names], dtype=torch.float64)
    if world is not None:
        totals = world.all_sum(totals)
    return Report(
        numbers={name: 100 * float(part) / max(float(whole), 1e-12) for name, (part, whole) in zip(names, totals)},
        protocol={"evaluation": "hiding", "ratio": ratio, "cover": COVER, "images": count, "seed": seed},
        data_hash=features.fingerprint(dataset),
        cost={"seconds": round(time.perf_counter() - begin, 3), "images": count, "device": str(next(encoder.parameters()).device)},
        corrupt=corrupt,
    )


def objects(encoder, dataset, index: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which patches of the encoder's view of these images lie on objects -> bool [n, N], row-major."""
    covers = []
    for i in index.tolist():
        mask = encoder.uncoloured((dataset.mask(i).to(torch.uint8) * 255).expand(3, -1, -1))[0].float() / 255
        height, width = grid
        covers.append(mask.unflatten(1, (width, -1)).unflatten(0, (height, -1)).mean(dim=(1, 3)).flatten())
    return torch.stack(covers) >= COVER
