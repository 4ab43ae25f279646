"""`maskwise bench step`: one training step on random crops, against a reference implementation, timm and lightly."""

from __future__ import annotations

import argparse
import contextlib
import statistics

from maskwise.bench import record
from maskwise.bench.implementation import BASELINES, BenchProcess, unavailable_reason
from maskwise.bench.table import table
from maskwise.errors import UserError

COMPARABLE = ["masking=attmask_high", "backbone.drop_path=0", "train.precision=fp32"]  # all implementations have these
OWN_READS = 4  # host reads of the benchmark itself: the reported losses; the reference step reads them anyway


def parser(make=argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of the benchmark."""
    options = make(
        "maskwise bench step",
        description="Time one training step on random crops; each implementation runs in its own process, in turns.",
    )
    add = options.add_argument
    recipe = "pretrain/attmask_hint_vits16"
    add("recipe", metavar="RECIPE", nargs="?", default=recipe, help=f"a recipe (default: {recipe})")
    add("overrides", metavar="section.key=value", nargs="*", help="changes to the recipe")
    add("--batch", type=int, default=8, help="images per step (default: %(default)s)")
    add("--blocks", type=int, default=4, help="turns of each implementation (default: %(default)s)")
    add("--steps", type=int, default=1, help="steps per turn (default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add(
        "--against",
        metavar="NAME,NAME",
        help=f"baselines: {', '.join(BASELINES)}, or none (default: those that are installed)",
    )
    add("--repeats", type=int, default=200, help="repeats of attention row and masks (default: %(default)s)")
    return options


def baselines(against: str | None) -> list[str]:
    """Baselines given, or all that are installed. Raises UserError for an unknown or unavailable one."""
    if against is None:
        return [kind for kind in BASELINES if unavailable_reason(kind) is None]
    if against == "none":
        return []
    kinds = list(dict.fromkeys(kind.strip() for kind in against.split(",")))
    for kind in kinds:
        if kind not in BASELINES:
            raise UserError(f"bench step: no baseline `{kind}`; --against takes {', '.join(BASELINES)} or none")
        if reason := unavailable_reason(kind):
            raise UserError(f"bench step: --against {kind}: {reason}")
    return kinds


def run(options) -> dict:
    """Measure all implementations in turns (ours, baselines, baselines, ours, ...) -> JSON-able measurements."""
    from maskwise.recipe.reading import read_recipe

    recipe = read_recipe(options.recipe, *options.overrides, try_model=False)
    if recipe.learns_labels:
        raise UserError(
            f"bench step times a student and a teacher, but {options.recipe} is supervised; use `maskwise bench train`"
        )
    overrides = [
        *options.overrides,
        f"train.batch_size={options.batch}",
        "evaluate.knn_every=0",
        "optimizer.warmup_epochs=0",
    ]
    kinds = ["maskwise", *baselines(options.against)]
    if len(kinds) > 1:
        overrides += COMPARABLE
    with contextlib.ExitStack() as stack:
        processes = {
            kind: stack.enter_context(BenchProcess(kind, options.threads, recipe=options.recipe, overrides=overrides))
            for kind in kinds
        }
        measured = measure(processes, options)
    rate = max(measured["matmul_rates"])
    implementations = {kind: summary(kind, measured, rate, options) for kind in kinds}
    ours = implementations["maskwise"]
    return {
        "bench": "step",
        "recipe": options.recipe,
        "overrides": overrides,
        "batch": options.batch,
        "record": {**processes["maskwise"].started["record"], "command": record.own_command(), "seed": recipe.seed},
        "memory_before_first_step": processes["maskwise"].started["memory"],
        "matmul_rate": rate,
        "implementations": implementations,
        "against": {kind: comparison(ours, implementations[kind]) for kind in kinds[1:]},
        "parts": measured["parts"],
        "attmask": {
            **measured["attmask"],
            "share_of_step": sum(measured["attmask"].values()) / ours["seconds_per_step"],
            "repeats": options.repeats,
        },
    }


def measure(processes: dict[str, BenchProcess], options) -> dict:
    """Take turns; the order is reversed in every other block, so that drift of the machine affects all equally."""
    kinds, ours = list(processes), processes["maskwise"]
    first = {kind: process.request("steps", count=1)["losses"][0] for kind, process in processes.items()}
    turns: dict[str, list[dict]] = {kind: [] for kind in kinds}
    rates = []
    for block in range(options.blocks):
        for kind in kinds if block % 2 == 0 else kinds[::-1]:
            turns[kind].append(processes[kind].request("steps", count=options.steps))
        rates.append(ours.request("matmul")["flops"])
    return {
        "first": first,
        "turns": turns,
        "matmul_rates": rates,
        "counts": {kind: process.request("count") for kind, process in processes.items()},
        "parts": ours.request("parts", count=max(2, options.steps)),
        "attmask": ours.request("attmask", repeats=options.repeats),
    }


def summary(kind: str, measured: dict, matmul_rate: float, options) -> dict:
    """Medians and rates of one implementation."""
    turns, counts = measured["turns"][kind], measured["counts"][kind]
    seconds = [turn["wall"] / options.steps for turn in turns]
    middle = statistics.median(seconds)
    return {
        "images_per_second": options.batch / middle,
        "seconds_per_step": middle,
        "turns": seconds,
        "cpu_seconds_per_step": statistics.median(turn["cpu"] / options.steps for turn in turns),
        "flops_per_step": counts["flops"],
        "flops_per_second": counts["flops"] / middle,
        "share_of_matmul_rate": counts["flops"] / middle / matmul_rate,
        "host_reads_per_step": counts["host_reads"] - (0 if kind == "reference" else OWN_READS),
        "peak_memory": turns[-1]["memory"],
        "first_step": measured["first"][kind],
    }


def comparison(ours: dict, other: dict) -> dict:
    """Ratios of a baseline to ours, and the largest relative difference of the first step's losses."""
    ratios = sorted(theirs / own for own, theirs in zip(ours["turns"], other["turns"]))
    differences = [
        abs(value - other["first_step"][key]) / max(abs(value), 1e-12) for key, value in ours["first_step"].items()
    ]
    return {
        "speed_ratio": statistics.median(ratios),
        "speed_ratios": ratios,
        "cpu_time_ratio": other["cpu_seconds_per_step"] / ours["cpu_seconds_per_step"],
        "memory_ratio": ours["peak_memory"] / other["peak_memory"],
        "flops_ratio": other["flops_per_step"] / ours["flops_per_step"],
        "loss_difference": max(differences),
    }


def text(result: dict) -> str:
    """Format the result as tables."""
    about, attmask = result["record"], result["attmask"]
    total = sum(result["parts"].values())
    parts = [[name, seconds, 100 * seconds / total] for name, seconds in result["parts"].items()]
    return "\n".join(
        [
            f"{about['hardware']}, {about['threads']} threads, torch {about['torch']}, "
            f"commit {about['commit'] or 'unknown'}, {about['date']} {about['time']}, load {about['load']}",
            f"batch {result['batch']}, matmul rate {result['matmul_rate'] / 1e9:.0f} GFLOP/s",
            "",
            table(implementation_rows(result["implementations"])),
            *(line for kind, ratios in result["against"].items() for line in ("", ratio_line(kind, ratios))),
            "",
            table([["part", "s", "%"], *parts]),
            "",
            f"AttMask alone: row {1e3 * attmask['row']:.3g} ms, masks {1e3 * attmask['mask']:.3g} ms, "
            f"{100 * attmask['share_of_step']:.2f} % of a step",
        ]
    )


def implementation_rows(implementations: dict) -> list[list]:
    """One row per implementation, below a heading."""
    rows = [["", "img/s", "s/step", "CPU s/step", "TFLOP/step", "GFLOP/s", "% of matmul", "host reads", "peak GiB"]]
    for kind, numbers in implementations.items():
        rows.append(
            [
                kind,
                numbers["images_per_second"],
                numbers["seconds_per_step"],
                numbers["cpu_seconds_per_step"],
                numbers["flops_per_step"] / 1e12,
                numbers["flops_per_second"] / 1e9,
                100 * numbers["share_of_matmul_rate"],
                numbers["host_reads_per_step"],
                numbers["peak_memory"] / 2**30,
            ]
        )
    return rows


def ratio_line(kind: str, ratios: dict) -> str:
    """The comparison with one baseline in words."""
    return (
        f"{ratios['speed_ratio']:.2f} x the speed of {kind} (CPU time {ratios['cpu_time_ratio']:.2f} x, "
        f"products {ratios['flops_ratio']:.2f} x), {ratios['memory_ratio']:.2f} of its memory; "
        f"first losses differ by {ratios['loss_difference']:.1e}"
    )
