"""`maskwise bench data`: images per second from JPEGs to crops, against Pillow, and the time of each part."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from maskwise.bench import record
from maskwise.bench.baselines import natural_jpegs, pillow_multicrop
from maskwise.bench.machine import wait
from maskwise.bench.table import table
from maskwise.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = {"maskwise": "maskwise, uint8 crops", "pil": "Pillow, 2021"}  # loaders in tables
DECODE = "decode, "  # names of parts that time a decoder


def parser(make=argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of the benchmark."""
    options = make(
        "maskwise bench data",
        description="Time decoding, cropping, color and the whole loader on JPEGs, "
        "in turns with a plain Pillow multi-crop on the same files.",
    )
    add = options.add_argument
    recipe = "pretrain/attmask_hint_vits16"
    add("recipe", metavar="RECIPE", nargs="?", default=recipe, help=f"recipe of the crops (default: {recipe})")
    add("overrides", metavar="section.key=value", nargs="*", help="changes to the recipe")
    add(
        "--images",
        metavar="DIR",
        type=os.path.expanduser,
        help="a folder of JPEGs (default: synthetic ones of 500 x 375, written once)",
    )
    cores = os.cpu_count() or 1
    add("--workers", type=int, default=cores, help="data processes of each loader (default: the number of cores)")
    add("--batch", type=int, default=16, help="images per batch (default: %(default)s)")
    add("--blocks", type=int, default=5, help="turns of each loader (default: %(default)s)")
    add("--seconds", type=float, default=6.0, help="seconds of each turn (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="where color is applied (default: %(default)s)")
    return options


def run(options) -> dict:
    """Measure all loaders in turns -> JSON-able measurements."""
    from maskwise.data.datasets.folder import Folder
    from maskwise.data.decoding import jpeg
    from maskwise.recipe.reading import read_recipe

    recipe = read_recipe(options.recipe, *options.overrides)
    if recipe.learns_labels:
        raise UserError(f"bench data times multi-crop, but {options.recipe} is supervised; use `maskwise bench train`")
    folder = Path(options.images) if options.images else synthetic_jpegs()
    data, device = Folder(folder), torch.device(options.device)
    if options.batch > len(data):
        raise UserError(f"bench data: --batch {options.batch} is more than the {len(data)} images of {folder}")
    measured = measure(data, recipe, device, options)
    sizes = sorted(data.source(i).stat().st_size for i in range(len(data)))
    shape = ("global_size", "local_size", "local_number", "global_scale", "local_scale")
    return {
        "bench": "data",
        "record": record.describe(device, seed=recipe.seed),
        "recipe": recipe.source,
        "workers": options.workers,
        "batch": options.batch,
        "seconds": options.seconds,
        "files": {"count": len(data), "bytes": [sizes[0], sizes[len(sizes) // 2], sizes[-1]]},
        "crops": {key: recipe.values[f"crops.{key}"] for key in shape},
        "decoder": jpeg.resolve_decoder(recipe.data.decoder),
        "decoders": {name: jpeg.unavailable_reason(name) or "works" for name in jpeg.PREFERRED},
        **measured,
        "ratio_images_per_second": ratios(measured["loaders"], "maskwise", "pil", "images_per_second"),
        "ratio_cpu_ms": ratios(measured["loaders"], "pil", "maskwise", "cpu_ms"),
    }


def measure(data, recipe, device: torch.device, options) -> dict:
    """Measure loaders in turns, the order reversed in every other block, and parts after each block."""
    from maskwise.data.multicrop import MultiCrop

    crops = MultiCrop(recipe.crops, seed=recipe.seed)
    makers = {
        "maskwise": lambda: training_loader(data, crops, recipe, options),
        "pil": lambda: iter(pillow_multicrop.loader(data.root, options.batch, options.workers, recipe.crops)),
    }
    loaders = {name: {"images_per_second": [], "cpu_ms": []} for name in makers}
    parts: dict[str, list[float]] = {}
    training: dict[str, list[float]] = {"images_per_second": [], "data_wait_share": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for block in range(options.blocks):
        for name in list(makers) if block % 2 == 0 else list(makers)[::-1]:
            rate, cpu = drain(makers[name](), options)
            loaders[name]["images_per_second"].append(rate)
            loaders[name]["cpu_ms"].append(cpu)
        for name, seconds in part_seconds(data, crops, device, recipe).items():
            parts.setdefault(name, []).append(1e3 * seconds)
        rate, share = color_only(makers["maskwise"](), device, options)
        training["images_per_second"].append(rate)
        training["data_wait_share"].append(share)
    torch.set_num_threads(threads)
    return {"loaders": loaders, "parts_ms": parts, "loader_and_color": training}


def ratios(loaders: dict, numerator: str, denominator: str, key: str) -> list[float]:
    """Ratio of two loaders in each block where both were measured."""
    pairs = zip(loaders[numerator][key], loaders[denominator][key])
    return [above / below for above, below in pairs if above and below]


def synthetic_jpegs(count: int = 256) -> Path:
    """Write natural-looking JPEGs to a temporary folder, unless they exist, and return it."""
    folder = Path(tempfile.gettempdir()) / "maskwise_natural_jpegs"
    natural_jpegs.write(folder, count)
    return folder


def training_loader(data, crops, recipe, options):
    """The loader of a training run, without its cache of decoded images."""
    from maskwise.data import loader

    return loader.batches(
        data,
        crops,
        batch_size=options.batch,
        total_steps=1 << 30,
        workers=options.workers,
        cache="none",
        decoder=recipe.data.decoder,
        jpeg_scaling=recipe.data.jpeg_scaling,
        pin_memory=torch.cuda.is_available(),
    )


def drain(stream, options) -> tuple[float, float | None]:
    """Take batches as fast as they come -> (images per second, CPU milliseconds per image of all processes)."""
    width = max(1, options.workers)
    for _ in range(2 * width):
        next(stream)
    begin, cpu, count = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - begin < options.seconds or count % width:
        next(stream)
        count += 1
    images, elapsed, after = count * options.batch, time.perf_counter() - begin, cpu_seconds()
    close(stream)
    return images / elapsed, None if cpu is None or after is None else 1e3 * (after - cpu) / images


def color_only(stream, device: torch.device, options) -> tuple[float, float]:
    """Apply color to each batch and do nothing else -> (images per second, share of the time waiting for data)."""
    from maskwise.data.augmentation.color import augment

    for _ in range(2):
        next(stream)
    begin, waited, count = time.perf_counter(), 0.0, 0
    while time.perf_counter() - begin < options.seconds / 2:
        requested = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - requested
        batch = batch.to(device)
        augment(batch.global_crops, batch.params.global_, MEAN, STD)
        augment(batch.local_crops, batch.params.local_, MEAN, STD)
        wait(device)
        count += 1
    elapsed = time.perf_counter() - begin
    close(stream)
    return count * options.batch / elapsed, waited / elapsed


def close(stream) -> None:
    """End the workers of a loader."""
    with contextlib.suppress(AttributeError):  # torch's own iterator ends with its last reference
        stream.close()


def cpu_seconds() -> float | None:
    """CPU time of this process and its living children; None where the system has no /proc."""
    try:
        ticks = 0
        for child in multiprocessing.active_children():
            fields = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None


def part_seconds(data, crops, device: torch.device, recipe, count: int = 24) -> dict[str, float]:
    """Seconds per image of each part, on one core (color: on the device), over `count` images."""
    from maskwise.data.decoding import jpeg
    from maskwise.data.decoding.image import decode

    chosen = [i * len(data) // count for i in range(count)]
    files = [data.source(i).read_bytes() for i in chosen]
    seconds = {}
    for name in jpeg.PREFERRED:
        if not jpeg.unavailable_reason(name):
            seconds[DECODE + name] = timed(lambda: [decode(file, decoder=name) for file in files]) / count
    seconds["decode, pil, half size"] = timed(lambda: [decode(file, shrink=2) for file in files]) / count
    images, samples = [decode(file) for file in files], torch.arange(count)
    seconds["uint8 crops"] = timed(lambda: crops.batch(iter(images), samples, 0)) / count
    batch = crops.batch(iter(images), samples, 0)
    seconds |= {name: value / count for name, value in device_seconds(*batch, device).items()}
    baseline = pillow_multicrop.MultiCropFolder(data.root, recipe.crops)
    seconds["pil, all of it"] = timed(lambda: [baseline[i] for i in chosen[:6]]) / 6
    seconds["pil, decode and crops only"] = timed(lambda: [baseline.geometry_only(i) for i in chosen[:12]]) / 12
    return seconds


def device_seconds(global_crops, local_crops, params, device: torch.device) -> dict[str, float]:
    """Seconds to copy a batch to the device (GPU only) and to apply color there."""
    from maskwise.data.augmentation.color import augment

    seconds, gpu = {}, device.type != "cpu"
    if gpu:
        pinned = [crops.pin_memory() for crops in (global_crops, local_crops)]

        def copy():
            for crops in pinned:
                crops.to(device, non_blocking=True)
            wait(device)

        seconds["copy"] = timed(copy, wall=True)
    views = [
        (crops.to(device), colors.with_plan().map_tensors(lambda tensor: tensor.to(device)))
        for crops, colors in ((global_crops, params.global_), (local_crops, params.local_))
    ]

    def color():
        for crops, colors in views:
            augment(crops, colors, MEAN, STD)
        wait(device)

    seconds["color"] = timed(color, wall=gpu)
    return seconds


def timed(call, wall: bool = False) -> float:
    """Seconds of the second of two calls: CPU time, or wall time where a GPU is involved."""
    clock = time.perf_counter if wall else time.process_time
    call()
    begin = clock()
    call()
    return clock() - begin


def size_text(size) -> str:
    """Format the size of a crop: its side, or (h, w)."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def text(result: dict) -> str:
    """Format the result as tables."""
    about, files, crops = result["record"], result["files"], result["crops"]
    share = statistics.median(result["loader_and_color"]["data_wait_share"])
    return "\n".join(
        [
            f"{about['hardware']}, torch {about['torch']}, "
            f"commit {about['commit'] or 'unknown'}, {about['date']} {about['time']}, load {about['load']}",
            f"{files['count']} files of {files['bytes'][0]} to {files['bytes'][2]} bytes; "
            f"2 x {size_text(crops['global_size'])} + {crops['local_number']} x {size_text(crops['local_size'])}; "
            f"{result['workers']} workers, batch {result['batch']}; decoder {result['decoder']}",
            "",
            table(loader_rows(result)),
            "",
            *ratio_lines(result),
            f"a process that only applies color waits {100 * share:.0f} % of its time for data",
            "",
            table(decoder_rows(result["parts_ms"], result["decoders"])),
            *(f"decoder {name}: {status}" for name, status in result["decoders"].items() if status != "works"),
            "",
            table(part_rows(result["parts_ms"], result["decoders"])),
        ]
    )


def loader_rows(result: dict) -> list[list]:
    """Images per second of each loader."""
    rows = [["loader", "img/s", "least", "most", "CPU ms/img"]]
    for name, numbers in result["loaders"].items():
        rates, cpu = numbers["images_per_second"], [value for value in numbers["cpu_ms"] if value is not None]
        middle = statistics.median(cpu) if cpu else None
        rows.append([NAMES[name], statistics.median(rates), min(rates), max(rates), middle])
    rates = result["loader_and_color"]["images_per_second"]
    return [*rows, ["maskwise, color in the same process", statistics.median(rates), min(rates), max(rates), None]]


def ratio_lines(result: dict) -> list[str]:
    """Ratios to Pillow in words."""
    lines = []
    for key, unit in (("ratio_images_per_second", "img/s"), ("ratio_cpu_ms", "CPU time per image")):
        pairs = result.get(key)
        if pairs:
            middle = statistics.median(pairs)
            lines.append(f"{middle:.2f} x Pillow in {unit} (blocks {min(pairs):.2f} to {max(pairs):.2f})")
    return lines


def decoder_rows(parts: dict[str, list[float]], decoders: dict[str, str]) -> list[list]:
    """Decoding time on one core, one column per available decoder."""
    names = [name for name in decoders if DECODE + name in parts]
    middle = [statistics.median(parts[DECODE + name]) for name in names]
    return [["decoder, one core", *names], ["ms/img", *middle], ["img/s", *(1e3 / value for value in middle)]]


def part_rows(parts: dict[str, list[float]], decoders: dict[str, str]) -> list[list]:
    """Time of the other parts, one row per part."""
    rows = [["part, one core", "ms/img", "least", "most", "img/s"]]
    for name, values in parts.items():
        if name.removeprefix(DECODE) not in decoders:
            middle = statistics.median(values)
            rows.append([name, middle, min(values), max(values), 1e3 / middle])
    return rows
