"""`fit`: the training loop."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from maskwise.engine.bad_images import BadImages
from maskwise.engine.checkpoint import Checkpoint, Checkpoints
from maskwise.engine.health import Health
from maskwise.engine.interrupts import Interrupts
from maskwise.engine.journal import BAD_BATCHES, Journal
from maskwise.engine.trainer import Trainer
from maskwise.functional.draws import seeded
from maskwise.functional.errors import UserError


def fit(trainer: Trainer, batches_from: Callable[[int], Iterator], augment: Callable, journal: Journal, checkpoints: Checkpoints,
        evaluations: dict[str, Callable], *, log_every: int, save_every: int, evaluate_every: int | dict[str, int] = 0,
        pictures: Callable | None = None, pictures_every: int = 0, evaluate_first: tuple[str, ...] = (),
        max_bad_steps: int = 100, rows: int | None = None) -> dict:
    """Train to the end, from the last checkpoint if there is one; returns {"status", "step", "skipped"}.

    `batches_from(step)` yields this rank's batches from that step on; `augment(batch)` makes its float crops;
    `evaluations` map a name to a callable(method) -> Report, due every `evaluate_every` steps (one number for all, or one
    for each name; 0: only at the end), at the end and, those named in `evaluate_first`, before the first step; `pictures(method, batch)`
    returns uint8 pictures by name; `rows` is how many global crops a (micro-)batch of one rank has. The status is "complete", or "preempted" after
    SIGTERM, SIGUSR1 or Ctrl-C on any rank: the step is finished and saved first. A checkpoint that the disk refuses is said and tried again
    when the next is due; at the end, or when told to stop, it is an error. Raises UserError for that, when a checkpoint is
    unusable or `max_bad_steps` steps in a row were not finite, and whatever the batches raise.
    """
    world, total = trainer.world, trainer.total_steps
    every = evaluate_every if isinstance(evaluate_every, dict) else dict.fromkeys(evaluations, evaluate_every)
    with Interrupts() as interrupts, contextlib.closing(journal):
        found = resume(trainer, checkpoints)
        if trainer.step_index >= total:
            return {"status": "complete", "step": total, "skipped": int(trainer.skipped)}
        health, reported = reopen(trainer, journal, found, rows)
        if world.any(interrupts.asked):  # before the first step: what there is to save is saved
            return preempted(trainer, journal)
        first = evaluate_first if trainer.step_index == 0 else ()
        put_off = {name: call for name, call in evaluations.items() if name not in reported and (name in first or due(trainer.step_index, every[name]))}
        report(trainer, journal, health, put_off)  # by the interruption
        stream = batches_from(trainer.step_index)
        batches, bad = ahead(stream, world.device), BadImages(journal, world)
        while trainer.step_index < total:
            with journal.waiting(), bad.listed_on_the_way_out(stream):
                batch, sample_ids = next(batches)
            seen = trainer.step(*augment(batch), sample_ids=sample_ids)
            step, stop = trainer.step_index, world.any(interrupts.asked)
            last = step == total
            journal.count(step, len(sample_ids) * world.size)

            if last or due(step, log_every):
                line = journal.line(step, numbers(trainer, seen))
                journal.bad_batches(trainer.bad_batches())
                for alarm in health.check(line):
                    journal.alarm(step, *alarm)
                refuse_hopeless(trainer, journal, max_bad_steps)
            if last or stop or due(step, log_every) or due(step, save_every):
                bad.check(stream)
            if pictures and (last or due(step, pictures_every)):
                with seeded(step), paused(journal):
                    shown = trainer.shown()
                    if journal.main:
                        journal.pictures(step, pictures(shown, batch))
            if last or not stop:
                report(trainer, journal, health, {name: call for name, call in evaluations.items() if last or due(step, every[name])})
            if last or stop or due(step, save_every):
                with paused(journal):
                    save(trainer, journal, checkpoints, final=last or stop)
            if stop and not last:
                return preempted(trainer, journal)
        return {"status": "complete", "step": total, "skipped": int(trainer.skipped)}


def resume(trainer: Trainer, checkpoints: Checkpoints) -> Checkpoint | None:
    """Take up the last checkpoint, if there is one, and return it."""
    found, world = checkpoints.load_last(), trainer.world
    step = found.step if found else 0
    if world.any(int(world.all_sum(torch.tensor(step))) != step * world.size):
        raise UserError("the ranks found different checkpoints: put the run folder on a disk that all machines share")
    if found:
        trainer.load_tensors(found.tensors, found.optimizer, step=step, skipped=found.meta.get("skipped", 0))
        checkpoints.tidy(step)
    return found


def reopen(trainer: Trainer, journal: Journal, found: Checkpoint | None, rows: int | None) -> tuple[Health, set[str]]:
    """Cut the journal where the checkpoint stands; returns a Health that has read it and the reports made at this step."""
    step = trainer.step_index
    lines = journal.open(step, found.meta.get("seconds", 0.0) if found else 0.0)
    prototypes = {key: len(center) for key in ("center", "patch_center") if (center := getattr(trainer.method, key, None)) is not None}
    health = Health(prototypes.get("center"), patch_prototypes=prototypes.get("patch_center"), rows=rows, total_steps=trainer.total_steps)
    for line in lines:
        if "loss" in line:
            health.check(line)
        elif "report" in line:
            health.judge(line["step"], line["report"], line["numbers"])
    return health, {line["report"] for line in lines if "report" in line and line["step"] == step}


def due(step: int, every: int) -> bool:
    """Whether a duty of every so many steps (0: never) falls on this step."""
    return bool(every and step and step % every == 0)


def report(trainer: Trainer, journal: Journal, health: Health, evaluations: dict[str, Callable]) -> None:
    """Evaluate the method as it stands, without moving any random state."""
    step, shown = trainer.step_index, trainer.shown() if evaluations else None
    for name, evaluate in evaluations.items():
        with seeded(step), paused(journal):
            found = evaluate(shown)
            journal.report(step, name, found)
        for alarm in health.judge(step, name, found.numbers):
            journal.alarm(step, *alarm)


def save(trainer: Trainer, journal: Journal, checkpoints: Checkpoints, *, final: bool) -> None:
    """Write a checkpoint of this step, after everything that the journal has to say about it; one that fails is an error only if it is the `final` one."""
    journal.bad_batches(trainer.bad_batches())
    journal.flush()
    try:
        checkpoints.save(trainer.step_index, *trainer.tensors(), meta={"skipped": int(trainer.skipped), "seconds": journal.seconds})
    except UserError as error:
        if final:
            raise UserError(f"{error}, then start the same command again: it goes on from the last checkpoint that was written") from None
        journal.say(f"{error}; the run goes on and tries again at the next checkpoint")


def preempted(trainer: Trainer, journal: Journal) -> dict:
    """Say that the run was told to stop, and return what `fit` returns then."""
    journal.preempted(trainer.step_index)
    return {"status": "preempted", "step": trainer.step_index, "skipped": int(trainer.skipped)}


def numbers(trainer: Trainer, seen: dict) -> dict[str, float]:
    """What a logged line says of the step just done: means over ranks, and where the schedules stood; waits for the GPU."""
    keys = sorted(key for key, value in seen.items() if value.numel() == 1 and key not in ("ok", "grad_norm"))
    means = trainer.world.all_sum(torch.stack([seen[key].double().reshape(()) for key in keys])) / trainer.world.size
    done = trainer.step_index - 1
    return {
        "epoch": done // trainer.steps_per_epoch,
        **dict(zip(keys, means.tolist())),
        "grad_norm": float(seen["grad_norm"]),
        **({} if (gap := trainer.teacher_gap()) is None else {"teacher_gap": float(gap)}),
        "lr": trainer.lr(done),
        "wd": trainer.weight_decay(done),
        "momentum": trainer.momentum(done),
        "skipped": int(trainer.skipped),
    }


def refuse_hopeless(trainer: Trainer, journal: Journal, limit: int) -> None:
    """Stop all ranks when nothing has been finite for `limit` steps."""
    row = int(trainer.skipped_in_a_row)
    if row >= limit:
        raise UserError(
            f"the last {row} steps had a non-finite loss or gradient and the run was stopped at step {trainer.step_index}, no weight is damaged: "
            f"lower optimizer.lr, set train.precision=fp32, or look for damaged input ({journal.folder / BAD_BATCHES} has each step's causes and images)"
        )


@contextlib.contextmanager
def paused(journal: Journal):
    """Time spent in here is neither training nor waiting for data."""
    journal.stop_clock()
    yield
    journal.start_clock()


def ahead(stream: Iterator, device: torch.device) -> Iterator[tuple]:
    """The batches on the device, each with its sample ids on the host; on a GPU one is copied while the step before it runs."""
    if device.type != "cuda":
        for batch in stream:
            yield batch.to(device), batch.index
        return
    side = torch.cuda.Stream(device)
    waiting = None
    for batch in stream:
        # The copy waits for all steps issued so far, so memory it is given is free, and runs beside the step issued next.
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            moved = batch.to(device), batch.index
        if waiting is not None:
            yield waiting
        torch.cuda.current_stream(device).wait_stream(side)
        waiting = moved
    if waiting is not None:
        yield waiting
