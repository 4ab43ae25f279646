"""Attentive probing: a pooling and a linear classifier are trained on the patch tokens of a frozen encoder."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.data.crop_and_flip import CropAndFlip
from maskwise.evaluation import features
from maskwise.evaluation.gradients import everybodys, sum_gradients
from maskwise.evaluation.report import Report
from maskwise.functional import draws
from maskwise.functional.errors import UserError
from maskwise.nn import POOLINGS

STREAM = 47  # beside the streams of functional.draws
DEFAULTS = {"lr": 1e-3, "batch_size": 1024, "epochs": 90, "weight_decay": 0.0, "warmup_epochs": 10}


class Probe(nn.Module):
    """Normalised patch tokens [B, N, D] -> logits [B, C]: a row of POOLINGS, then a linear layer; of several vectors the largest logits."""

    def __init__(self, pooling: str, dim: int, classes: int, seed: int = 0, **options):
        super().__init__()
        with draws.seeded(int(draws.mix(STREAM, seed))):
            self.pooling = POOLINGS[pooling](dim, **options)
            self.norm = nn.LayerNorm(dim)
            self.head = nn.Linear(dim, classes)
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens -> logits."""
        pooled = self.pooling(tokens)
        return self.head(self.norm(pooled.vector)) if pooled.vectors is None or getattr(self.pooling, "reduce", "") != "max_logit" else self.head(self.norm(pooled.vectors)).amax(dim=1)


def attentive(
    encoder, data: dict, world=None, *, pooling: str = "simpool", lr: float | Sequence[float] = 1e-3, weight_decay: float = 0.0, batch_size: int = 1024,
    epochs: int = 90, warmup_epochs: int = 10, augment: bool = True, evaluate_every: int = 1, seed: int = 0, precision: str = "fp32",
) -> Report:  # fmt: skip
    """Train attentive probes on data["train"] and score them on data["test"] -> Report, accuracies in per cent.

    pooling: any row of POOLINGS that works on bare patch tokens; it stands on the encoder's normalised tokens, a LayerNorm and a linear
    layer on it. Several learning rates (per 256 images) train as many probes in the same passes of the encoder. AdamW, cosine per step
    to 0 after a linear warm-up, crops and flips as in linear probing (augment=False: the evaluation transform). No paper's protocol is
    claimed. Ranks share each batch and add their gradients. Numbers: top1, top5 of the best epoch and probe on the test set;
    best_epoch; top1_last, top5_last; parameters of a probe's pooling. Raises UserError for options out of range.
    """
    begin = time.perf_counter()
    rates = tuple(lr) if isinstance(lr, (tuple, list)) else (lr,)
    check(encoder, data, pooling, rates, precision, epochs=epochs, batch_size=batch_size, evaluate_every=evaluate_every)
    if warmup_epochs < 0 or warmup_epochs >= epochs:
        raise UserError(f"attentive: warmup_epochs {warmup_epochs} is not shorter than the run of {epochs} epochs; give warmup_epochs={epochs // 10}")
    device, labels = next(encoder.parameters()).device, torch.as_tensor(data["train"].labels)
    classes = int(max(labels.max(), torch.as_tensor(data["test"].labels).max())) + 1
    probes = nn.ModuleList(Probe(pooling, encoder.dim, classes, seed) for _ in rates).to(device)
    optimizers = [torch.optim.AdamW(probe.parameters(), lr=0.0, weight_decay=weight_decay) for probe in probes]
    steps = -(-len(labels) // batch_size)
    corrupt, best, scores, spent = {}, [(-1.0, -1.0, 0)] * len(rates), [], 0.0
    for epoch in range(epochs):
        start = time.perf_counter()
        for step, (tokens, truth) in enumerate(batches(encoder, data["train"], labels, epoch, batch_size, augment, seed, world, precision, corrupt)):
            factor = warm_cosine(epoch * steps + step, epochs * steps, warmup_epochs * steps) * batch_size / 256
            count = torch.tensor(float(len(truth)), device=device)
            count = count if world is None else world.all_sum(count)
            for probe, optimizer, rate in zip(probes, optimizers, rates):
                loss = F.cross_entropy(probe(tokens).float(), truth, reduction="sum") / count
                optimizer.zero_grad()
                loss.backward()
                sum_gradients(probe, world)
                optimizer.param_groups[0]["lr"] = rate * factor
                optimizer.step()
        spent += time.perf_counter() - start
        if epoch + 1 == epochs or (epoch + 1) % evaluate_every == 0:
            scores = accuracies(encoder, probes, data["test"], world, precision, corrupt)
            best = [max(old, (*new, epoch + 1), key=lambda one: one[0]) for old, new in zip(best, scores)]
    winner = max(range(len(rates)), key=lambda i: best[i][0])
    last = max(scores)
    numbers = {"top1": best[winner][0], "top5": best[winner][1], "best_epoch": best[winner][2], "top1_last": last[0], "top5_last": last[1]}
    numbers["pooling_parameters"] = sum(parameter.numel() for parameter in probes[0].pooling.parameters())
    if len(rates) > 1:
        numbers |= {"best_lr": rates[winner], **{f"top1_lr{rate:g}": score[0] for rate, score in zip(rates, best)}}
    seen = epochs * len(labels)
    prints = [features.fingerprint(data[role]) for role in ("train", "test")]
    chosen = {"lr": lr, "batch_size": batch_size, "epochs": epochs, "weight_decay": weight_decay, "warmup_epochs": warmup_epochs}
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "attentive", "preset": "maskwise", "pooling": pooling, **chosen, "augment": augment, "optimizer": "adamw", "seed": seed,
            "precision": precision, "classes": classes, "train": len(labels), "test": len(data["test"]), "evaluate_every": evaluate_every,
            "tokens": "patches of the last block after the final norm", "selection": "best epoch on the test set; _last beside it",
            "differences": [f"{key} {chosen[key]} instead of {value}" for key, value in DEFAULTS.items() if chosen[key] != value]
            + ([] if augment else ["the evaluation transform instead of random resized crops and flips"]),
        },
        data_hash=hashlib.sha256("".join(prints).encode()).hexdigest(),
        cost={
            "seconds": round(time.perf_counter() - begin, 3), "images": seen, "images_per_second": round(seen / max(1e-9, spent), 1), "device": str(device),
        },
        corrupt=everybodys(corrupt, world),
    )  # fmt: skip


def batches(encoder, dataset, labels: Tensor, epoch: int, batch_size: int, augment: bool, seed: int, world, precision: str, corrupt: dict) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's (tokens [b, N, D], labels [b]) of every step of an epoch, on the device; none of a step's images may be readable."""
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    order = draws.order(seed, epoch, len(labels))
    view = CropAndFlip(encoder.image_size, seed=seed, epoch=epoch) if augment else None
    shares = [chunk.tensor_split(size)[rank] for chunk in order.split(batch_size)]
    step_of = {int(row): step for step, share in enumerate(shares) for row in share}
    longest = max(1, max(map(len, shares)))
    device = next(encoder.parameters()).device
    stream = features.stream(encoder, dataset, rows=torch.cat(shares), view=view, batch_size=min(256, longest), precision=precision, corrupt=corrupt)
    held: list[tuple[Tensor, Tensor, list[int]]] = []
    empty = torch.zeros(0, 1, encoder.dim, device=device)
    ended = False
    for step in range(len(shares)):
        # a share may be shorter or longer than a pass of the encoder, and its images unreadable: rows are dealt out by the step they belong to
        while not ended and not any(which > step for _, _, steps in held for which in steps):
            found = next(stream, None)
            if found is None:
                ended = True
            else:
                index, _, seen = found
                held.append((seen.patches.float(), labels[index].to(device), [step_of[int(row)] for row in index]))
        parts, rest = [], []
        for tokens, truth, steps in held:
            here = [i for i, which in enumerate(steps) if which == step]
            later = [i for i, which in enumerate(steps) if which > step]
            if here:
                parts.append((tokens[here], truth[here]))
            if later:
                rest.append((tokens[later], truth[later], [steps[i] for i in later]))
        held = rest
        if parts:
            yield torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        else:
            yield empty, labels[:0].to(device)


def accuracies(encoder, probes, dataset, world, precision: str, corrupt: dict) -> list[tuple[float, float]]:
    """Top-1 and top-5 (or top-C) of every probe in per cent; ranks share the images."""
    labels, device = torch.as_tensor(dataset.labels), next(probes.parameters()).device
    hits, count = torch.zeros(len(probes), 2, dtype=torch.int64, device=device), 0
    mine = torch.arange(len(dataset)) if world is None else torch.arange(world.rank, len(dataset), world.size)
    with features.evaluating(probes), torch.no_grad():
        for index, _, seen in features.stream(encoder, dataset, rows=mine, precision=precision, corrupt=corrupt):
            truth, count = labels[index].to(device), count + len(index)
            for i, probe in enumerate(probes):
                logits = probe(seen.patches.float())
                right = logits.topk(min(5, logits.shape[1]), dim=1).indices == truth[:, None]
                hits[i] += torch.stack([right[:, 0].sum(), right.sum()])
    total = torch.tensor(count, device=device)
    if world is not None:
        hits, total = world.all_sum(hits), world.all_sum(total)
    return [tuple(row) for row in (100 * hits.double() / total.clamp_min(1)).tolist()]


def warm_cosine(step: int, total: int, warmup: int) -> float:
    """Linear from 1 / warmup to 1, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def check(encoder, data: dict, pooling: str, rates: tuple, precision: str, **counts) -> None:
    """Refuse what cannot be trained before any image is read."""
    features.check(encoder, ("patches",), precision)
    if pooling not in POOLINGS:
        raise UserError(f"attentive: no pooling {pooling!r}; there are {', '.join(POOLINGS)}")
    needs = set(getattr(POOLINGS[pooling], "needs", ()))
    if needs:
        raise UserError(f"attentive: pooling {pooling} needs {', '.join(sorted(needs))} of its own backbone and cannot stand on frozen patches; take simpool, or evaluate linear")
    if not rates or any(not rate > 0 for rate in rates):
        raise UserError(f"attentive: lr must be above 0, not {list(rates)}")
    for key, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"attentive: {key} is {value}; it must be a whole number from 1")
    for role in ("train", "test"):
        if data.get(role) is None or data[role].labels is None:
            raise UserError(f"attentive needs labels, and the {role} images have none; give a folder with one subfolder per class")
