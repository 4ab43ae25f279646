"""Replaying a step of a run: its batch from its keys, and the loss of each sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from maskwise.build.builders import builder_for
from maskwise.build.inputs import dataset, inputs, stream
from maskwise.build.networks import initial_model
from maskwise.build.running.continuing import PARTS, differing, last_images, training_images
from maskwise.build.running.run import start_process
from maskwise.build.running.run_folder import read_run
from maskwise.build.training import resolved_precision, trainer
from maskwise.build.whitening import learn_whitening
from maskwise.data.batch import Batch
from maskwise.data.decoding.jpeg import resolve_decoder
from maskwise.data.loader import steps_per_epoch
from maskwise.distributed.environment import world_size
from maskwise.distributed.world import World
from maskwise.engine import checkpoint
from maskwise.engine.loop import step_metrics
from maskwise.engine.run_log import BAD_BATCHES, read_records
from maskwise.engine.trainer import Trainer, micro_batches
from maskwise.errors import UserError
from maskwise.methods.sample_losses import completed_teachers, sample_losses
from maskwise.process.progress import counted, showing
from maskwise.recipe.reading import read_recipe
from maskwise.recipe.recipe import Recipe


@dataclass(frozen=True)
class StepBatch:
    """The batch of a step as training saw it, of all ranks.

    first, second: arguments of a step, crop-major float tensors on the device (global and local crops, or images and
    targets); sample_ids int64 [B]; ranks: the parts of the ranks as the loader made them.
    """

    first: Tensor
    second: Tensor | None
    sample_ids: Tensor
    ranks: list[Batch]


@dataclass(frozen=True)
class Weights:
    """The weights of a replay: the step after which they were saved or trained, and where they are from."""

    step: int
    source: str
    exact: bool


@dataclass(frozen=True)
class Replay:
    """A step of a run, replayed.

    names: of the images; losses: of the whole batch, as a logged step has them; logged: the record of that step, {} for
    a step that was not logged; samples: losses of each sample by name, [B]; masks: bool [V, B, N] of the student's
    global crops on `grid`, None without masks; statistics: mean and std of the inputs; bad: the entry of
    bad_batches.jsonl; notes: lines on what differs from the run.
    """

    step: int
    epoch: int
    weights: Weights
    ranks: int
    batch: StepBatch
    names: list[str]
    losses: dict[str, Any]
    logged: dict[str, Any]
    samples: dict[str, Tensor]
    masks: Tensor | None
    grid: tuple[int, int] | None
    statistics: tuple
    bad: dict
    notes: list[str]

    @property
    def order(self) -> list[int]:
        """Places of the samples, the largest loss first; one that is not finite is larger than any."""
        if "loss" not in self.samples:
            return list(range(len(self.batch.sample_ids)))
        values = self.samples["loss"].tolist()
        return sorted(range(len(values)), key=lambda i: -values[i] if math.isfinite(values[i]) else -math.inf)


class RunSteps:
    """Rebuild a step of a run in one process; bad: entry of bad_batches.jsonl in its place, from 1, or -1 for the last.

    Raises UserError for a run, a step or images that do not allow it.
    """

    def __init__(self, run, step: int | None = None, *, bad: int | None = None):
        if world_size() > 1:
            raise UserError("replay rebuilds the batches of all ranks in one process; start it without torchrun")
        self.run = Path(run).expanduser()
        if not (self.run / "recipe.yaml").is_file():
            raise UserError(f"{run} is not a run folder (it has no recipe.yaml); give the --out of a training run")
        self.notes: list[str] = []
        self.bad = {} if bad is None else bad_batch(self.run, bad)
        self.record = read_run(self.run)
        self.recipe = replay_recipe(read_recipe(self.run), self.record, self.notes)
        if step is None and not self.bad:
            raise UserError("replay: give the number of a STEP, as in metrics.jsonl, or --bad")
        self.step: int = self.bad["step"] if self.bad else step
        starts = [start for start in self.record.get("starts", []) if start.get("step", 0) < self.step]
        self.ranks = len(self.bad["sample_ids"]) if self.bad else (starts or [self.record])[-1].get("ranks", 1)
        self.data = dataset(self.recipe)
        images = self.record.get("images", len(self.data))
        train = self.recipe.train
        total = train.steps or train.epochs * max(1, steps_per_epoch(images, train.batch_size))
        if not 1 <= self.step <= total:
            raise UserError(f"{run} has the steps 1 to {total}; there is no step {self.step}")
        self.check_images({**self.record, "starts": starts})
        self.world = start_process(self.recipe)
        self.options = {
            "images": images,
            "classes": builder_for(self.recipe).classes(self.recipe, self.data),
            "precision": self.record.get("precision") or resolved_precision(self.recipe, self.world.device),
        }

    def check_images(self, record: dict) -> None:
        """Raise UserError where the images are not those that the step was trained on."""
        known, here = last_images(record), training_images(self.recipe, self.data)
        if parts := differing(known, here):
            difference = f"{here['count']} images, not {known['count']}" if "count" in parts else PARTS[parts[0]]
            raise UserError(
                f"the images of {self.run} have changed since step {self.step} was trained on them ({difference}): its "
                "batch cannot be rebuilt; bring the earlier images back"
            )

    def trainer(self, *, exact: bool) -> tuple[Trainer, Weights]:
        """Return a trainer before the step, with the nearest weights that are saved, or if `exact` with its own."""
        wanted = self.step - 1
        found = nearest(self.run / "checkpoints", wanted, before=exact, notes=self.notes) if wanted else None
        start = initial_model(self.recipe) if found is None else initial_model(self.recipe, self.run, self.record)
        accumulate = self.ranks * self.recipe.train.accumulate
        recipe = self.recipe.with_values({"train.accumulate": accumulate})
        made = trainer(recipe, self.world, start=start, **self.options)
        if found is None:
            learn_whitening(made.method, self.data, self.recipe, self.run / ".initial", self.world)
            weights = Weights(0, "initial weights", wanted == 0)
        else:
            made.load_tensors(found.tensors, found.optimizer, step=found.step)
            weights = Weights(found.step, str(found.path), found.step == wanted)
        if self.ranks > 1 and any(isinstance(part, _BatchNorm) for part in made.method.modules()):
            made.accumulate = self.recipe.train.accumulate  # batch norms were synchronized over the ranks
        if exact and not weights.exact:
            with showing("training in memory"):
                for batch in counted(self.batches(made, weights.step, wanted), wanted - weights.step, "steps", "step"):
                    made.step(batch.first, batch.second, batch.sample_ids)
            weights = Weights(wanted, f"{weights.source}, trained from step {weights.step} in memory", True)
        made.step_index = wanted
        return made, weights

    def batches(self, made: Trainer, begin: int, end: int) -> Iterator[StepBatch]:
        """Yield the batches of the steps with indices begin..end - 1, of all ranks together."""
        recipe = self.recipe if end - begin > 1 else self.recipe.with_values({"speed.cache": "none"})
        prepared = inputs(recipe, made)
        worlds = [World(rank, self.ranks, self.world.device) for rank in range(self.ranks)]
        streams = [stream(recipe, world, self.data, end, begin) for world in worlds]
        for _ in range(begin, end):
            ranks = [next(one) for one in streams]
            ids = torch.cat([batch.index for batch in ranks])
            order = torch.arange(len(ids))
            if made.accumulate == self.recipe.train.accumulate:  # each micro-batch over all ranks
                order = order.view(self.ranks, made.accumulate, -1).transpose(0, 1).flatten()
            parts = [prepared(batch.to(self.world.device)) for batch in ranks]
            first, second = (joined([part[place] for part in parts], len(ranks[0]), order) for place in (0, 1))
            yield StepBatch(first, second, ids[order], ranks)

    def image_names(self, batch: StepBatch) -> list[str]:
        """Return the names of the images of a batch, those that took the place of unreadable ones included."""
        unreadable = {name for part in batch.ranks for name in part.corrupt}
        if unreadable:
            self.notes.append(f"unreadable, replaced by the next image: {', '.join(sorted(unreadable))}")
        names = []
        for index in batch.sample_ids.tolist():
            place = index % len(self.data)
            while self.data.name(place) in unreadable:
                place = (place + 1) % len(self.data)
            names.append(self.data.name(place))
        return names

    def replay(self, *, exact: bool = False) -> Replay:
        """Return the step with its batch, its losses and those of its samples."""
        made, weights = self.trainer(exact=exact)
        batch = next(self.batches(made, self.step - 1, self.step))
        if self.bad and self.bad["sample_ids"] != [part.index.tolist() for part in batch.ranks]:
            self.notes.append(f"{BAD_BATCHES} lists other samples for step {self.step}: the images were others then")
        samples, masks = losses_of_samples(made, batch)
        grid = None if masks is None else made.method.teacher.encoder.backbone.grid_for(tuple(batch.first.shape[-2:]))
        encoder = made.method.teacher.encoder
        outputs = made.step(batch.first, batch.second, batch.sample_ids, statistics=True)
        losses = {**step_metrics(made, outputs), "finite": bool(outputs["ok"])}
        records = read_records(self.run / "metrics.jsonl", self.step)[0]
        logged = next((record for record in records if record["step"] == self.step and "loss" in record), {})
        return Replay(
            self.step,
            losses["epoch"],
            weights,
            self.ranks,
            batch,
            self.image_names(batch),
            losses,
            logged,
            samples,
            masks,
            grid,
            (encoder.mean, encoder.std),
            self.bad,
            self.notes,
        )


def losses_of_samples(made: Trainer, batch: StepBatch) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the losses of each sample by name, float64 [B], and the masks bool [V, B, N], None without masks."""
    method, step, epoch = made.method, made.step_index, made.epoch
    batches = micro_batches(batch.first, batch.second, batch.sample_ids, made.accumulate)
    found, masks = [], []
    with torch.no_grad(), torch.autocast(made.world.device.type, torch.bfloat16, enabled=made.precision == "bf16"):
        teachers = completed_teachers(method, batches, step=step, epoch=epoch)
        for (first, second, ids), teacher in zip(batches, teachers):
            options = {"step": step, "epoch": epoch, "sample_ids": ids, "teacher": teacher}
            found.append(sample_losses(method, first, second, **options))
            if teacher is not None:
                masks.append(teacher.masks.mask.unflatten(0, (-1, len(ids))))
    losses = {name: torch.cat([part[name] for part in found]).double().cpu() for name in found[0]}
    return losses, torch.cat(masks, dim=1).cpu() if masks else None


def joined(parts: Sequence[Tensor | None], samples: int, order: Tensor) -> Tensor | None:
    """Join the view-major tensors [V * b, ...] of ranks to [V * B, ...], with the samples of all ranks in an order."""
    if parts[0] is None:
        return None
    together = torch.cat([part.unflatten(0, (-1, samples)) for part in parts], dim=1)
    return together.index_select(1, order.to(together.device)).flatten(0, 1)


def nearest(folder: Path, step: int, *, before: bool, notes: list[str]) -> checkpoint.Checkpoint | None:
    """Read the last sound checkpoint up to a step, or else, unless `before`, the first after it; None without one."""
    paths = {int(path.name.removeprefix("step_")): path for path in checkpoint.directories(folder)}
    candidates = sorted((at for at in paths if at <= step), reverse=True)
    candidates += [] if before else sorted(at for at in paths if at > step)
    for at in candidates:
        try:
            return checkpoint.read(paths[at])
        except checkpoint.Damaged as fault:
            notes.append(f"checkpoint damaged ({paths[at].name}: {fault})")
    return None


def bad_batch(run: Path, number: int) -> dict:
    """Return an entry of bad_batches.jsonl, from 1, or -1 for the last; raises UserError where there is none."""
    entries = read_records(run / BAD_BATCHES)[0]
    if not entries:
        raise UserError(f"{run} lists no bad batches: no step of it was skipped; give a STEP")
    if number != -1 and not 1 <= number <= len(entries):
        raise UserError(f"{run / BAD_BATCHES} has the entries 1 to {len(entries)}; there is no entry {number}")
    return entries[number if number == -1 else number - 1]


def replay_recipe(recipe: Recipe, record: dict, notes: list[str]) -> Recipe:
    """Return a run's recipe for its replay: without data workers, and with the decoder that the run began with."""
    changed: dict[str, object] = {"speed.workers": 0}
    decoder = record.get("decoder")
    if recipe.data.decoder == "auto" and decoder:
        try:
            changed["data.decoder"] = resolve_decoder(decoder)
        except UserError:
            notes.append(f"the decoder {decoder} of the run does not work here: pixels may differ by rounding")
    return recipe.with_values(changed)
