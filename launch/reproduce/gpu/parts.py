"""The parts of a GPU session; `python -m launch.reproduce.gpu.parts NAME --out FILE` runs one of them."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from launch.reproduce.gpu import groups, steps

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("torch", "torchvision", "timm", "numpy", "Pillow", "matplotlib", "tensorboard", "pyyaml", "safetensors")
OPTIONAL = ("pytest", "triton", "scipy", "scikit-learn", "torchcodec")


@dataclass(frozen=True)
class Settings:
    """What a session is asked for: the device, tiny sizes or not, a folder of images, seconds of training."""

    device: str = "cuda"
    miniature: bool = False
    images: str | None = None
    seconds: float = 180.0

    def torch_device(self):
        """Return the torch.device."""
        import torch

        return torch.device(self.device)


class Part(NamedTuple):
    """A measurement: its function, its time limit and what it usually takes, in seconds."""

    run: Callable[[Settings], dict]
    limit: float
    usual: float


def machine(settings: Settings) -> dict:
    """Record versions, the device, and its rate of matrix products."""
    import torch

    from maskwise.bench.machine import matmul_rate

    device, versions = settings.torch_device(), {}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    types = {"fp32": torch.float32, "bf16": torch.bfloat16} if device.type == "cuda" else {"fp32": torch.float32}
    seconds = 0.1 if settings.miniature else 1.0
    about = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "versions": versions,
        "missing": [name for name, version in versions.items() if version is None],
        "device_memory": None if about is None else about.total_memory,
        "matmul_rate": {name: matmul_rate(device, dtype, seconds) for name, dtype in types.items()},
    }


def tests(settings: Settings) -> dict:
    """Run `pytest -m gpu` on the files that have such tests; without a GPU only collect them."""
    if util.find_spec("pytest") is None:
        raise Unavailable("pytest is not installed")
    marked = [file for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short", "-rfEs"]
    command += ["--collect-only"] if settings.miniature else []
    done = subprocess.run(
        [*command, *map(str, sorted(marked))], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?|tests collected)", done.stdout)
    }
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    failures = re.findall(r"^(?:FAILED|ERROR) .*$", done.stdout, re.M)
    return {"files": len(marked), "counts": counts, "failures": failures, "output": done.stdout[-6000:]}


def packed(settings: Settings) -> dict:
    """Compare packed crops of two sizes with separate ones: outputs, gradients, and seconds of both passes."""
    import torch

    from maskwise.bench import machine as clock

    device = settings.torch_device()
    recipe = steps.recipe_of("vits16", settings.miniature)
    trainer, (global_crops, local_crops, _) = steps.trainer_of(recipe, device)
    encoder = trainer.method.student.encoder
    keys = [torch.arange(len(crops), device=device) for crops in (global_crops, local_crops)]
    batches = [(global_crops, None, keys[0]), (local_crops, None, keys[1])]

    def separate():
        return [encoder(x, attention=False, drop_key=key, patches=i == 0) for i, (x, _, key) in enumerate(batches)]

    def together():
        return encoder.forward_packed(batches, (True, False))

    outcomes, seconds = {}, {}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        supported = encoder.supports_packing(global_crops)
    for name, forward in (("separate", separate), ("packed", together)):
        for _ in range(1 if settings.miniature else 4):  # the last one counts
            clock.wait(device)
            begin = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                features = forward()
                values = [features[0].pooled, features[0].patches, features[1].pooled]
                loss = sum(value.float().sin().mean() for value in values)  # squares after a norm are constant
            weights = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            clock.wait(device)
            seconds[name] = time.perf_counter() - begin
        outcomes[name] = ([v.detach().float() for v in values], [g.float() for g in gradients if g is not None])
    outputs, gradients = (
        max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(*pair))
        for pair in zip(*outcomes.values())
    )
    if not outputs < 0.05:  # bf16 keeps eight bits
        raise AssertionError(f"packed crops differ from separate ones by {outputs:.2g} of their norm")
    return {"kernel": supported, "seconds": seconds, "outputs_differ": outputs, "gradients_differ": gradients}


def loading(settings: Settings) -> dict:
    """Time the loader alone, and training end to end, from JPEGs: a given folder, or natural-looking ones made here."""
    import torch

    from maskwise import build
    from maskwise.bench import train
    from maskwise.bench.baselines import natural_jpegs
    from maskwise.distributed.world import World
    from maskwise.engine.loop import prefetch

    folder = settings.images
    if folder is None:
        folder = str(Path(tempfile.gettempdir()) / "maskwise_natural_jpegs")
        natural_jpegs.write(Path(folder), 8 if settings.miniature else 256)
    changes = ["speed.workers=0"] if settings.miniature else []
    data = (f"data.path={folder}", "data.split=null", "data.test_split=null")
    recipe = steps.recipe_of("vits16", settings.miniature, *changes, data=data)
    world = World(device=settings.torch_device())
    count = 2 if settings.miniature else 12
    batches = prefetch(build.stream(recipe, world, build.dataset(recipe), count + 2, 0), world.device)
    next(batches)
    begin = time.perf_counter()
    for _ in range(count):
        next(batches)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    speed = count * recipe.train.batch_size / (time.perf_counter() - begin)
    del batches
    asked = {key: recipe.values[key] for key in recipe.origins if recipe.origins[key] == "command line"}
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in asked.items()]
    options = [steps.BACKBONES["vits16"][0], *words, "--steps", str(count), "--images", "2"]
    result = train.run(train.parser().parse_args(options))
    result.pop("record")
    return {"loader_images_per_second": speed, "workers": build.workers(recipe, world), "end_to_end": result}


def knn(settings: Settings) -> dict:
    """Classify 50,000 queries among 1,281,167 features."""
    from maskwise.bench import knn as bench

    sizes = ["--bank", "2000", "--queries", "100", "--width", "16", "--k", "10"] if settings.miniature else []
    result = bench.run(bench.parser().parse_args([*sizes, "--device", settings.device]))
    result.pop("record")
    return result


def training(settings: Settings) -> dict:
    """Train the quickstart's AttMask recipe for some minutes with k-NN, stop it by SIGTERM and read its run log."""
    changes = ["evaluate.knn_every=8", "evaluate.pictures_every=0", "train.epochs=4000", "optimizer.warmup_epochs=2"]
    if settings.miniature:
        changes += ["data.count=64", "train.batch_size=16", "train.epochs=2", "evaluate.knn_every=1", "speed.workers=0"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "maskwise", "train", "pretrain/quickstart_shapes", "--out", str(run), *changes]
        hidden = {} if settings.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        child = subprocess.Popen(
            command,
            env={**os.environ, **hidden},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        try:
            output, _ = child.communicate(timeout=settings.seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGTERM)
            output, _ = child.communicate(timeout=60)
        if child.returncode:
            raise RuntimeError(f"training ended with {child.returncode}: {output[-2000:]}")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return summary(lines)


def summary(lines: list[dict]) -> dict:
    """Return the steps, the losses and the k-NN results of a run log."""
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluations = [(line["step"], line["numbers"]["top1"]) for line in lines if line.get("report") == "knn"]
    speeds = [line["img_s"] for line in lines if "img_s" in line]
    return {"steps": losses[-1][0], "losses": losses, "knn": evaluations, "images_per_second": speeds}


class Unavailable(Exception):
    """A part cannot run here, for the reason given."""


PARTS: dict[str, Part] = {
    "machine": Part(machine, 40, 15),
    "step vits16": Part(partial(steps.measure, "vits16", False), 60, 20),
    "tests": Part(tests, 150, 80),
    "packed": Part(packed, 60, 20),
    "ddp": Part(partial(groups.compare, "ddp"), 60, 25),
    "fsdp": Part(partial(groups.compare, "fsdp"), 60, 25),
    "deterministic": Part(groups.deterministic, 60, 25),
    "knn": Part(knn, 90, 30),
    "step vits16 compiled": Part(partial(steps.measure, "vits16", True), 120, 60),
    "loading": Part(loading, 90, 45),
    "step vitb16": Part(partial(steps.measure, "vitb16", False), 60, 20),
    "step vitl16": Part(partial(steps.measure, "vitl16", False), 60, 25),
    "step resnet50": Part(partial(steps.measure, "resnet50", False), 60, 20),
    "training": Part(training, 260, 210),
    "step vitb16 compiled": Part(partial(steps.measure, "vitb16", True), 120, 60),
    "step vitl16 compiled": Part(partial(steps.measure, "vitl16", True), 150, 90),
}


def main(words: list[str] | None = None) -> int:
    """Run a part and write {"record", "status", "result" or "error"}."""
    from maskwise.bench import record
    from maskwise.engine.atomic_file import write_atomic

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--miniature", action="store_true")
    parser.add_argument("--images")
    parser.add_argument("--seconds", type=float, default=180.0)
    options = parser.parse_args(words)
    settings = Settings(options.device, options.miniature, options.images, options.seconds)
    outcome: dict
    try:
        outcome = {"status": "done", "result": PARTS[options.name].run(settings)}
    except (Unavailable, ImportError) as reason:
        outcome = {"status": "skipped", "error": str(reason)}
    outcome["record"] = record.describe(settings.torch_device(), seed=0)
    write_atomic(options.out, json.dumps(outcome))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
