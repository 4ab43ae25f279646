"""`maskwise bench data`: images a second from JPEGs to crops, beside Pillow's multi-crop, and what each part takes."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from maskwise.bench.machine import about, wait
from maskwise.bench.table import table
from maskwise.functional.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def parser(make=argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What the verb takes."""
    it = make("maskwise bench data", description="Time decoding, cropping, colour and the whole loader on JPEGs, beside a plain Pillow multi-crop on the same files; all take turns.")
    it.add_argument("recipe", metavar="RECIPE", nargs="?", default="pretrain/attmask_hint_vits16", help="whose crops are made (default: pretrain/attmask_hint_vits16)")
    it.add_argument("overrides", metavar="section.key=value", nargs="*", help="what to change in the recipe")
    it.add_argument("--images", metavar="DIR", help="a folder of JPEGs (default: natural-looking ones of 500 x 375, made once in the temporary folder)")
    it.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="data processes of each loader (default: the number of cores)")
    it.add_argument("--batch", type=int, default=16, help="images a batch (default 16)")
    it.add_argument("--blocks", type=int, default=5, help="turns of each contender (default 5)")
    it.add_argument("--seconds", type=float, default=6.0, help="seconds of each loader's turn (default 6)")
    it.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where colour is applied (default: %(default)s)")
    return it


def run(options) -> dict:
    """Measure; the loaders take turns, the order reversed in every other block -> what was measured, JSON-able."""
    from maskwise.data import decoders
    from maskwise.data.datasets import Folder
    from maskwise.data.multicrop import MultiCrop
    from maskwise.recipe import read_recipe

    recipe = read_recipe(options.recipe, *options.overrides)
    if recipe.learns_labels:
        raise UserError(f"bench data times multi-crop, and {options.recipe} learns labels from one crop: `maskwise bench train` times it whole")
    folder = Path(options.images) if options.images else natural_jpegs()
    data, crops, device = Folder(folder), MultiCrop(**recipe.crops.keywords(), seed=recipe.seed), torch.device(options.device)
    if options.batch > len(data):
        raise UserError(f"bench data: --batch {options.batch} is more than the {len(data)} images of {folder}")
    baseline = beside("pil_multicrop")
    makers = {"maskwise": lambda: ours(data, crops, recipe, options)}
    if baseline is not None:
        makers["pil"] = lambda: iter(baseline.loader(folder, options.batch, options.workers, recipe.crops))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    loaders = {name: {"images_per_second": [], "cpu_ms": []} for name in makers}
    parts: dict[str, list[float]] = {}
    training: dict[str, list[float]] = {"images_per_second": [], "data_wait_share": []}
    for block in range(options.blocks):
        for name in list(makers) if block % 2 == 0 else list(makers)[::-1]:
            rate, cpu = turn(makers[name](), options)
            loaders[name]["images_per_second"].append(rate)
            loaders[name]["cpu_ms"].append(cpu)
        for name, seconds in measured_parts(data, crops, device, baseline, recipe).items():
            parts.setdefault(name, []).append(1e3 * seconds)
        rate, share = consumed(makers["maskwise"](), device, options)
        training["images_per_second"].append(rate)
        training["data_wait_share"].append(share)
    torch.set_num_threads(before)
    sizes = sorted(data.source(k).stat().st_size for k in range(len(data)))
    result = {
        "bench": "data", "machine": about(device), "recipe": recipe.source, "workers": options.workers, "batch": options.batch, "seconds": options.seconds,
        "files": {"count": len(data), "bytes": [sizes[0], sizes[len(sizes) // 2], sizes[-1]]},
        "crops": {key: recipe.values[f"crops.{key}"] for key in ("global_size", "local_size", "local_number", "global_scale", "local_scale")},
        "decoder": decoders.resolved(recipe.data.decoder), "decoders": {name: decoders.trouble(name) or "works" for name in decoders.PREFERRED},
        "loaders": loaders, "parts_ms": parts, "loader_and_colour": training,
    }  # fmt: skip
    if baseline is not None:
        for key, over in (("images_per_second", False), ("cpu_ms", True)):
            pairs = [(b / a if over else a / b) for a, b in zip(loaders["maskwise"][key], loaders["pil"][key]) if a and b]
            result[f"ratio_{key}"] = pairs
    return result


def beside(name: str):
    """A script of the checkout's benchmarks as a module; None where the package runs without its checkout."""
    path = BENCHMARKS / f"{name}.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def natural_jpegs(count: int = 256) -> Path:
    """The folder of made JPEGs. Raises UserError outside a checkout, where the script that makes them is missing."""
    script = beside("natural_jpegs")
    if script is None:
        raise UserError("bench data: without a checkout there are no images to make; give --images DIR")
    folder = Path(tempfile.gettempdir()) / "maskwise_natural_jpegs"
    script.write(folder, count)
    return folder


def ours(data, crops, recipe, options):
    """The loader of a training run, without its memory of decoded images."""
    from maskwise.data import loader

    return loader.batches(
        data, crops, batch_size=options.batch, total_steps=1 << 30, workers=options.workers, cache="none",
        decoder=recipe.data.decoder, jpeg_scaling=recipe.data.jpeg_scaling, pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


def turn(stream, options) -> tuple[float, float | None]:
    """(images a second, CPU milliseconds an image of all processes) of a loader that is only emptied, once it is running."""
    width = max(1, options.workers)
    for _ in range(2 * width):
        next(stream)
    begin, cpu, count = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - begin < options.seconds or count % width:
        next(stream)
        count += 1
    images, elapsed, after = count * options.batch, time.perf_counter() - begin, cpu_seconds()
    end(stream)
    return images / elapsed, None if cpu is None or after is None else 1e3 * (after - cpu) / images


def consumed(stream, device: torch.device, options) -> tuple[float, float]:
    """(images a second, share of the time spent waiting for data) where this process applies the colour and does nothing else."""
    from maskwise.data.augment import augment

    for _ in range(2):
        next(stream)
    begin, waited, count = time.perf_counter(), 0.0, 0
    while time.perf_counter() - begin < options.seconds / 2:
        ask = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - ask
        batch = batch.to(device)
        augment(batch.global_crops, batch.params.global_, MEAN, STD)
        augment(batch.local_crops, batch.params.local_, MEAN, STD)
        wait(device)
        count += 1
    elapsed = time.perf_counter() - begin
    end(stream)
    return count * options.batch / elapsed, waited / elapsed


def end(stream) -> None:
    """Let a loader's workers go."""
    with contextlib.suppress(AttributeError):  # torch's own iterator goes with its last reference
        stream.close()


def cpu_seconds() -> float | None:
    """CPU time of this process and of its living children so far; None where the system does not tell it."""
    try:
        ticks = 0
        for child in multiprocessing.active_children():
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None


def measured_parts(data, crops, device: torch.device, baseline, recipe, count: int = 24) -> dict[str, float]:
    """Seconds an image of each part alone, on one core (colour: on the device), over `count` images."""
    from maskwise.data import decoders
    from maskwise.data.augment import augment
    from maskwise.data.decode import decode

    chosen = [k * len(data) // count for k in range(count)]
    held = [data.source(k).read_bytes() for k in chosen]
    images = [decode(each) for each in held]
    found = {}
    for name in decoders.PREFERRED:
        if not decoders.trouble(name):
            found[f"decode, {name}"] = timed(lambda: [decode(each, decoder=name) for each in held]) / count
    found["decode, pil, half size"] = timed(lambda: [decode(each, shrink=2) for each in held]) / count
    samples = torch.arange(count)
    found["uint8 crops"] = timed(lambda: crops.batch(iter(images), samples, 0)) / count
    global_crops, local_crops, params = crops.batch(iter(images), samples, 0)
    if device.type != "cpu":
        pinned = [each.pin_memory() for each in (global_crops, local_crops)]
        found["copy"] = timed(lambda: ([each.to(device, non_blocking=True) for each in pinned], wait(device)), wall=True) / count
    views = [(each.to(device), colours.planned().each(lambda tensor: tensor.to(device))) for each, colours in ((global_crops, params.global_), (local_crops, params.local_))]
    found["colour"] = timed(lambda: ([augment(each, colours, MEAN, STD) for each, colours in views], wait(device)), wall=device.type != "cpu") / count
    if baseline is not None:
        plain = baseline.MultiCropFolder(data.root, recipe.crops)
        found["pil, all of it"] = timed(lambda: [plain[k] for k in chosen[:6]]) / 6
        found["pil, decode and crops only"] = timed(lambda: [plain.geometry_only(k) for k in chosen[:12]]) / 12
    return found


def timed(call, wall: bool = False) -> float:
    """CPU seconds of the second of two calls, or its wall time where a GPU has part in it."""
    clock = time.perf_counter if wall else time.process_time
    call()
    begin = clock()
    call()
    return clock() - begin


def text(result: dict) -> str:
    """The result as tables."""
    machine, files = result["machine"], result["files"]
    shape = result["crops"]
    lines = [
        f"{machine['device']}, {machine['cores']} cores, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}, load {machine['load']}",
        f"{files['count']} files of {files['bytes'][0]} to {files['bytes'][2]} bytes; 2 x {shape['global_size']} + {shape['local_number']} x {shape['local_size']}; "
        f"{result['workers']} workers, batch {result['batch']}; decoder {result['decoder']}",
        *(f"decoder {name}: {why}" for name, why in result["decoders"].items() if why != "works"),
        "",
    ]
    names = {"maskwise": "maskwise, uint8 crops", "pil": "Pillow, 2021"}
    rows = [["loader", "img/s", "least", "most", "CPU ms/img"]]
    for name, each in result["loaders"].items():
        rates, cpu = each["images_per_second"], [value for value in each["cpu_ms"] if value is not None]
        rows.append([names[name], statistics.median(rates), min(rates), max(rates), statistics.median(cpu) if cpu else None])
    both = result["loader_and_colour"]["images_per_second"]
    rows.append(["maskwise, colour here too", statistics.median(both), min(both), max(both), None])
    lines += [table(rows), ""]
    for key, what in (("ratio_images_per_second", "img/s"), ("ratio_cpu_ms", "CPU time an image")):
        pairs = result.get(key)
        if pairs:
            lines.append(f"{statistics.median(pairs):.2f} x Pillow in {what} (blocks {min(pairs):.2f} to {max(pairs):.2f})")
    share = statistics.median(result["loader_and_colour"]["data_wait_share"])
    lines += [f"a process that does nothing but colour waits {100 * share:.0f} % of its time for data", ""]
    rows = [["part, one core", "ms/img", "least", "most", "img/s"]]
    for name, each in result["parts_ms"].items():
        middle = statistics.median(each)
        rows.append([name, middle, min(each), max(each), 1e3 / middle])
    return "\n".join([*lines, table(rows)])
