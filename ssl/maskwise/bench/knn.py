"""`maskwise bench knn`: k-NN among as many features as ImageNet has images, synthetic ones."""

from __future__ import annotations

import argparse
import time

from maskwise.bench.table import table

BANK, QUERIES, WIDTH, CLASSES = 1_281_167, 50_000, 384, 1000


def parser(make=argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What the verb takes."""
    it = make("maskwise bench knn", description="Time k-NN at the size of ImageNet, on random features around random class means.")
    for name, default, what in (("bank", BANK, "features to ask"), ("queries", QUERIES, "features that ask"), ("width", WIDTH, "numbers a feature")):
        it.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    it.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="neighbours (default 10 20 100 200)")
    it.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    it.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return it


def run(options) -> dict:
    """Classify all queries -> what was measured, JSON-able."""
    import torch

    from maskwise.bench import machine
    from maskwise.distributed.world import World
    from maskwise.evaluation.knn import accuracies

    if options.threads:
        torch.set_num_threads(options.threads)
    world = World.start(options.device)
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(CLASSES, options.width, generator=generator)
    sets = []
    for count in (options.bank, options.queries):
        labels = torch.randint(CLASSES, (count,), generator=generator)
        sets += [torch.randn(count, options.width, generator=generator).mul_(3).add_(means[labels]), labels]
    rate = machine.matmul_rate(world.device)
    before = machine.peak_memory(world.device)
    wall, cpu = time.perf_counter(), time.process_time()
    found = accuracies(*sets, options.k, device=world.device)
    machine.wait(world.device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    flops = 2 * options.bank * options.queries * options.width
    return {
        "bench": "knn", "bank": options.bank, "queries": options.queries, "width": options.width, "k": options.k, "machine": machine.about(world.device),
        "seconds": wall, "cpu_seconds": cpu, "queries_per_second": options.queries / wall, "flops_per_second": flops / wall, "matmul_rate": rate,
        "share_of_matmul_rate": flops / wall / rate, "features_memory": before, "peak_memory": machine.peak_memory(world.device),
        "top1": {str(k): each[1] for k, each in found.items()},
    }  # fmt: skip


def text(result: dict) -> str:
    """The result as a table."""
    machine = result["machine"]
    return "\n".join([
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}, load {machine['load']}",
        f"{result['queries']} queries, bank of {result['bank']} x {result['width']}, k = {', '.join(map(str, result['k']))}",
        "",
        table([
            ["seconds", "CPU s", "queries/s", "GFLOP/s", "% of matmul", "features GiB", "peak GiB"],
            [result["seconds"], result["cpu_seconds"], result["queries_per_second"], result["flops_per_second"] / 1e9, 100 * result["share_of_matmul_rate"],
             result["features_memory"] / 2**30, result["peak_memory"] / 2**30],
        ]),
        "",
        f"top-1: {', '.join(f'{value:.2f} at k = {k}' for k, value in result['top1'].items())}",
    ])  # fmt: skip
