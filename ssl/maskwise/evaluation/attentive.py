"""Attentive probing: a pooling and a linear classifier trained on the patch tokens of a frozen encoder."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.bounds import Count, NonNegative, NonNegativeInt, Positive
from maskwise.data.augmentation.probe_crop import CropAndFlip
from maskwise.errors import UserError
from maskwise.evaluation.features import extract, feature_names
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.evaluation.probes.gradient_sync import gather_all, sum_gradients
from maskwise.evaluation.protocol import Options, as_tuple, fitting_warmup, labeled_sets
from maskwise.evaluation.report import Report, joint_hash
from maskwise.functional import keyed_random
from maskwise.nn import POOLINGS
from maskwise.process.progress import counted

STREAM = 47  # of keyed random numbers, distinct from those of functional.keyed_random
DEFAULTS = {"lr": 1e-3, "batch_size": 1024, "epochs": 90, "weight_decay": 0.0, "warmup_epochs": 10}


class Probe(nn.Module):
    """Pooling, LayerNorm and linear layer: normalized patch tokens [B, N, D] -> logits [B, C].

    Of a pooling with several vectors and reduce="max_logit", each class takes its largest logit.
    """

    def __init__(self, pooling: str, dim: int, classes: int, seed: int = 0, **options):
        super().__init__()
        with keyed_random.seed_scope(int(keyed_random.make_key(STREAM, seed))):
            self.pooling = POOLINGS[pooling](dim, **options)
            self.norm = nn.LayerNorm(dim)
            self.head = nn.Linear(dim, classes)
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to logits."""
        pooled = self.pooling(tokens)
        if pooled.vectors is not None and getattr(self.pooling, "reduce", "") == "max_logit":
            return self.head(self.norm(pooled.vectors)).amax(dim=1)
        return self.head(self.norm(pooled.vector))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentiveOptions(Options):
    """Options of attentive probing.

    pooling: any of POOLINGS that works on bare patch tokens; lr: per 256 images, one or several (one probe each);
    warmup_epochs: 10 by default, in proportion where the run is not longer; augment=False: the evaluation transform
    instead of crops and flips.
    """

    evaluation = "attentive"

    pooling: str = "simpool"
    lr: Positive | Sequence[Positive] = 1e-3
    weight_decay: NonNegative = 0.0
    batch_size: Count = 1024
    epochs: Count = 90
    warmup_epochs: NonNegativeInt | None = None
    augment: bool = True
    evaluate_every: Count = 1
    seed: int = 0
    precision: str = "fp32"

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates as a tuple."""
        return as_tuple(self.lr)


def attentive(encoder, data: dict, world=None, **options) -> Report:
    """Train attentive probes on data["train"] and score them on data["test"] -> Report, accuracies in per cent.

    options: those of `AttentiveOptions`. The probe is a pooling on the encoder's normalized patch tokens, a LayerNorm
    and a linear layer. Several learning rates train as many probes in the same passes of the encoder. AdamW, cosine per
    step to 0 after a linear warm-up, crops and flips as in linear probing. No paper's protocol is claimed. Ranks share
    each batch and add their gradients. Numbers: top1, top5 of the best epoch and probe on the test set; best_epoch;
    top1_last, top5_last; parameters of a probe's pooling. Raises UserError for options out of range.
    """
    begin, chosen = time.perf_counter(), AttentiveOptions(**options)
    if chosen.warmup_epochs is None:
        chosen = dataclasses.replace(chosen, warmup_epochs=fitting_warmup(chosen.epochs, DEFAULTS))
    check(encoder, chosen)
    data = labeled_sets("attentive", data, "train", "test")
    device, labels = next(encoder.parameters()).device, torch.as_tensor(data["train"].labels)
    classes = int(max(labels.max(), torch.as_tensor(data["test"].labels).max())) + 1
    probes = nn.ModuleList(Probe(chosen.pooling, patch_width(encoder), classes, chosen.seed) for _ in chosen.rates).to(
        device
    )
    corrupt: dict[str, str] = {}
    best, last, training_seconds = train_probes(encoder, probes, data, world, chosen, corrupt)
    settings = {key: getattr(chosen, key) for key in DEFAULTS}
    differences = [
        f"{key} {settings[key]} instead of {value}" for key, value in DEFAULTS.items() if settings[key] != value
    ]
    if not chosen.augment:
        differences.append("the evaluation transform instead of random resized crops and flips")
    images = chosen.epochs * len(labels)
    return Report(
        numbers=probe_numbers(probes, chosen.rates, best, last),
        protocol={
            "evaluation": "attentive",
            "preset": "maskwise",
            "pooling": chosen.pooling,
            **settings,
            "augment": chosen.augment,
            "optimizer": "adamw",
            "seed": chosen.seed,
            "precision": chosen.precision,
            "classes": classes,
            "train": len(labels),
            "test": len(data["test"]),
            "evaluate_every": chosen.evaluate_every,
            "tokens": "patches of the last block after the final norm",
            "selection": "best epoch on the test set; _last: last epoch",
            "differences": differences,
        },
        data_hash=joint_hash(*(fingerprint(data[role]) for role in ("train", "test"))),
        cost={
            "seconds": round(time.perf_counter() - begin, 3),
            "images": images,
            "images_per_second": round(images / max(1e-9, training_seconds), 1),
            "device": str(device),
        },
        corrupt=gather_all(corrupt, world),
    )


def train_probes(encoder, probes, data: dict, world, chosen: AttentiveOptions, corrupt: dict):
    """Train all probes -> (scores of the best epochs, scores of the last epoch, seconds).

    Scores of a best epoch are (top-1, top-5, epoch), those of the last (top-1, top-5), for each probe.
    """
    labels, device = torch.as_tensor(data["train"].labels), next(probes.parameters()).device
    optimizers = [torch.optim.AdamW(probe.parameters(), lr=0.0, weight_decay=chosen.weight_decay) for probe in probes]
    steps = -(-len(labels) // chosen.batch_size)
    best, scores, seconds = [(-1.0, -1.0, 0)] * len(probes), [], 0.0
    for epoch in counted(range(chosen.epochs), chosen.epochs, "epochs", "epoch"):
        start, trained = time.perf_counter(), 0
        for step, (tokens, truth) in enumerate(batches(encoder, data["train"], epoch, world, chosen, corrupt)):
            factor = warm_cosine(epoch * steps + step, chosen.epochs * steps, chosen.warmup_epochs * steps)
            factor *= chosen.batch_size / 256
            count = torch.tensor(float(len(truth)), device=device)
            count = count if world is None else world.all_sum(count)
            if not float(count):  # none of this step's images can be read
                continue
            trained += 1
            for probe, optimizer, rate in zip(probes, optimizers, chosen.rates):
                loss = F.cross_entropy(probe(tokens).float(), truth, reduction="sum") / count
                optimizer.zero_grad()
                loss.backward()
                sum_gradients(probe, world)
                optimizer.param_groups[0]["lr"] = rate * factor
                optimizer.step()
        extract.require_images(trained, data["train"], corrupt)
        seconds += time.perf_counter() - start
        if epoch + 1 == chosen.epochs or (epoch + 1) % chosen.evaluate_every == 0:
            scores = accuracies(encoder, probes, data["test"], world, chosen.precision, corrupt)
            best = [max(old, (*new, epoch + 1), key=lambda entry: entry[0]) for old, new in zip(best, scores)]
    return best, scores, seconds


def probe_numbers(probes, rates: tuple[float, ...], best: list, last: list) -> dict:
    """Return the numbers of the report."""
    winner = max(range(len(rates)), key=lambda i: best[i][0])
    top1, top5, epoch = best[winner]
    numbers = {"top1": top1, "top5": top5, "best_epoch": epoch}
    numbers |= dict(zip(("top1_last", "top5_last"), max(last)))
    numbers["pooling_parameters"] = sum(parameter.numel() for parameter in probes[0].pooling.parameters())
    if len(rates) > 1:
        numbers |= {"best_lr": rates[winner], **{f"top1_lr{rate:g}": score[0] for rate, score in zip(rates, best)}}
    return numbers


def batches(
    encoder, dataset, epoch: int, world, chosen: AttentiveOptions, corrupt: dict
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's (tokens [b, N, D], labels [b]) of every step of an epoch, on the device.

    b is 0 where none of a step's images can be read.
    """
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    labels, device = torch.as_tensor(dataset.labels), next(encoder.parameters()).device
    order = keyed_random.order(chosen.seed, epoch, len(labels))
    shares = [chunk.tensor_split(size)[rank] for chunk in order.split(chosen.batch_size)]
    step_of = {int(row): step for step, share in enumerate(shares) for row in share}
    stream = extract.stream(
        encoder,
        dataset,
        rows=torch.cat(shares),
        view=CropAndFlip(encoder.image_size, seed=chosen.seed, epoch=epoch) if chosen.augment else None,
        batch_size=min(256, max(1, max(map(len, shares)))),
        precision=chosen.precision,
        corrupt=corrupt,
    )
    # A share may be shorter or longer than a pass of the encoder, and its images unreadable: rows go to their own step.
    pending: list[tuple[Tensor, Tensor, list[int]]] = []
    ended = False
    for step in range(len(shares)):
        while not ended and not any(later > step for _, _, steps in pending for later in steps):
            batch = next(stream, None)
            if batch is None:
                ended = True
            else:
                index, _, features = batch
                steps = [step_of[int(row)] for row in index]
                pending.append((features.patches.float(), labels[index].to(device), steps))
        parts = [select(batch, lambda of, step=step: of == step) for batch in pending]
        pending = [part for batch in pending if (part := select(batch, lambda of, step=step: of > step))[2]]
        empty = (torch.zeros(0, 1, patch_width(encoder), device=device), labels[:0].to(device), [])
        parts = [part for part in parts if part[2]] or [empty]
        yield torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def patch_width(encoder) -> int:
    """Return the width of an encoder's patches, which in some of timm's models is not that of the pooled vector."""
    return getattr(encoder, "patch_dim", encoder.dim)


def select(batch: tuple[Tensor, Tensor, list[int]], keep) -> tuple[Tensor, Tensor, list[int]]:
    """Return the rows of (tokens, labels, steps) whose step passes `keep`."""
    tokens, truth, steps = batch
    rows = [i for i, step in enumerate(steps) if keep(step)]
    return tokens[rows], truth[rows], [steps[i] for i in rows]


def accuracies(encoder, probes, dataset, world, precision: str, corrupt: dict) -> list[tuple[float, float]]:
    """Return top-1 and top-5 (or top-C) of every probe in per cent; ranks share the images."""
    labels, device = torch.as_tensor(dataset.labels), next(probes.parameters()).device
    hits, count = torch.zeros(len(probes), 2, dtype=torch.int64, device=device), 0
    mine = torch.arange(len(dataset)) if world is None else torch.arange(world.rank, len(dataset), world.size)
    with extract.evaluating(probes), torch.no_grad():
        for index, _, features in extract.stream(encoder, dataset, rows=mine, precision=precision, corrupt=corrupt):
            truth, count = labels[index].to(device), count + len(index)
            for i, probe in enumerate(probes):
                logits = probe(features.patches.float())
                right = logits.topk(min(5, logits.shape[1]), dim=1).indices == truth[:, None]
                hits[i] += torch.stack([right[:, 0].sum(), right.sum()])
    total = torch.tensor(count, device=device)
    if world is not None:
        hits, total = world.all_sum(hits), world.all_sum(total)
    extract.require_images(int(total), dataset, corrupt)
    return [tuple(row) for row in (100 * hits.double() / total).tolist()]


def warm_cosine(step: int, total: int, warmup: int) -> float:
    """Return the factor of the learning rate: linear from 1 / warmup to 1, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def check(encoder, chosen: AttentiveOptions) -> None:
    """Raise UserError for options that cannot be trained, before any image is read."""
    feature_names.check(encoder, ("patches",), chosen.precision)
    if chosen.pooling not in POOLINGS:
        raise UserError(f"attentive: no pooling {chosen.pooling!r}; choose from {', '.join(POOLINGS)}")
    needs = set(getattr(POOLINGS[chosen.pooling], "needs", ()))
    if needs:
        raise UserError(
            f"attentive: pooling {chosen.pooling} needs {', '.join(sorted(needs))} of its own backbone and does not "
            "work on frozen patch tokens; choose simpool, or evaluate linear"
        )
    if not chosen.rates:
        raise UserError("attentive: no learning rate given; give lr above 0")
    if chosen.warmup_epochs >= chosen.epochs:
        raise UserError(
            f"attentive: warmup_epochs {chosen.warmup_epochs} is not shorter than the run of {chosen.epochs} epochs; "
            f"give warmup_epochs={chosen.epochs // 10}"
        )
