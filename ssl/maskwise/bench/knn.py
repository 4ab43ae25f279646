"""`maskwise bench knn`: k-NN at the size of ImageNet, on synthetic features."""

from __future__ import annotations

import argparse
import time

from maskwise.bench.table import table

BANK, QUERIES, WIDTH, CLASSES, SEED = 1_281_167, 50_000, 384, 1000, 0


def parser(make=argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of the benchmark."""
    options = make(
        "maskwise bench knn",
        description="Time k-NN at the size of ImageNet, on random features around random class means.",
    )
    for name, default, meaning in (
        ("bank", BANK, "features of the bank"),
        ("queries", QUERIES, "features to classify"),
        ("width", WIDTH, "width of the features"),
    ):
        options.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default {default})")
    options.add_argument(
        "--k", type=int, nargs="+", default=[10, 20, 100, 200], help="neighbors (default 10 20 100 200)"
    )
    options.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    options.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return options


def run(options) -> dict:
    """Classify all queries -> JSON-able measurements."""
    import torch

    from maskwise.bench import machine, record
    from maskwise.distributed.world import World
    from maskwise.evaluation.knn import accuracies

    if options.threads:
        torch.set_num_threads(options.threads)
    world = World.start(options.device)
    generator = torch.Generator().manual_seed(SEED)
    means = torch.randn(CLASSES, options.width, generator=generator)
    sets = []
    for count in (options.bank, options.queries):
        labels = torch.randint(CLASSES, (count,), generator=generator)
        sets += [torch.randn(count, options.width, generator=generator).mul_(3).add_(means[labels]), labels]
    rate = machine.matmul_rate(world.device)
    before = machine.peak_memory(world.device)
    wall, cpu = time.perf_counter(), time.process_time()
    top_k = accuracies(*sets, options.k, device=world.device)
    machine.wait(world.device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    flops = 2 * options.bank * options.queries * options.width
    return {
        "bench": "knn",
        "bank": options.bank,
        "queries": options.queries,
        "width": options.width,
        "k": options.k,
        "record": record.describe(world.device, seed=SEED),
        "seconds": wall,
        "cpu_seconds": cpu,
        "queries_per_second": options.queries / wall,
        "flops_per_second": flops / wall,
        "matmul_rate": rate,
        "share_of_matmul_rate": flops / wall / rate,
        "features_memory": before,
        "peak_memory": machine.peak_memory(world.device),
        "top1": {str(k): accuracy[1] for k, accuracy in top_k.items()},
    }


def text(result: dict) -> str:
    """Format the result as a table."""
    about = result["record"]
    return "\n".join(
        [
            f"{about['hardware']}, {about['threads']} threads, torch {about['torch']}, "
            f"commit {about['commit'] or 'unknown'}, {about['date']} {about['time']}, load {about['load']}",
            f"{result['queries']} queries, bank of {result['bank']} x {result['width']}, "
            f"k = {', '.join(map(str, result['k']))}",
            "",
            table(
                [
                    ["seconds", "CPU s", "queries/s", "GFLOP/s", "% of matmul", "features GiB", "peak GiB"],
                    [
                        result["seconds"],
                        result["cpu_seconds"],
                        result["queries_per_second"],
                        result["flops_per_second"] / 1e9,
                        100 * result["share_of_matmul_rate"],
                        result["features_memory"] / 2**30,
                        result["peak_memory"] / 2**30,
                    ],
                ]
            ),
            "",
            f"top-1: {', '.join(f'{value:.2f} at k = {k}' for k, value in result['top1'].items())}",
        ]
    )
