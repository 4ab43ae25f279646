"""Run one implementation of the training step in its own process, so that several can be timed in turns.

`python -m maskwise.bench.implementation KIND` with KIND maskwise or one of BASELINES reads one JSON request per line
and answers each with one line of JSON: {"do": "start", ...}, {"do": "steps", "count": n}, {"do": "count"},
{"do": "parts", "count": n}, {"do": "matmul"}, {"do": "attmask", "repeats": n}. It ends with its standard input.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time

# name: module of bench/baselines, class, package that must be installed
BASELINES = {
    "reference": ("reference_step", "ReferenceStep", "torch"),
    "timm": ("timm_step", "TimmStep", "timm"),
    "lightly": ("timm_step", "LightlyStep", "lightly"),
}


def unavailable_reason(kind: str) -> str | None:
    """Why a baseline cannot run here; None if it can."""
    _, _, package = BASELINES[kind]
    return None if importlib.util.find_spec(package) else f"{package} is not installed; pip install {package}"


class BenchProcess:
    """A process that runs one implementation; a context manager. Raises RuntimeError if it ends early."""

    def __init__(self, kind: str, threads: int, **arguments):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        command = [sys.executable, "-m", "maskwise.bench.implementation", kind]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in the terminal is for the benchmark, which then ends this process
        )
        self.kind = kind
        try:
            self.started = self.request("start", **arguments)
        except BaseException:
            self.process.terminate()
            raise

    def request(self, action: str, **arguments) -> dict:
        """Send a request and wait for the answer."""
        print(json.dumps({"do": action, **arguments}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.kind} ended with status {self.process.wait()} during `{action}`")
        return json.loads(answer)

    def __enter__(self) -> BenchProcess:
        return self

    def __exit__(self, kind, *exception) -> None:
        if kind is not None:
            self.process.terminate()
        with contextlib.suppress(OSError):  # it has ended before
            self.process.stdin.close()
        self.process.wait()


class MaskwiseStep:
    """The trainer of a recipe on random crops."""

    def __init__(self, recipe: str, overrides: list[str], keep_memory: bool = True):
        from maskwise import build
        from maskwise.distributed.world import World
        from maskwise.process.malloc import keep_freed_memory
        from maskwise.recipe.reading import read_recipe

        self.recipe = read_recipe(recipe, *overrides)
        self.world = World.start()
        self.device = self.world.device
        if self.device.type == "cpu" and keep_memory:
            keep_freed_memory()
        self.batch = self.recipe.train.batch_size
        self.trainer = build.trainer(self.recipe, self.world, images=1000 * self.batch)
        self.crops = random_crops(self.recipe, self.device)

    def step(self) -> dict[str, float]:
        """Do one step on the crops that all implementations use."""
        import torch

        losses = self.trainer.step(*self.crops, sample_ids=torch.arange(self.batch))
        return {key: float(losses[key]) for key in ("loss", "cls", "patch", "mask_share")}

    def attmask(self, repeats: int) -> dict[str, float]:
        """Median seconds of the attention row and of the masks, each alone, at this batch size."""
        import torch

        from maskwise.functional.attention import cls_attention

        backbone, masking = self.trainer.method.teacher.encoder.backbone, self.trainer.method.masking
        crops = self.crops[0]
        grid = backbone.grid_for(crops.shape[-2:])
        tokens = backbone.num_prefix + grid[0] * grid[1]
        heads, width = backbone.num_heads, backbone.dim // backbone.num_heads
        qkv = torch.randn(3, len(crops), heads, tokens, width, device=self.device)
        ids = torch.arange(self.batch)
        row = cls_attention(qkv[0][:, :, 0], qkv[1], width**-0.5)[..., backbone.num_prefix :]
        return {
            "row": self.median_seconds(lambda i: cls_attention(qkv[0][:, :, 0], qkv[1], width**-0.5), repeats),
            "mask": self.median_seconds(
                lambda i: masking.sample(row, grid, step=i, sample_ids=ids, device=self.device), repeats
            ),
        }

    def median_seconds(self, call, repeats: int) -> float:
        """Median wall time of `call(i)` for i in 0 ... repeats - 1."""
        from maskwise.bench.machine import wait

        times = []
        for i in range(repeats):
            wait(self.device)
            begin = time.perf_counter()
            call(i)
            wait(self.device)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)


class BaselineStep:
    """A step of bench/baselines with the weights, crops, mask ratios and schedules of the recipe's trainer."""

    def __init__(self, kind: str, recipe: str, overrides: list[str]):
        ours = MaskwiseStep(recipe, overrides, keep_memory=False)
        self.recipe, self.device, self.batch, self.crops = ours.recipe, ours.device, ours.batch, ours.crops
        trainer, method = ours.trainer, ours.trainer.method
        module, name, _ = BASELINES[kind]
        baseline = getattr(importlib.import_module(f"maskwise.bench.baselines.{module}"), name)
        self.baseline = baseline(
            network_shape(method.student.encoder.backbone, self.recipe.head),
            student_temp=method.student_temp,
            center_momentum=method.centers.momentum,
            clip=self.recipe.optimizer.clip,
            device=self.device,
        )
        self.baseline.load(method.state_dict())
        self.ratios, self.temperatures = method.masking.ratios, (method.cls_temperature, method.patch_temperature)
        self.schedules = trainer.schedules
        self.frozen_last_layer_steps = trainer.freeze_last_layer * trainer.steps_per_epoch
        self.step_index = 0

    def step(self) -> dict[str, float]:
        """Do one step."""
        import torch

        from maskwise.methods.masking import ViewKeys

        step, ids = self.step_index, torch.arange(self.batch)
        ratios = self.ratios(
            ViewKeys(self.recipe.seed, step, ids.repeat(2), torch.arange(2).repeat_interleave(self.batch))
        )
        global_crops, local_crops = (list(crops.split(self.batch)) for crops in self.crops)
        teacher_temp, patch_temp = (temperature(0) for temperature in self.temperatures)
        losses = self.baseline.step(
            global_crops,
            local_crops,
            ratios,
            teacher_temp=teacher_temp,
            patch_temp=patch_temp,
            lr=self.schedules.lr(step),
            weight_decay=self.schedules.weight_decay(step),
            momentum=self.schedules.momentum(step),
            hold_last_layer=step < self.frozen_last_layer_steps,
        )
        self.step_index += 1
        return {key: float(value) for key, value in losses.items()}


def network_shape(backbone, head) -> dict[str, int]:
    """Sizes of backbone and head as the baselines take them."""
    return {
        "size": backbone.image_size,
        "patch": backbone.patch_size[0],
        "dim": backbone.dim,
        "depth": backbone.depth,
        "heads": backbone.num_heads,
        "prototypes": head.prototypes,
        "hidden": head.hidden,
        "bottleneck": head.bottleneck,
    }


def random_crops(recipe, device):
    """Normalized random crops of one batch, equal in every process: [2B, 3, H, W], [LB, 3, h, w]."""
    import torch

    from maskwise.imaging.resize import pair

    generator, crops, batch = torch.Generator().manual_seed(1), recipe.crops, recipe.train.batch_size
    shapes = [(2 * batch, pair(crops.global_size)), (crops.local_number * batch, pair(crops.local_size))]
    return [torch.randn(n, 3, *size, generator=generator).to(device) for n, size in shapes]


def serve(kind: str) -> None:
    """Answer requests on standard input until it ends."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print must not mix with the answers
    implementation = None
    for line in sys.stdin:
        arguments = json.loads(line)
        action = arguments.pop("do")
        if action == "start":
            implementation = MaskwiseStep(**arguments) if kind == "maskwise" else BaselineStep(kind, **arguments)
        answer = ACTIONS[action](implementation, **({} if action == "start" else arguments))
        print(json.dumps(answer), file=answers, flush=True)


def started(implementation) -> dict:
    """The record of this process, and the memory in use before the first step."""
    from maskwise.bench import machine, record

    return {"record": record.describe(implementation.device), "memory": machine.peak_memory(implementation.device)}


def steps(implementation, count: int) -> dict:
    """Do `count` steps -> wall and CPU seconds, losses of each, peak memory in bytes."""
    from maskwise.bench import machine

    machine.wait(implementation.device)
    wall, cpu = time.perf_counter(), time.process_time()
    losses = [implementation.step() for _ in range(count)]
    machine.wait(implementation.device)
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "losses": losses,
        "memory": machine.peak_memory(implementation.device),
    }


def operations(implementation) -> dict:
    """Floating-point operations and host reads of one step."""
    from maskwise.bench import parts

    return parts.count(implementation.step)


def part_seconds(implementation, count: int) -> dict[str, float]:
    """Seconds per step of each part, over `count` steps."""
    from maskwise.bench import parts
    from maskwise.bench.train import timed_calls

    clock = parts.Clock(implementation.device)
    with clock.around(*timed_calls(implementation.trainer)), clock.part("rest"):
        for _ in range(count):
            implementation.step()
    return {name: seconds / count for name, seconds in clock.seconds.items()}


def matmul(implementation) -> dict:
    """FLOP/s of matrix products."""
    from maskwise.bench import machine

    return {"flops": machine.matmul_rate(implementation.device)}


def attmask(implementation, repeats: int) -> dict[str, float]:
    """Seconds of AttMask's own parts."""
    return implementation.attmask(repeats)


ACTIONS = {
    "start": started,
    "steps": steps,
    "count": operations,
    "parts": part_seconds,
    "matmul": matmul,
    "attmask": attmask,
}


if __name__ == "__main__":
    serve(sys.argv[1])
