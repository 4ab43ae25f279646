"""`maskwise bench step`: one training step on random crops, against the plain 2021 way and parts of timm and lightly where they are there."""

from __future__ import annotations

import argparse
import statistics

from maskwise.bench.contender import BASELINES, Contender, missing
from maskwise.bench.table import table
from maskwise.functional.errors import UserError

COMPARABLE = ["masking=attmask_high", "backbone.drop_path=0", "train.precision=fp32"]


def parser(make=argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What the verb takes."""
    it = make("maskwise bench step", description="Time one training step on random crops; every contender is a process of its own and they take turns.")
    it.add_argument("recipe", metavar="RECIPE", nargs="?", default="pretrain/attmask_hint_vits16", help="a recipe (default: pretrain/attmask_hint_vits16)")
    it.add_argument("overrides", metavar="section.key=value", nargs="*", help="what to change in the recipe")
    it.add_argument("--batch", type=int, default=8, help="images a step (default 8)")
    it.add_argument("--blocks", type=int, default=4, help="turns of each contender (default 4)")
    it.add_argument("--steps", type=int, default=1, help="steps a turn (default 1)")
    it.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    it.add_argument("--against", metavar="NAME,NAME", help=f"baselines: {', '.join(BASELINES)}, or nobody (default: those that are installed)")
    it.add_argument("--repeats", type=int, default=200, help="repeats of the attention row and of the masks (default 200)")
    return it


def baselines(against: str | None) -> list[str]:
    """The baselines that are asked for, or all that can run. Raises UserError for one that is unknown or cannot."""
    if against is None:
        return [kind for kind in BASELINES if missing(kind) is None]
    if against == "nobody":
        return []
    kinds = list(dict.fromkeys(kind.strip() for kind in against.split(",")))
    for kind in kinds:
        if kind not in BASELINES:
            raise UserError(f"bench step: --against knows {', '.join(BASELINES)} and nobody, not `{kind}`")
        if why := missing(kind):
            raise UserError(f"bench step: --against {kind}: {why}")
    return kinds


def run(options) -> dict:
    """Let the contenders take turns (ours, baselines, baselines, ours, ...) -> what was measured, JSON-able."""
    from maskwise.recipe import read_recipe

    if read_recipe(options.recipe, *options.overrides, try_model=False).learns_labels:
        raise UserError(f"bench step times a student and a teacher, and {options.recipe} learns labels: `maskwise bench train` times it whole")
    overrides = [*options.overrides, f"train.batch_size={options.batch}", "evaluate.knn_every=0", "optimizer.warmup_epochs=0"]
    kinds = ["ours", *baselines(options.against)]
    if len(kinds) > 1:
        overrides += COMPARABLE
    request = {"recipe": options.recipe, "overrides": overrides}
    turns: dict[str, list[dict]] = {kind: [] for kind in kinds}
    rates = []
    contenders = {}
    try:
        for kind in kinds:
            contenders[kind] = Contender(kind, options.threads, **request)
        first = {kind: contenders[kind].ask("steps", count=1)["seen"][0] for kind in kinds}
        for block in range(options.blocks):
            for kind in kinds if block % 2 == 0 else kinds[::-1]:
                turns[kind].append(contenders[kind].ask("steps", count=options.steps))
            rates.append(contenders["ours"].ask("matmul")["flops"])
        counts = {kind: contenders[kind].ask("count") for kind in kinds}
        parts = contenders["ours"].ask("parts", count=max(2, options.steps))
        attmask = contenders["ours"].ask("attmask", repeats=options.repeats)
        machine = contenders["ours"].started
    finally:
        for contender in contenders.values():
            contender.__exit__()
    rate = max(rates)
    result = {"bench": "step", "recipe": options.recipe, "overrides": overrides, "batch": options.batch, "machine": machine, "matmul_rate": rate, "contenders": {}}
    for kind in kinds:
        seconds = [turn["wall"] / options.steps for turn in turns[kind]]
        middle = statistics.median(seconds)
        result["contenders"][kind] = {
            "images_per_second": options.batch / middle, "seconds_per_step": middle, "turns": seconds, "cpu_seconds_per_step": statistics.median(turn["cpu"] / options.steps for turn in turns[kind]),
            "flops_per_step": counts[kind]["flops"], "flops_per_second": counts[kind]["flops"] / middle, "share_of_matmul_rate": counts[kind]["flops"] / middle / rate,
            "host_reads_per_step": counts[kind]["host_reads"] - 4 * (kind != "plain"),  # the contender itself reads four numbers; of the plain step they are its own
            "peak_memory": turns[kind][-1]["memory"], "first_step": first[kind],
        }  # fmt: skip
    result["against"] = {}
    ours = result["contenders"]["ours"]
    for kind in kinds[1:]:
        other = result["contenders"][kind]
        pairs = sorted(b / a for a, b in zip(ours["turns"], other["turns"]))
        result["against"][kind] = {
            "speed_ratio": statistics.median(pairs), "speed_ratios": pairs, "cpu_time_ratio": other["cpu_seconds_per_step"] / ours["cpu_seconds_per_step"],
            "memory_ratio": ours["peak_memory"] / other["peak_memory"], "flops_ratio": other["flops_per_step"] / ours["flops_per_step"],
            "loss_difference": max(abs(first["ours"][key] - first[kind][key]) / max(abs(first["ours"][key]), 1e-12) for key in first["ours"]),
        }  # fmt: skip
    result["parts"] = parts
    result["attmask"] = {**attmask, "share_of_step": sum(attmask.values()) / result["contenders"]["ours"]["seconds_per_step"], "repeats": options.repeats}
    return result


def text(result: dict) -> str:
    """The result as tables."""
    rows = [["", "img/s", "s/step", "CPU s/step", "TFLOP/step", "GFLOP/s", "% of matmul", "host reads", "peak GiB"]]
    for kind, each in result["contenders"].items():
        rows.append([
            kind, each["images_per_second"], each["seconds_per_step"], each["cpu_seconds_per_step"], each["flops_per_step"] / 1e12, each["flops_per_second"] / 1e9,
            100 * each["share_of_matmul_rate"], each["host_reads_per_step"], each["peak_memory"] / 2**30,
        ])  # fmt: skip
    machine = result["machine"]
    lines = [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}, load {machine['load']}",
        f"batch {result['batch']}, matmul rate {result['matmul_rate'] / 1e9:.0f} GFLOP/s",
        "",
        table(rows),
    ]
    for kind, against in result["against"].items():
        lines += [
            "",
            f"{against['speed_ratio']:.2f} x the speed of {kind} (CPU time {against['cpu_time_ratio']:.2f} x, products {against['flops_ratio']:.2f} x), "
            f"{against['memory_ratio']:.2f} of its memory; first losses differ by {against['loss_difference']:.1e}",
        ]
    total = sum(result["parts"].values())
    lines += ["", table([["part", "s", "%"], *([name, seconds, 100 * seconds / total] for name, seconds in result["parts"].items())])]
    attmask = result["attmask"]
    lines += ["", f"AttMask alone: row {1e3 * attmask['row']:.3g} ms, masks {1e3 * attmask['mask']:.3g} ms, {100 * attmask['share_of_step']:.2f} % of a step"]
    return "\n".join(lines)
