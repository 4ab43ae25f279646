"""The training loop."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from maskwise.engine.checkpoint import Checkpoint, Checkpoints
from maskwise.engine.collapse_alarms import CollapseAlarms
from maskwise.engine.run_end import failure_recorded
from maskwise.engine.run_log import BAD_BATCHES, RunLog
from maskwise.engine.signals import StopSignals
from maskwise.engine.trainer import Trainer
from maskwise.engine.unreadable_images import UnreadableImages
from maskwise.errors import UserError
from maskwise.functional.keyed_random import seed_scope
from maskwise.process.progress import showing


@dataclass(frozen=True)
class Intervals:
    """Steps between logged steps, checkpoints, evaluations and pictures; 0 means only at the end, or never for
    pictures.

    evaluate: one number for all evaluations, or one per name. evaluate_first: names evaluated before the first step.
    max_bad_steps: consecutive non-finite steps after which the run stops. save_also: a step saved in any case, 0: none.
    """

    log: int
    save: int
    evaluate: int | dict[str, int] = 0
    pictures: int = 0
    evaluate_first: tuple[str, ...] = ()
    max_bad_steps: int = 100
    save_also: int = 0

    def saves(self, step: int) -> bool:
        """Return whether a checkpoint is due at this step."""
        return due(step, self.save) or step == self.save_also > 0

    def evaluation(self, name: str) -> int:
        """Return the steps between two evaluations of that name."""
        return self.evaluate[name] if isinstance(self.evaluate, dict) else self.evaluate


def fit(
    trainer: Trainer,
    batches_from: Callable[[int], Iterator],
    augment: Callable,
    run_log: RunLog,
    checkpoints: Checkpoints,
    evaluations: dict[str, Callable],
    intervals: Intervals,
    *,
    pictures: Callable | None = None,
    crops_per_batch: int | None = None,
) -> dict:
    """Train to the end, from the last checkpoint if there is one; returns {"status", "step", "skipped"}.

    `batches_from(step)` yields this rank's batches from that step on; `augment(batch)` makes float crops of one.
    `evaluations` map a name to a callable(method) -> Report; all run at the end too. `pictures(method, batch)` returns
    uint8 pictures by name. crops_per_batch: global crops of one rank's (micro-)batch, for the collapse alarms. The
    status is "complete", or "preempted" after SIGTERM, SIGUSR1 or Ctrl-C on any rank: the step is finished and saved
    first. A checkpoint that the disk refuses is reported and tried again when the next is due; at the end, or when
    asked to stop, it is an error. Raises UserError for that, for an unusable checkpoint, for `max_bad_steps`
    consecutive non-finite steps, and whatever the batches raise.
    """
    world, total = trainer.world, trainer.total_steps
    with StopSignals() as signals, contextlib.closing(run_log), failure_recorded(run_log):
        checkpoint = resume(trainer, checkpoints)
        if trainer.step_index >= total:
            return {"status": "complete", "step": total, "skipped": int(trainer.skipped)}
        alarms, reported = reopen(trainer, run_log, checkpoint, crops_per_batch)
        if world.any(signals.asked):  # before the first step: save what there is
            return preempted(trainer, run_log)
        evaluate(trainer, run_log, alarms, overdue(evaluations, reported, trainer.step_index, intervals))
        stream = batches_from(trainer.step_index)
        batches, unreadable = prefetch(stream, world.device), UnreadableImages(run_log, world)
        while trainer.step_index < total:
            with saved_on_error(trainer, run_log, checkpoints), run_log.waiting(), unreadable.listed_on_error(stream):
                batch, sample_ids = next(batches)
            logged = trainer.step_index + 1 == total or due(trainer.step_index + 1, intervals.log)
            outputs = trainer.step(*augment(batch), sample_ids=sample_ids, statistics=logged)
            step, stop = trainer.step_index, world.any(signals.asked)
            last = step == total
            run_log.count(step, len(sample_ids) * world.size)

            if logged:
                log_step(trainer, run_log, alarms, outputs, intervals.max_bad_steps)
            if last or stop or due(step, intervals.log) or intervals.saves(step):
                unreadable.check(stream)
            if pictures and (last or due(step, intervals.pictures)):
                with seed_scope(step), paused(run_log):
                    eval_model = trainer.eval_model()
                    if run_log.main:
                        run_log.pictures(step, pictures(eval_model, batch))
            if last or not stop:
                names = [name for name in evaluations if last or due(step, intervals.evaluation(name))]
                evaluate(trainer, run_log, alarms, {name: evaluations[name] for name in names})
            if last or stop or intervals.saves(step):
                with paused(run_log):
                    save(trainer, run_log, checkpoints, final=last or stop)
            if stop and not last:
                return preempted(trainer, run_log)
        return {"status": "complete", "step": total, "skipped": int(trainer.skipped)}


def resume(trainer: Trainer, checkpoints: Checkpoints) -> Checkpoint | None:
    """Load the last checkpoint into the trainer, if there is one, and return it."""
    checkpoint, world = checkpoints.load_last(), trainer.world
    step = checkpoint.step if checkpoint else 0
    if world.any(int(world.all_sum(torch.tensor(step))) != step * world.size):
        raise UserError("the ranks found different checkpoints: put the run folder on a disk that all machines share")
    if checkpoint:
        skipped = checkpoint.meta.get("skipped", 0)
        trainer.load_tensors(checkpoint.tensors, checkpoint.optimizer, step=step, skipped=skipped)
        checkpoints.remove_stale(step)
    return checkpoint


def reopen(
    trainer: Trainer, run_log: RunLog, checkpoint: Checkpoint | None, crops_per_batch: int | None
) -> tuple[CollapseAlarms, set[str]]:
    """Truncate the run log at the checkpoint; returns alarms with its history, and the reports made at this step."""
    step = trainer.step_index
    records = run_log.open(step, checkpoint.meta.get("seconds", 0.0) if checkpoint else 0.0)
    prototypes = {
        key: len(center)
        for key in ("center", "patch_center")
        if (center := getattr(trainer.method, key, None)) is not None
    }
    alarms = CollapseAlarms(
        prototypes.get("center"),
        patch_prototypes=prototypes.get("patch_center"),
        crops_per_batch=crops_per_batch,
        total_steps=trainer.total_steps,
    )
    for record in records:
        if "loss" in record:
            alarms.check(record)
        elif "report" in record:
            alarms.check_evaluation(record["step"], record["report"], record["numbers"])
    return alarms, {record["report"] for record in records if "report" in record and record["step"] == step}


def due(step: int, every: int) -> bool:
    """Return whether something done every so many steps (0: never) is due at this step."""
    return bool(every and step and step % every == 0)


def overdue(evaluations: dict[str, Callable], reported: set[str], step: int, intervals: Intervals) -> dict:
    """Return the evaluations to run before the next step: postponed by an interruption, or wanted before the first."""
    first = intervals.evaluate_first if step == 0 else ()
    return {
        name: evaluation
        for name, evaluation in evaluations.items()
        if name not in reported and (name in first or due(step, intervals.evaluation(name)))
    }


def log_step(trainer: Trainer, run_log: RunLog, alarms: CollapseAlarms, outputs: dict, max_bad_steps: int) -> None:
    """Log the step just done, raise alarms, and stop a run that has become non-finite."""
    step = trainer.step_index
    record = run_log.log_step(step, step_metrics(trainer, outputs))
    run_log.bad_batches(trainer.bad_batches())
    for alarm in alarms.check(record):
        run_log.alarm(step, *alarm)
    abort_on_nonfinite(trainer, run_log, max_bad_steps)


def evaluate(trainer: Trainer, run_log: RunLog, alarms: CollapseAlarms, evaluations: dict[str, Callable]) -> None:
    """Evaluate the method in its present state, without changing any random state."""
    step, eval_model = trainer.step_index, trainer.eval_model() if evaluations else None
    for name, evaluation in evaluations.items():
        with seed_scope(step), paused(run_log), showing(None if run_log.quiet else name):
            report = evaluation(eval_model)
            run_log.report(step, name, report)
        for alarm in alarms.check_evaluation(step, name, report.numbers):
            run_log.alarm(step, *alarm)


def save(trainer: Trainer, run_log: RunLog, checkpoints: Checkpoints, *, final: bool) -> None:
    """Flush the run log and write a checkpoint; a failed one is an error only if it is the `final` one."""
    run_log.bad_batches(trainer.bad_batches())
    run_log.flush()
    try:
        checkpoints.save(
            trainer.step_index, *trainer.tensors(), meta={"skipped": int(trainer.skipped), "seconds": run_log.seconds}
        )
    except UserError as error:
        if final:
            raise UserError(
                f"{error}, then start the same command again: it continues from the last checkpoint that was written"
            ) from None
        run_log.print_line(f"{error}; the run continues and tries again at the next checkpoint")


@contextlib.contextmanager
def saved_on_error(trainer: Trainer, run_log: RunLog, checkpoints: Checkpoints):
    """Save the steps done if the batches end; with several ranks, which may be at different steps, nothing is saved."""
    try:
        yield
    except UserError as error:
        step = trainer.step_index
        outcome = "the same command continues from the last checkpoint" if step else "no step was done yet"
        if trainer.world.size == 1 and step:
            try:
                save(trainer, run_log, checkpoints, final=True)
                outcome = f"saved after step {step}, and the same command continues"
            except UserError as refused:
                outcome = str(refused)
        raise UserError(f"{error}; {outcome}") from None


def preempted(trainer: Trainer, run_log: RunLog) -> dict:
    """Record that the run was asked to stop; returns the result of `fit`."""
    run_log.preempted(trainer.step_index)
    return {"status": "preempted", "step": trainer.step_index, "skipped": int(trainer.skipped)}


def step_metrics(trainer: Trainer, outputs: dict) -> dict[str, float]:
    """Return the numbers of a logged step: means over ranks, and the schedules; waits for the GPU."""
    keys = sorted(key for key, value in outputs.items() if value.numel() == 1 and key not in ("ok", "grad_norm"))
    means = trainer.world.all_sum(torch.stack([outputs[key].double().reshape(()) for key in keys])) / trainer.world.size
    done = trainer.step_index - 1
    return {
        "epoch": done // trainer.steps_per_epoch,
        **dict(zip(keys, means.tolist())),
        "grad_norm": float(outputs["grad_norm"]),
        **({} if (gap := trainer.teacher_gap()) is None else {"teacher_gap": float(gap)}),
        "lr": trainer.schedules.lr(done),
        "wd": trainer.schedules.weight_decay(done),
        "momentum": trainer.schedules.momentum(done),
        "skipped": int(trainer.skipped),
    }


def abort_on_nonfinite(trainer: Trainer, run_log: RunLog, limit: int) -> None:
    """Stop all ranks after `limit` consecutive non-finite steps."""
    consecutive = int(trainer.skipped_in_a_row)
    if consecutive >= limit:
        raise UserError(
            f"the last {consecutive} steps had a non-finite loss or gradient and the run was stopped at step "
            f"{trainer.step_index}, no weight is damaged: start a new run (another --out) with a lower optimizer.lr or "
            f"train.precision=fp32, or look for damaged input ({run_log.folder / BAD_BATCHES} has causes and images of "
            "each step)"
        )


@contextlib.contextmanager
def paused(run_log: RunLog):
    """Exclude the time of the block from training time and waiting time."""
    run_log.stop_clock()
    yield
    run_log.start_clock()


def prefetch(stream: Iterator, device: torch.device) -> Iterator[tuple]:
    """Yield batches on the device, with sample ids on the host; a GPU copies one while the step before it runs."""
    if device.type != "cuda":
        for batch in stream:
            yield batch.to(device), batch.index
        return
    side = torch.cuda.Stream(device)
    waiting = None
    for batch in stream:
        # The copy waits for all steps issued so far, so the memory it gets is free, and overlaps with the next step.
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            moved = batch.to(device), batch.index
        if waiting is not None:
            yield waiting
        torch.cuda.current_stream(device).wait_stream(side)
        waiting = moved
    if waiting is not None:
        yield waiting
