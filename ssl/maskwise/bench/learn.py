"""`maskwise bench learn`: k-NN accuracy against computation while training, beside lightly's DINO on the same network.

Both sides train in turns, in one process, with the same images, initial weights, threads and precision, and are
evaluated by the same k-NN. CPU time is that of the process while a side trains, loading included and evaluations
excluded; operations are those of the whole step (forward, backward, teacher), counted once for each shape of its input.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import re
import time
from pathlib import Path

from maskwise.bench.learning_curves import OURS, THEIRS, chart, point_in_words, text
from maskwise.errors import UserError
from maskwise.process.streams import print_notice

UNITS = {"s": "cpu_seconds", "pflop": "pflop"}
STATE, RESULT, CHART = "state.pt", "learn.json", "learn.png"
K = 20

__all__ = ["parser", "run", "text"]


def parser(make=argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of the benchmark."""
    options = make(
        "maskwise bench learn",
        description="Train a recipe and lightly's DINO on the same network in turns, with k-NN on the way. The same "
        "command continues what it finds in --out.",
    )
    add = options.add_argument
    add("recipe", metavar="RECIPE", help="a recipe without labels, with labeled test images")
    add("overrides", metavar="section.key=value", nargs="*", help="changes to the recipe")
    add(
        "--out", metavar="DIR", type=os.path.expanduser, required=True, help="folder of state, learn.json and learn.png"
    )
    add("--budget", default="600s", help="of each side: CPU seconds or PFLOP, such as 3600s or 0.5pflop (default 600s)")
    add("--every", default=None, help="between two evaluations, in the unit of --budget (default: a tenth of it)")
    add("--slice", type=float, default=30.0, metavar="S", help="CPU seconds of a turn (default: %(default)s)")
    add("--seed", type=int, default=None, help="of both sides (default: the recipe's)")
    add(
        "--their-epochs", type=int, default=None, metavar="N", help="length of lightly's cosine (default: the recipe's)"
    )
    add("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    return options


def run(options) -> dict:
    """Train both sides up to the budget -> JSON-able measurements."""
    if importlib.util.find_spec("lightly") is None:
        raise UserError('bench learn trains lightly beside the recipe: pip install "maskwise[bench]"')
    import torch

    from maskwise import build
    from maskwise.distributed.environment import world_size
    from maskwise.distributed.world import World
    from maskwise.process.malloc import keep_freed_memory
    from maskwise.recipe.consistency import fitted
    from maskwise.recipe.reading import read_recipe

    budget, unit = quantity("--budget", options.budget)
    every, unit_of_every = (budget / 10, unit) if options.every is None else quantity("--every", options.every)
    if unit_of_every != unit:
        raise UserError(f"--every {options.every} has another unit than --budget {options.budget}; give the same")
    if world_size() > 1:
        raise UserError("bench learn trains in one process; start it without torchrun")
    seed = () if options.seed is None else (f"seed={options.seed}",)
    recipe = read_recipe(options.recipe, *options.overrides, *seed)
    if recipe.learns_labels:
        raise UserError(f"bench learn compares training without labels; {recipe.source} is supervised")
    data, test = build.dataset(recipe), build.dataset(recipe, "test")
    if test is None:
        raise UserError("bench learn needs labeled test images; give data.test_path, data.test_split or data.holdout")
    if options.threads:
        torch.set_num_threads(options.threads)
    world = World.start()
    if world.device.type == "cpu" and recipe.speed.keep_memory:
        keep_freed_memory()
    recipe = fitted(recipe, len(data), 1)
    sides = both_sides(recipe, data, world, options.their_epochs or length_in_epochs(recipe, len(data)))
    race = Race(sides, budget, every, unit, options.slice, evaluation(recipe, data, test, world))
    settings = {
        "recipe": recipe.hash(),
        "unit": unit,
        "every": every,
        "their_epochs": sides[THEIRS].epochs,
        "precision": sides[OURS].precision,
    }
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    continue_from(race, out / STATE, settings)

    written = 0

    def save() -> None:
        nonlocal written
        write_state(race, out / STATE, settings)
        if len(race.points) > written:
            written = len(race.points)
            write_result(race, out, options, recipe, world, settings)
            print_notice(point_in_words(race.points[-1]))

    race.run(save)
    return write_result(race, out, options, recipe, world, settings)


def quantity(option: str, text: str) -> tuple[float, str]:
    """Parse `3600s` or `.5pflop` -> (number, name of the unit in results)."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)(s|pflop)", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise UserError(f"{option} {text}: give CPU seconds or PFLOP, such as 3600s or 0.5pflop")
    return float(match[1]), UNITS[match[2]]


def length_in_epochs(recipe, images: int) -> int:
    """Return the length of a recipe in epochs, rounded up."""
    if recipe.train.steps is None:
        return recipe.train.epochs
    return -(-recipe.train.steps // (images // recipe.train.batch_size))


class Ours:
    """The trainer of a recipe, with its own loader."""

    def __init__(self, recipe, data, world):
        from maskwise import build

        self.recipe, self.data, self.world = recipe, data, world
        self.trainer = build.trainer(recipe, world, images=len(data))
        self.inputs = build.inputs(recipe, self.trainer)
        self.batch_size, self.total_steps = recipe.train.batch_size, self.trainer.total_steps
        self.precision = self.trainer.precision
        self.batches = None

    @property
    def student(self):
        """Encoder of the student."""
        return self.trainer.method.student.encoder

    @property
    def teacher(self):
        """Encoder of the teacher."""
        return self.trainer.method.teacher.encoder

    @property
    def step_index(self) -> int:
        """Number of steps done."""
        return self.trainer.step_index

    def load(self) -> list:
        """Return global crops, local crops and sample ids of the next step."""
        from maskwise import build
        from maskwise.engine.loop import prefetch

        if self.batches is None:
            stream = build.stream(self.recipe, self.world, self.data, self.total_steps, self.step_index)
            self.batches = prefetch(stream, self.world.device)
        batch, ids = next(self.batches)
        return [*self.inputs(batch), ids]

    def compute(self, crops: list):
        """Do one step; returns the loss."""
        *crops, ids = crops
        return self.trainer.step(*crops, sample_ids=ids)["loss"]

    def state(self) -> dict:
        """Return what a continued run needs."""
        tensors, optimizer = self.trainer.tensors()
        return {"tensors": tensors, "optimizer": optimizer, "step": self.step_index}

    def load_state(self, state: dict) -> None:
        """Continue from a state."""
        self.trainer.load_tensors(state["tensors"], state["optimizer"], step=state["step"], skipped=0)
        self.batches = None


def both_sides(recipe, data, world, their_epochs: int) -> dict:
    """Return the trainer of a recipe, and lightly's DINO on an encoder with the same initial weights."""
    from maskwise.bench.baselines.lightly_dino import LightlyDINO

    ours = Ours(recipe, data, world)
    theirs = LightlyDINO(
        copy.deepcopy(ours.student).requires_grad_(True),
        copy.deepcopy(ours.student),
        data,
        size=ours.student.image_size[0],
        epochs=their_epochs,
        seed=recipe.seed,
        device=world.device,
        precision=ours.precision,
    )
    return {OURS: ours, THEIRS: theirs}


def evaluation(recipe, data, test, world):
    """Return the callable encoder -> k-NN accuracy in per cent, the same for both sides."""
    from maskwise.data.datasets.subset import subsample_evenly
    from maskwise.evaluation import EVALUATIONS

    limit = recipe.evaluate.limit_bank
    images = {"train": subsample_evenly(data, limit) if limit else data, "test": test}

    def accuracy(encoder) -> float:
        report = EVALUATIONS["knn"](encoder, images, world, k=min(K, len(images["train"])), feature="pooled")
        return report.numbers["top1"]

    return accuracy


class Race:
    """Two sides that train in turns, up to a budget each, with evaluations on the way.

    turn: CPU seconds of a turn; every: what a side spends between two evaluations; sides: name -> an object with load,
    compute, step_index, total_steps, batch_size, student and teacher; unit: cpu_seconds or pflop, of budget and every;
    accuracy: encoder -> per cent; clock: seconds of CPU time. `.points` lists the evaluations, `.turns` the sides in
    the order of their turns.
    """

    def __init__(
        self, sides: dict, budget: float, every: float, unit: str, turn: float, accuracy, clock=time.process_time
    ):
        self.sides, self.budget, self.every, self.unit, self.turn = sides, budget, every, unit, turn
        self.accuracy, self.clock = accuracy, clock
        self.spent = {name: {"cpu_seconds": 0.0, "pflop": 0.0} for name in sides}
        self.flops: dict[str, dict[str, int]] = {name: {} for name in sides}  # of a step, by shape
        self.points: list[dict] = []
        self.turns: list[str] = []

    def run(self, save) -> None:
        """Train until all sides have finished; `save` is called after each turn."""
        if not self.points:
            for name in self.sides:
                self.evaluate(name)
        while not all(map(self.finished, self.sides)):
            for name in self.sides:
                if not self.finished(name):
                    self.take_turn(name)
                    save()

    def finished(self, name: str) -> bool:
        """Whether a side has used its budget, or reached the end of its schedule."""
        side = self.sides[name]
        return self.spent[name][self.unit] >= self.budget or side.step_index >= side.total_steps

    def take_turn(self, name: str) -> None:
        """Train one side for a turn, or up to its end."""
        self.turns.append(name)
        spent = self.spent[name]
        end = spent["cpu_seconds"] + self.turn
        while spent["cpu_seconds"] < end and not self.finished(name):
            begin = self.clock()
            self.step(name)
            spent["cpu_seconds"] += self.clock() - begin
            if self.finished(name) or spent[self.unit] >= self.every * self.evaluations(name):
                self.evaluate(name)

    def evaluations(self, name: str) -> int:
        """Return how many evaluations a side has had."""
        return sum(point["side"] == name for point in self.points)

    def step(self, name: str) -> None:
        """Do one step of a side, and add its operations."""
        side, flops = self.sides[name], self.flops[name]
        inputs = side.load()
        shape = " ".join("x".join(map(str, part.shape)) for part in inputs if part is not None)
        if shape in flops:
            side.compute(inputs)
        else:
            flops[shape] = counted(lambda: side.compute(inputs))
        self.spent[name]["pflop"] += flops[shape] / 1e15

    def evaluate(self, name: str) -> None:
        """Add a point with the accuracies of a side's teacher and student."""
        side = self.sides[name]
        accuracies = {"teacher": self.accuracy(side.teacher), "student": self.accuracy(side.student)}
        steps = {"step": side.step_index, "images": side.step_index * side.batch_size}
        self.points.append({"side": name, **steps, **self.spent[name], **accuracies})

    def state(self) -> dict:
        """Return what a continued run needs, beside the states of the sides."""
        return {"spent": self.spent, "flops": self.flops, "points": self.points, "turns": self.turns}

    def load_state(self, state: dict) -> None:
        """Continue from a state."""
        self.spent, self.flops, self.points, self.turns = (state[key] for key in ("spent", "flops", "points", "turns"))


def counted(call) -> int:
    """Return the floating-point operations of a call."""
    from maskwise.bench import parts

    return parts.count(call)["flops"]


def write_state(race: Race, path: Path, settings: dict) -> None:
    """Write the state of a race and of its sides, in place of the earlier one."""
    import torch

    sides = {name: side.state() for name, side in race.sides.items()}
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save({"settings": settings, "race": race.state(), "sides": sides}, aside)
    os.replace(aside, path)


def continue_from(race: Race, path: Path, settings: dict) -> None:
    """Load the state of an earlier start, if there is one. Raises UserError where it was another benchmark."""
    import torch

    if not path.exists():
        return
    state = torch.load(path, weights_only=True)
    if different := [key for key, value in settings.items() if state["settings"].get(key) != value]:
        raise UserError(f"{path.parent} holds a benchmark of another {different[0]}; give another --out")
    race.load_state(state["race"])
    for name, side in race.sides.items():
        side.load_state(state["sides"][name])


def write_result(race: Race, out: Path, options, recipe, world, settings: dict) -> dict:
    """Write learn.json and learn.png; returns the content of the first."""
    from importlib.metadata import version

    from maskwise.bench import record
    from maskwise.imaging.drawing import write_png

    result = {
        "record": record.describe(world.device, seed=recipe.seed),
        "bench": "learn",
        "recipe": recipe.source,
        "overrides": [record.without_folders(word) for word in options.overrides],
        "settings": settings,
        "budget": race.budget,
        "turn_seconds": race.turn,
        "network": recipe.backbone.name,
        "parameters": sum(weight.numel() for weight in race.sides[OURS].student.parameters()),
        "images": len(race.sides[OURS].data),
        "lightly": version("lightly"),
        "flops_per_step": race.flops,
        "batch_size": {name: side.batch_size for name, side in race.sides.items()},
        "points": race.points,
        "turns": race.turns,
    }
    record.write(out / RESULT, result)
    write_png(out / CHART, chart(race.points))
    return result
