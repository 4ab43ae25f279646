"""One implementation in a process of its own: it answers requests, one JSON object a line, so that several can take turns.

`python -m maskwise.bench.contender KIND` with KIND ours or one of BASELINES. Requests: {"do": "start", ...}, {"do": "steps", "count": n},
{"do": "count"}, {"do": "parts", "count": n}, {"do": "matmul"}, {"do": "attmask", "repeats": n}, {"do": "end"}.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
# name: file under benchmarks/, class, what must be installed
BASELINES = {"plain": ("plain.py", "PlainStep", "torch"), "timm": ("timm_parts.py", "TimmStep", "timm"), "lightly": ("timm_parts.py", "LightlyStep", "lightly")}


def missing(kind: str) -> str | None:
    """What keeps a baseline from running here, in words; None where it can."""
    file, _, package = BASELINES[kind]
    if not (BENCHMARKS / file).is_file():
        return f"benchmarks/{file} is not here; it comes with a checkout"
    return None if importlib.util.find_spec(package) else f"{package} is not installed; pip install {package}"


class Contender:
    """The process of a contender, as its parent sees it; a context manager. Raises RuntimeError with what it wrote when it dies."""

    def __init__(self, kind: str, threads: int, **request):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "maskwise.bench.contender", kind]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.kind, self.started = kind, self.ask("start", **request)

    def ask(self, what: str, **request) -> dict:
        """Send a request and wait for its answer."""
        print(json.dumps({"do": what, **request}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the contender {self.kind} ended with status {self.process.wait()} at `{what}`")
        return json.loads(answer)

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *exception) -> None:
        self.process.stdin.close()
        self.process.wait()


class Ours:
    """The trainer of a recipe on random crops."""

    def __init__(self, recipe: str, overrides: list[str], keep_memory: bool = True):
        from maskwise import build
        from maskwise.distributed.world import World
        from maskwise.engine.memory import keep_freed_memory
        from maskwise.recipe import read_recipe

        self.recipe = read_recipe(recipe, *overrides)
        self.world = World.start()
        self.device = self.world.device
        if self.device.type == "cpu" and keep_memory:
            keep_freed_memory()
        self.batch = self.recipe.train.batch_size
        self.trainer = build.trainer(self.recipe, self.world, images=1000 * self.batch)
        self.crops = random_crops(self.recipe, self.device)
        self.step_index = 0

    def step(self) -> dict[str, float]:
        """One step on the same crops as every other contender."""
        import torch

        seen = self.trainer.step(*self.crops, sample_ids=torch.arange(self.batch))
        return {key: float(seen[key]) for key in ("loss", "cls", "patch", "mask_share")}

    def attmask(self, repeats: int) -> dict[str, float]:
        """Median seconds of the attention row and of the masks, each alone, at this batch size."""
        import torch

        from maskwise.bench.machine import wait
        from maskwise.functional.attention import cls_row

        backbone, masking = self.trainer.method.teacher.encoder.backbone, self.trainer.method.masking
        crops = self.crops[0]
        grid = backbone.grid_for(crops.shape[-2:])
        tokens = backbone.num_prefix + grid[0] * grid[1]
        heads, width = backbone.num_heads, backbone.dim // backbone.num_heads
        qkv = torch.randn(3, len(crops), heads, tokens, width, device=self.device)
        ids = torch.arange(self.batch)
        row = cls_row(qkv[0][:, :, 0], qkv[1], width**-0.5)[..., backbone.num_prefix :]
        calls = {
            "row": lambda i: cls_row(qkv[0][:, :, 0], qkv[1], width**-0.5),
            "mask": lambda i: masking.draw(row, grid, step=i, sample_ids=ids, device=self.device),
        }
        found = {}
        for name, call in calls.items():
            times = []
            for i in range(repeats):
                wait(self.device)
                begin = time.perf_counter()
                call(i)
                wait(self.device)
                times.append(time.perf_counter() - begin)
            found[name] = statistics.median(times)
        return found


class Baseline:
    """A step of benchmarks/ with the weights, crops, ratios and schedules of ours."""

    def __init__(self, kind: str, recipe: str, overrides: list[str], keep_memory: bool = False):
        ours = Ours(recipe, overrides, keep_memory)
        self.recipe, self.device, self.batch, self.crops = ours.recipe, ours.device, ours.batch, ours.crops
        method, self.trainer_ = ours.trainer.method, ours.trainer
        file, name, _ = BASELINES[kind]
        spec = importlib.util.spec_from_file_location(Path(file).stem, BENCHMARKS / file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        backbone, head = method.student.encoder.backbone, self.recipe.head
        shape = dict(
            size=backbone.image_size[0], patch=backbone.patch_size[0], dim=backbone.dim, depth=backbone.depth, heads=backbone.num_heads,
            prototypes=head.prototypes, hidden=head.hidden, bottleneck=head.bottleneck,
        )  # fmt: skip
        known = {"student_temp": method.student_temp, "center_momentum": method.center_momentum, "clip": self.recipe.optimizer.clip, "device": self.device}
        self.baseline = getattr(module, name)(shape, **known)
        self.baseline.load(method.state_dict())
        self.ratios, self.temperatures = method.masking.ratios, (method.cls_temperature, method.patch_temperature)
        self.schedules = self.trainer_.lr, self.trainer_.weight_decay, self.trainer_.momentum
        self.hold = self.trainer_.freeze_last_layer * self.trainer_.steps_per_epoch
        del self.trainer_, method, ours
        self.step_index = 0

    def step(self) -> dict[str, float]:
        """One step."""
        import torch

        from maskwise.methods.masking import Keys

        step, ids = self.step_index, torch.arange(self.batch)
        ratios = self.ratios(Keys(self.recipe.seed, step, ids.repeat(2), torch.arange(2).repeat_interleave(self.batch)))
        globals_, locals_ = (list(crops.split(self.batch)) for crops in self.crops)
        lr, decay, momentum = (each(step) for each in self.schedules)
        cls_temp, patch_temp = (each(0) for each in self.temperatures)
        seen = self.baseline.step(
            globals_, locals_, ratios, teacher_temp=cls_temp, patch_temp=patch_temp, lr=lr, weight_decay=decay, momentum=momentum, hold_last_layer=step < self.hold
        )
        self.step_index += 1
        return {key: float(value) for key, value in seen.items()}


def random_crops(recipe, device):
    """Normalised crops of a batch, random and the same in every process."""
    import torch

    generator, crops, batch = torch.Generator().manual_seed(1), recipe.crops, recipe.train.batch_size
    shapes = [(2 * batch, crops.global_size), (crops.local_number * batch, crops.local_size)]
    return [torch.randn(n, 3, side, side, generator=generator).to(device) for n, side in shapes]


def serve(kind: str) -> None:
    """Answer requests on standard input until it ends."""
    import torch

    from maskwise.bench import machine, parts
    from maskwise.bench.train import places

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    contender, answers = None, sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        what = request.pop("do")
        if what == "start":
            contender = Ours(**request) if kind == "ours" else Baseline(kind, **request)
            answer = {**machine.about(contender.device), "memory": machine.peak_memory(contender.device)}
        elif what == "steps":
            machine.wait(contender.device)
            wall, cpu = time.perf_counter(), time.process_time()
            seen = [contender.step() for _ in range(request["count"])]
            machine.wait(contender.device)
            answer = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "seen": seen, "memory": machine.peak_memory(contender.device)}
        elif what == "count":
            answer = parts.count(contender.step)
        elif what == "parts":
            clock = parts.Clock(contender.device)
            with clock.around(*places(contender.trainer)), clock.part("rest"):
                for _ in range(request["count"]):
                    contender.step()
            answer = {name: seconds / request["count"] for name, seconds in clock.seconds.items()}
        elif what == "attmask":
            answer = contender.attmask(request["repeats"])
        else:
            answer = {"flops": machine.matmul_rate(contender.device)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
