"""A whole run in a folder: start it, or continue it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from maskwise.build.baselines import RunBaselines
from maskwise.build.builders import builder_for
from maskwise.build.evaluations import due_every, evaluations, masking_figure
from maskwise.build.images import Given, recipe_of_given
from maskwise.build.inputs import check_transform, inputs, labeled_test, own_tests, stream
from maskwise.build.inputs import dataset as opened
from maskwise.build.networks import encoder, initial_model
from maskwise.build.rank_agreement import check_ranks
from maskwise.build.running.continuing import EarlierRun, check_same_transform, earlier_run
from maskwise.build.running.extension import Extension, extension
from maskwise.build.running.mirroring import check_mirror, mirror, restore
from maskwise.build.running.run_folder import checkpoint_record, read_run, start_record, write_run
from maskwise.build.training import resolved_precision, trainer
from maskwise.build.whitening import learn_whitening
from maskwise.data.augmentation import color
from maskwise.data.loader import check_batch_size
from maskwise.data.notes import notes
from maskwise.distributed.environment import world_size
from maskwise.distributed.world import World
from maskwise.engine.checkpoint import Checkpoints
from maskwise.engine.loggers import check_loggers
from maskwise.engine.loop import Intervals, fit
from maskwise.engine.run_lock import RunLock, check_free
from maskwise.engine.run_log import RunLog, prepare_folder
from maskwise.engine.runtime import use_deterministic_kernels
from maskwise.engine.trainer import Trainer
from maskwise.errors import UserError
from maskwise.export.initial_model import InitialModel
from maskwise.process.malloc import keep_freed_memory
from maskwise.process.streams import print_notice
from maskwise.recipe.consistency import fitted
from maskwise.recipe.recipe import Recipe


def train(
    recipe: Recipe,
    out,
    *,
    dataset=None,
    test=None,
    transform: Callable | None = None,
    quiet: bool = False,
    accept_changed_data: bool = False,
) -> dict:
    """Run a recipe in the folder `out`, or continue the run that is there.

    dataset: training images in place of those of the recipe, a map-style torch dataset of images, (image, label) or
    {"image": image}; test: labeled test images of the same kind. transform: image -> two global and the recipe's number
    of local crops, in place of multi-crop and its colors, its random draws keyed by (seed, epoch, sample).
    accept_changed_data: continue on other images than before, with the run's own length of an epoch. Returns
    {"status": "complete"|"preempted", "step", "skipped", "folder"}. Raises UserError before anything is written when
    the folder, the images or the recipe cannot be used, or when the folder holds a run of another recipe or images.
    """
    recipe = recipe if dataset is None else recipe_of_given(recipe)
    return run_recipe(recipe, Path(out).expanduser(), Given(dataset, test, transform), quiet, accept_changed_data)


def run_recipe(
    recipe: Recipe, folder: Path, given: Given, quiet: bool, accept_changed_data: bool, extends: Extension | None = None
) -> dict:
    """Run a recipe in a folder, or continue the run that is there; extends: the run that a new one begins from."""
    check_free(folder)
    check_loggers(recipe.train.loggers or ())
    data = opened(recipe, given=given.dataset)
    check_transform(recipe, data, given.transform)
    joined = join_and_restore(recipe, folder, data)
    record, source = read_run(folder), folder
    begins_from = None if record else extends
    if begins_from:
        record, source = begins_from.record, begins_from.run
    check_same_transform(source, record, given.transform)
    epoch_images = record.get("images", len(data))  # the run's own, even if the images have changed
    recipe = fitted(recipe, epoch_images, world_size())
    before = begins_from.earlier if begins_from else partial(earlier_run, recipe=recipe)
    earlier = before(folder, data=data, accept_changed_data=accept_changed_data)
    check_batch_size(recipe.train.batch_size, len(data), world_size())
    classes = builder_for(recipe).classes(recipe, data)
    test, own = labeled_test(recipe, data, given), own_tests(recipe)
    world = joined or start_process(recipe)
    with world.fail_together(), RunLock(folder) as lock, contextlib.ExitStack() as stack:
        check_ranks(recipe, data, test, world)
        precision = record.get("precision") or resolved_precision(recipe, world.device)
        start = initial_model(recipe, source, record)
        running = trainer(recipe, world, images=epoch_images, classes=classes, precision=precision, start=start)
        prepare_folder(folder)
        lock_folder(lock, world, quiet)
        complete = (folder / "checkpoints" / f"step_{running.total_steps:08d}").is_dir()
        inherited, lines = inherit(begins_from, folder, world)
        if world.is_main and (begins_from or not record):
            write_run(folder, recipe, world, precision, earlier.images, start, inherited, given.transform)
        elif world.is_main and not complete:
            earlier.update(folder, recipe)
        world.barrier()
        about = {**start_record(world), **earlier.about()} if world.is_main else None
        files = {"main": world.is_main, "loggers": recipe.train.loggers or (), "about": about, "lock": lock}
        run_log = RunLog(folder, running.total_steps, quiet, **files)
        checkpoints = checkpoints_of(folder, recipe, running, run_log, checkpoint_record(recipe, classes, data))
        checkpoints.mirror = stack.enter_context(mirror(recipe, folder, run_log, checkpoints.keep_also))
        lines += start_messages(recipe, running, data, classes, folder, start, earlier)
        lines += learn_whitening(running.method, data, recipe, folder, world)
        for line in [*notes({"data": data, "test": test}), *lines] if world.is_main and not complete else ():
            run_log.print_line(line)
        baselines = RunBaselines(recipe, data, test, world, run_log, partial(encoder, recipe, start))
        result = fit(
            running,
            partial(stream, recipe, world, data, running.total_steps, transform=given.transform),
            inputs(recipe, running),
            run_log,
            checkpoints,
            evaluations(recipe, data, test, world, own, baselines),
            intervals(recipe, running, continues_a_model=start is not None),
            pictures=masking_figure if recipe.evaluate.pictures_every else None,
            crops_per_batch=2 * recipe.train.batch_size // world.size // recipe.train.accumulate,
        )
        return {**result, "folder": str(folder)}


def join_and_restore(recipe: Recipe, folder: Path, data) -> World | None:
    """Join the ranks and fetch the run from its mirror; None without train.mirror, where the ranks join later."""
    if recipe.train.mirror is None:
        return None
    check_mirror(recipe)
    world = start_process(recipe)
    restore(recipe, folder, data, world)
    return world


def checkpoints_of(folder: Path, recipe: Recipe, running: Trainer, run_log: RunLog, meta: dict) -> Checkpoints:
    """Return the checkpoints of a run; meta: what each of them records."""
    return Checkpoints(
        folder,
        recipe.train.keep,
        encoder_spec=running.method.teacher.encoder.spec(),
        world=running.world,
        print_line=run_log.print_line,
        shards=running.shards,
        meta=meta,
        lock=run_log.lock,
        keep_also=before_decay(recipe, running.total_steps),
    )


def extend(
    run,
    out,
    *overrides: str,
    dataset=None,
    test=None,
    transform: Callable | None = None,
    quiet: bool = False,
    accept_changed_data: bool = False,
    **length: int | None,
) -> dict:
    """Train a complete or stopped run for longer in the folder `out`, or continue there; the run stays as it is.

    length: `epochs`, or `steps` for a run that is counted in steps; overrides: `section.key=value`, of the schedule and
    of what may change between starts; dataset, test, transform: of `train`, where the run has them. Returns what
    `train` returns. Raises UserError as `extension` and `train`.
    """
    extends, given = extension(run, out, *overrides, **length), Given(dataset, test, transform)
    return run_recipe(extends.recipe, Path(out).expanduser(), given, quiet, accept_changed_data, extends)


def inherit(extends: Extension | None, folder: Path, world: World) -> tuple[dict, list[str]]:
    """Copy the checkpoint that an extended run begins from; returns its entries of run.json, and lines to print.

    Rank 0 copies, and a UserError of it is raised on all ranks.
    """
    inherited, lines, problem = {}, [], ""
    if extends and world.is_main:
        try:
            inherited, lines = extends.copy_into(folder)
        except UserError as error:
            problem = str(error)
    if extends:
        world.raise_together(problem)
    return inherited, lines


def lock_folder(lock: RunLock, world: World, quiet: bool) -> None:
    """Lock the run folder on rank 0, with one line where the lock may not tell everything.

    Raises the same UserError on all ranks if another process writes into the folder.
    """
    problem = ""
    if world.is_main:
        try:
            line = lock.acquire()
            if line and not quiet:
                print_notice(line)
        except UserError as error:
            problem = str(error)
    world.raise_together(problem)


def start_process(recipe: Recipe) -> World:
    """Apply the process-wide options of section speed and join the ranks; returns the World."""
    speed = recipe.speed
    if speed.threads:
        torch.set_num_threads(speed.threads)
    if speed.deterministic:
        use_deterministic_kernels()
    world = World.start()
    if speed.keep_memory and world.device.type == "cpu":
        keep_freed_memory()
    return world


def before_decay(recipe: Recipe, total: int) -> int:
    """Return the step before the decay of schedule wsd, from which the run can be extended; 0 without one."""
    decay = recipe.optimizer.decay_steps(total)
    return total - decay if decay else 0


def intervals(recipe: Recipe, running: Trainer, *, continues_a_model: bool) -> Intervals:
    """Return how often a run logs, saves, evaluates and draws, in steps."""
    steps_per_epoch = running.steps_per_epoch
    return Intervals(
        log=recipe.train.log_every,
        save=recipe.train.save_every or steps_per_epoch,
        evaluate=due_every(recipe, steps_per_epoch),
        pictures=recipe.evaluate.pictures_every * steps_per_epoch,
        evaluate_first=("knn",) if continues_a_model or recipe.evaluate.knn_first else (),
        max_bad_steps=recipe.train.max_bad_steps,
        save_also=before_decay(recipe, running.total_steps),
    )


def start_messages(
    recipe: Recipe,
    running: Trainer,
    data,
    classes: int | None,
    folder: Path,
    start: InitialModel | None,
    earlier: EarlierRun,
) -> list[str]:
    """Return the console lines at the start of a run: what is trained, on what, and from which weights."""
    subject = f"masking {recipe.masking.name}" if classes is None else f"{classes} classes"
    world = running.world
    lines = [
        f"{'continuing' if earlier.record else 'starting'} {folder}: {recipe.method.name}, {subject}, "
        f"{recipe.backbone.name}, {len(data)} images, {running.total_steps} steps of {recipe.train.batch_size}, "
        f"{running.precision} on {world.size} x {world.device.type}"
    ]
    lines += [*recipe.notes, *earlier.lines()]
    skipped = color.skipped_operations(len(running.method.teacher.encoder.mean))
    if skipped and not earlier.record:
        lines.append(skipped)
    if start is not None and start.source is not None:
        lines += start.summary()
        if running.freeze_steps:
            lines.append(
                f"encoder frozen for the first {running.freeze_steps} of {running.total_steps} steps (head warm-up)"
            )
    return lines
