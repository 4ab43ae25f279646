"""The one composition root: recipes become objects here, and below nobody knows of recipes."""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import partial
from pathlib import Path

import torch

from maskwise import labelled
from maskwise.data import augment as colour
from maskwise.data import bands, loader
from maskwise.data.datasets import DATASETS
from maskwise.data.multicrop import MultiCrop
from maskwise.data.subset import evenly
from maskwise.distributed.world import World
from maskwise.engine.checkpoint import Checkpoints
from maskwise.engine.determinism import be_deterministic
from maskwise.engine.journal import Journal, prepare_folder
from maskwise.engine.loop import fit
from maskwise.engine.memory import keep_freed_memory
from maskwise.engine.optim import check_groups, make_optimizer, parameter_groups
from maskwise.engine.trainer import Trainer
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.report import Report
from maskwise.export.start import Start
from maskwise.functional import draws, schedules
from maskwise.functional.errors import UserError
from maskwise.methods import METHODS
from maskwise.methods.masking import MASKINGS
from maskwise.nn import POOLINGS, Backbone, Encoder, ProjectionHead
from maskwise.recipe import Recipe, check_run
from maskwise.recipe_evaluations import scheduled
from maskwise.recipe_schema import named, parameters_of
from maskwise.run_record import commit, known_run, this_start, write_run


def row(table: dict, section: str, name: str):
    """The class of a table's row, or of `module:Name`."""
    return table[name] if name in table else named(section, name)


def dataset(recipe: Recipe, role: str = "train"):
    """The training images, or with role="test" the labelled test images (None when the recipe names none)."""
    data = recipe.data
    options = data.keywords()
    maker = row(DATASETS, "data", data.name)
    if data.mean is not None and "channels" in parameters_of(maker)[0]:
        options["channels"] = len(data.mean)
    if data.name == "shapes":
        options.update(seed=recipe.seed, **({"split": "test"} if role == "test" else {}))
    elif role == "test":
        if data.test_path is None and data.test_split is None:
            return None
        options.update(path=data.test_path or options["path"], split=data.test_split, per_class=None)
    return maker(**options)


def encoder(recipe: Recipe, start: Start | None = None) -> Encoder:
    """The encoder before training: weights are a function of the recipe's seed, input statistics and table size those of `start`."""
    options = recipe.backbone.keywords()
    asked = options.pop("image_size", None)
    size = start.image_size(asked) if start else asked or recipe.image_size
    pool = row(POOLINGS, "pooling", recipe.pooling.name)
    if options.get("class_token") is None and "cls_attention" not in pool.needs:
        options["class_token"] = False  # nobody would read it (pooling.md 1.6)
    hides = not recipe.learns_labels and recipe.masking.name != "none"
    with draws.seeded(recipe.seed):
        backbone = Backbone(recipe.backbone.name, image_size=size, mask_token=hides, mean=recipe.data.mean, std=recipe.data.std, **options)
        chosen = recipe.pooling.keywords()
        if recipe.pooling.name == "simpool" and chosen["weight_start"] is None and backbone.kind == "ResNet":
            chosen["weight_start"] = "uniform"  # its reference leaves linear layers at torch's start (pooling.md 1.6)
        pooling = pool(backbone.dim, **chosen)
        built = Encoder(backbone, pooling, norm=recipe.pooling.norm)
    built.crop_pct = recipe.evaluate.crop_pct
    return start.dress(built) if start else built


def start_of(recipe: Recipe, folder: Path | None = None, begun: dict | None = None) -> Start | None:
    """The model that a recipe continues from, None where it begins from nothing; a run under way needs its file no longer.

    Raises UserError when it cannot be read, or is not the one that the run in `folder` began with.
    """
    if recipe.method.start_from is None:
        return None
    known = (begun or {}).get("start")
    if known and folder and (folder / "checkpoints" / "last").is_file():
        return Start.remembered(known)
    start = Start.open(recipe.method.start_from, backbone=recipe.backbone.name, gamma=recipe.pooling.keywords().get("gamma", 1.25))
    if known and known["sha256"] != start.digest:
        raise UserError(f"method.start_from {start.name} has changed since {folder} began: give another --out, or bring the old one back")
    return start


def method(recipe: Recipe, world: World, start: Start | None = None, classes: int | None = None):
    """Student, teacher, head and masking (or a classifier of so many classes) as the recipe's method, with the weights of `start` where there is one."""
    student = encoder(recipe, start)
    hasten(student.backbone, recipe, world.device)
    if recipe.learns_labels:
        built = labelled.method(recipe, student, classes)
        if start and start.source:
            start.fill(built, "fresh")
        return built
    with draws.seeded(recipe.seed + 1):
        head = ProjectionHead(student.dim, **recipe.head.keywords())
    teacher, options = recipe.teacher, recipe.method.keywords()
    options.update(
        teacher_temp=teacher.temp, warmup_teacher_temp=teacher.warmup_temp, warmup_teacher_temp_epochs=teacher.warmup_temp_epochs,
        all_sum=world.all_sum, world_size=world.size, seed=recipe.seed,
        masking=row(MASKINGS, "masking", recipe.masking.name)(seed=recipe.seed, **recipe.masking.keywords()),
    )  # fmt: skip
    maker = row(METHODS, "method", recipe.method.name)
    if "patch_temp" in parameters_of(maker)[0]:  # iBOT, or a method of one's own made from it
        options.update(patch_temp=teacher.patch_temp, warmup_patch_temp=teacher.warmup_patch_temp)
    built = maker(student, head, **options)
    if start and start.source:
        start.fill(built, recipe.method.start_head)
    return built


def hasten(backbone, recipe: Recipe, device: torch.device) -> None:
    """Tell a backbone how to compute, as section speed has it; a family that cannot is left alone where nothing was asked."""
    speed = recipe.speed
    if speed.compile and not can_compile(device):
        needed = "a C++ compiler (g++, or what CXX names)" if device.type == "cpu" else "triton"
        raise UserError(f"speed.compile=true needs {needed}, which this machine lacks: install it, or give speed.compile=false")
    lean = "elementwise" if device.type == "cpu" and not speed.compile else "none"  # a compiler decides that for itself
    chosen = lean if speed.checkpointing == "auto" else speed.checkpointing
    if hasattr(backbone, "checkpointing"):
        backbone.checkpointing, backbone.compiled = chosen, speed.compile
    elif speed.compile or speed.checkpointing not in ("auto", "none"):
        raise UserError(f"{recipe.backbone.name} knows neither speed.compile nor speed.checkpointing; leave them at false and auto")


def can_compile(device: torch.device) -> bool:
    """Whether what torch.compile hands its code to is here."""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) is not None
    return importlib.util.find_spec("triton") is not None


def rounded_rows(recipe: Recipe, world: World, precision: str, patches: int) -> int:
    """The multiple to which patch rows are padded, so that their number takes few values where every new one costs: 16 of them at most."""
    if world.device.type == "cpu" and precision == "fp32" and not recipe.speed.compile:
        return 1
    return max(1, 2 * recipe.train.batch_size // world.size // recipe.train.accumulate * patches // 16)


def trainer(
    recipe: Recipe, world: World | None = None, *, images: int | None = None, classes: int | None = None, precision: str | None = None, start: Start | None = None,
) -> Trainer:  # fmt: skip
    """Everything that one step needs; `.step(global_crops, local_crops)` does one, or `.step(images, targets)` where labels are learnt.

    `images` is the length of the training set, which gives the steps of an epoch, and `classes` how many it has where they are learnt (default: the
    recipe's dataset is opened); `start` the model to continue from (default: the recipe's method.start_from is opened).
    """
    start = start or start_of(recipe)
    world = world or World.start()
    classes = classes or recipe.classifier.classes
    if images is None or recipe.learns_labels and classes is None:
        data = dataset(recipe)
        images, classes = images or len(data), labelled.classes_of(recipe, data) if recipe.learns_labels else None
    steps_per_epoch = max(1, loader.steps_per_epoch(images, recipe.train.batch_size))
    total = recipe.train.steps or recipe.train.epochs * steps_per_epoch
    optimizer = recipe.optimizer
    model = method(recipe, world, start, classes)
    precision = precision or resolved_precision(recipe, world.device)
    if getattr(model, "pad_rows", None) == 1:
        grid = model.student.encoder.backbone.grid_for((recipe.crops.global_size,) * 2)
        model.pad_rows = rounded_rows(recipe, world, precision, grid[0] * grid[1])
    shards = sharded(model, recipe, world, precision)
    groups = parameter_groups(model)
    check_groups(model, groups)
    groups = shards.own_groups(groups) if shards else groups
    momentum = recipe.teacher.momentum or 0.0
    waits = start and not recipe.learns_labels  # a classifier is begun anew beside the encoder that it moves
    return Trainer(
        model,
        optimizer=make_optimizer(optimizer.name, groups, **optimizer.keywords()),
        world=world,
        lr=partial(
            schedules.cosine, total=total, start=optimizer.peak(recipe.train.batch_size), end=optimizer.min_lr,
            warmup=min(total, round(optimizer.warmup_epochs * steps_per_epoch)), warmup_start=optimizer.warmup_lr,
        ),
        weight_decay=partial(schedules.cosine, total=total, start=optimizer.weight_decay, end=optimizer.weight_decay_end),
        momentum=partial(schedules.cosine, total=total, start=momentum, end=momentum if recipe.learns_labels else recipe.teacher.momentum_end),
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        clip=optimizer.clip,
        clip_mode=optimizer.clip_mode,
        freeze_last_layer=0 if recipe.learns_labels else optimizer.freeze_last_layer,
        precision=precision,
        accumulate=recipe.train.accumulate,
        shards=shards,
        still=start.still([name for name, _ in model.named_parameters()]) if waits else (),
        still_steps=round(start.warmup_epochs(recipe.method.head_warmup_epochs, total / steps_per_epoch) * steps_per_epoch) if waits else 0,
    )  # fmt: skip


OPTIMIZERS_OF_PARTS = ("adamw", "sgd", "lars")  # exact on the rows of a rank: elementwise, or told how to add up norms


def sharded(model, recipe: Recipe, world: World, precision: str):
    """The method's Shards where speed.shard asks for them and there are several ranks; None, and the method moved to its device, elsewhere."""
    kind = recipe.speed.shard
    if kind == "none" or world.size == 1:
        model.to(world.device)
        return None
    if recipe.learns_labels:
        raise UserError(f"speed.shard={kind} is for methods with a student and a teacher, not for {recipe.method.name}: leave it out")
    if recipe.speed.compile:
        raise UserError(f"speed.compile=true and speed.shard={kind} do not go together: leave one of them out")
    if recipe.optimizer.name not in OPTIMIZERS_OF_PARTS:
        raise UserError(f"optimizer {recipe.optimizer.name} does not know tensors in parts: choose {', '.join(OPTIMIZERS_OF_PARTS)}, or speed.shard=none")
    from maskwise.distributed.shard import Shards

    return Shards(model, world, kind, precision=precision)


def resolved_precision(recipe: Recipe, device: torch.device) -> str:
    """bf16 where the device computes in it, when the recipe leaves the choice open."""
    if recipe.train.precision != "auto":
        return recipe.train.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capable = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)() and "avx512" in torch.backends.cpu.get_cpu_capability().lower()
    return "bf16" if capable else "fp32"


def workers(recipe: Recipe, world: World) -> int:
    """Data processes of one rank: the machine's cores shared out on a GPU; none beside a CPU that is busy training."""
    if recipe.speed.workers != "auto":
        return recipe.speed.workers
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return min(10, max(1, (os.cpu_count() or 1) // local - 1)) if world.device.type == "cuda" else 0


def train(recipe: Recipe, out, *, quiet: bool = False) -> dict:
    """Run a recipe in the folder `out`, or continue the run that is there.

    Returns {"status": "complete"|"preempted", "step", "skipped", "folder"}. Raises UserError before anything is written
    when the folder, the images or the recipe cannot be used, or when the folder holds a run of another recipe.
    """
    folder = Path(out)
    begun = known_run(folder, recipe)
    data = dataset(recipe)
    check_run(recipe, len(data), int(os.environ.get("WORLD_SIZE", "1")))
    classes = labelled.classes_of(recipe, data) if recipe.learns_labels else None
    test = labelled_test(recipe, data)
    if recipe.speed.threads:
        torch.set_num_threads(recipe.speed.threads)
    if recipe.speed.deterministic:
        be_deterministic()
    world = World.start()
    if recipe.speed.keep_memory and world.device.type == "cpu":
        keep_freed_memory()
    with world.together():
        precision = begun.get("precision") or resolved_precision(recipe, world.device)
        start = start_of(recipe, folder, begun)
        running = trainer(recipe, world, images=len(data), classes=classes, precision=precision, start=start)
        prepare_folder(folder)
        if world.is_main and not begun:
            write_run(folder, recipe, world, precision, len(data), start)
        world.barrier()
        journal = Journal(folder, running.total_steps, quiet, main=world.is_main, about=this_start(world) if world.is_main else None)
        teacher = running.method.teacher.encoder
        checkpoints = Checkpoints(
            folder, recipe.train.keep, encoder_spec=teacher.spec(), world=world, say=journal.say, shards=running.shards,
            meta={"recipe": recipe.resolved_yaml(), "recipe_hash": recipe.hash(), "commit": commit(), **labelled.about(classes, data)},
        )  # fmt: skip
        per_epoch = running.steps_per_epoch
        if world.is_main and not (folder / "checkpoints" / f"step_{running.total_steps:08d}").is_dir():
            journal.say(opening(recipe, running, data, begun, folder))
            if (missing := bands.left_out(len(teacher.mean))) and not begun:
                journal.say(missing)
            for text in begun_from(start, running):
                journal.say(text)
        result = fit(
            running,
            partial(stream, recipe, world, data, running.total_steps),
            inputs(recipe, running),
            journal,
            checkpoints,
            evaluations(recipe, data, test, world),
            log_every=recipe.train.log_every,
            save_every=recipe.train.save_every or per_epoch,
            evaluate_every={"knn": recipe.evaluate.knn_every * per_epoch, "top1": recipe.evaluate.top1_every * per_epoch, **{one.name: one.every * per_epoch for one in scheduled(recipe.evaluate.also)}},
            pictures=partial(masks_picture, teacher) if recipe.evaluate.pictures_every and not recipe.learns_labels else None,
            pictures_every=recipe.evaluate.pictures_every * per_epoch,
            evaluate_first=("knn",) if start or recipe.evaluate.knn_first else (),
            max_bad_steps=recipe.train.max_bad_steps,
            rows=2 * recipe.train.batch_size // world.size // recipe.train.accumulate,
        )  # fmt: skip
        return {**result, "folder": str(folder)}


def views(recipe: Recipe):
    """What the loader makes of an image."""
    return labelled.views(recipe) if recipe.learns_labels else MultiCrop(**recipe.crops.keywords(), seed=recipe.seed)


def inputs(recipe: Recipe, running: Trainer):
    """The callable that makes of a batch what a step takes: floats, on the batch's device."""
    return labelled.inputs(recipe, running) if recipe.learns_labels else partial(float_crops, running.method.teacher.encoder)


def stream(recipe: Recipe, world: World, data, total_steps: int, start: int):
    """This rank's batches of a run from step `start` on."""
    return loader.batches(
        data, views(recipe), repeats=recipe.augment.repeats, batch_size=recipe.train.batch_size, rank=world.rank, world_size=world.size,
        seed=recipe.seed, start_step=start, total_steps=total_steps, workers=workers(recipe, world), pin_memory=world.device.type == "cuda",
        cache=recipe.speed.cache, corrupt_share=recipe.data.corrupt_ceiling, decoder=recipe.data.decoder, jpeg_scaling=recipe.data.jpeg_scaling,
    )  # fmt: skip


def opening(recipe: Recipe, running: Trainer, data, begun: dict, folder: Path) -> str:
    """The line a run begins with."""
    verb = "continuing" if begun else "starting"
    what = f"{running.method.student.head.classes} classes" if recipe.learns_labels else f"masking {recipe.masking.name}"
    return (
        f"{verb} {folder}: {recipe.method.name}, {what}, {recipe.backbone.name}, {len(data)} images, "
        f"{running.total_steps} steps of {recipe.train.batch_size}, {running.precision} on {running.world.size} x {running.world.device.type}"
    )


def begun_from(start: Start | None, running: Trainer) -> list[str]:
    """What a run that continues from a model says before its first step."""
    if start is None or start.source is None:
        return []
    warmup = [f"head warm-up: the encoder stands still for {running.still_steps} of {running.total_steps} steps"] if running.still_steps else []
    return [*start.told(), *warmup]


def float_crops(teacher: Encoder, batch):
    """Colour and normalise a batch's crops on their device."""
    parts = ((batch.global_crops, batch.params.global_), (batch.local_crops, batch.params.local_))
    return tuple(colour.augment(crops, params, teacher.mean, teacher.std) if len(crops) else None for crops, params in parts)


def masks_picture(teacher: Encoder, model, batch) -> dict:
    """What the teacher looks at in the first images of a batch, and what this method's masking would hide there."""
    from maskwise.evaluation.pictures import training_sheet

    images = batch.global_crops[: min(8, len(batch.index))]
    return {"attention_and_masks": training_sheet(model.teacher.encoder, images, model.masking, batch.index[: len(images)])}


def labelled_test(recipe: Recipe, bank):
    """The test images of the evaluations on the way, None where the recipe wants none; raises UserError where labels are missing."""
    scored = recipe.learns_labels and recipe.evaluate.top1_every
    key = "knn_every" if recipe.evaluate.knn_every else "also"
    test = dataset(recipe, "test") if recipe.evaluate.knn_every or recipe.evaluate.also or scored else None
    if test is not None and scored:
        labelled.check_test(bank, test)
    elif test is not None:
        for role, found in (("training", bank), ("test", test)):
            if found.labels is None:
                off = "=0" if key == "knn_every" else "=null"
                raise UserError(f"evaluate.{key}: the {role} images have no labels; give one subfolder per class, or evaluate.{key}{off}")
    return test


def evaluations(recipe: Recipe, bank, test, world: World) -> dict:
    """What is measured on the way, by the name of its report: callable(method) -> Report on the teacher's encoder."""
    chosen = {}
    if test is not None and recipe.learns_labels and recipe.evaluate.top1_every:
        chosen["top1"] = partial(labelled.accuracy, test, world)
    if test is not None and recipe.evaluate.knn_every:
        chosen["knn"] = partial(of_teacher, "knn", bank, recipe.evaluate.limit_bank, test, None, world, {"k": recipe.evaluate.k})
    for one in scheduled(recipe.evaluate.also):
        chosen[one.name] = partial(of_teacher, one.evaluation, bank, one.limit_train, test, one.limit_test, world, one.options)
    return chosen


def of_teacher(name: str, bank, limit_train, test, limit_test, world: World, options, model) -> Report:
    """An evaluation of the teacher's encoder on evenly spread parts of the training (without augmentation) and the test images."""
    data = {"train": evenly(bank, limit_train) if limit_train else bank, "test": evenly(test, limit_test) if limit_test else test}
    return EVALUATIONS[name](model.teacher.encoder, data, world, **options)
