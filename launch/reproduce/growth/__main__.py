"""Growth by ranks: `python -m launch.reproduce.growth predict` and `python -m launch.reproduce.growth measure`.

predict calculates bytes per step and the efficiency on 8 to 512 GPUs for assumed step times. measure runs 1, 2 and 4
ranks on this machine with the same batch each (five minutes on two idle cores). --json writes the file of results,
--markdown prints the tables of docs/performance.md with their sources.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "ssl"))

GPUS = (8, 16, 32, 64, 128, 256, 512)
# title: recipe, images of a GPU, assumed milliseconds of a step on one GPU (about 200 and 20 TFLOP/s)
CASES = {
    "DINO, ViT-S/16": ("dino/vits16_300ep", 64, (40, 400)),
    "DINO, ViT-B/16": ("dino/vitb16_400ep", 32, (80, 800)),
    "iBOT, ViT-S/16": ("ibot/vits16_800ep", 64, (40, 400)),
    "iBOT, ViT-B/16": ("ibot/vitb16_400ep", 32, (80, 800)),
}
MEASURED = ["pretrain/dino_vits16", "backbone.drop_path=0"]


def main(words: list[str] | None = None) -> int:
    """Run one of the commands."""
    options = parser().parse_args(words)
    if options.command == "rank":
        return rank(options)
    from launch.reproduce.growth import tables
    from maskwise.bench import record

    result = predicted(options) if options.command == "predict" else measured(options)
    if options.json:
        record.write(options.json, result)
    name = Path(options.json).name if options.json else f"growth_{options.command}.json"
    if options.command == "measure":
        print(tables.measured(result, name if options.markdown else None))
    else:
        print(tables.predicted_page(result, name) if options.markdown else tables.predicted(result))
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the options of the commands."""
    made = argparse.ArgumentParser(
        prog="python -m launch.reproduce.growth", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = made.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="bytes of a step, and efficiency on many GPUs")
    predict.add_argument("recipe", nargs="*", help="RECIPE key=value ... (default: DINO and iBOT, ViT-S/16 and B/16)")
    predict.add_argument("--step-ms", type=float, nargs="+", default=[40, 400], help="of a step on one GPU, assumed")
    predict.add_argument("--batch", type=int, default=64, help="images of a GPU (default: %(default)s)")
    predict.add_argument("--gpus", type=int, nargs="+", default=list(GPUS), help="1 node is 8 GPUs")
    measure = commands.add_parser("measure", help="weak scaling on this machine")
    measure.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    measure.add_argument("--turns", type=int, default=2)
    each = commands.add_parser("rank", help="one rank of measure")
    for command in (measure, each):
        command.add_argument("recipe", nargs="*", default=MEASURED, help="RECIPE key=value ...")
        command.add_argument("--steps", type=int, default=6, help="timed steps of a turn (default: %(default)s)")
        command.add_argument("--batch", type=int, default=1, help="images of a rank (default: %(default)s)")
    for command in (predict, measure):
        command.add_argument("--json", help="the file to write")
        command.add_argument("--markdown", action="store_true", help="print tables with their sources")
    return made


def predicted(options) -> dict:
    """Return traffic and predicted efficiency of the cases, or of the recipe that is given."""
    from launch.reproduce.growth import efficiency
    from maskwise.bench import record

    about = {**record.describe(seed=0), "note": "calculated for assumed step times, not measured"}
    assumed, cases = efficiency.Assumptions(), {}
    chosen = CASES
    if options.recipe:
        chosen = {options.recipe[0]: (options.recipe, options.batch, tuple(options.step_ms))}
    for title, (recipe, images, step_ms) in chosen.items():
        words = [recipe] if isinstance(recipe, str) else recipe
        cases[title] = predicted_case(words, images, step_ms, options.gpus, assumed)
    return {
        "record": about,
        "assumptions": dataclasses.asdict(assumed),
        "interconnects": {
            "NVLink 4": {"title": "NVLink 4, in a node", "bytes": efficiency.NVLINK},
            **{name: dataclasses.asdict(link) for name, link in efficiency.INTERCONNECTS.items()},
        },
        "cases": cases,
    }


def predicted_case(words: list[str], images: int, step_ms, gpus: list[int], assumed) -> dict:
    """Return the traffic of a recipe, and its efficiency by interconnect and step time."""
    from launch.reproduce.growth import efficiency
    from launch.reproduce.growth.traffic import as_rows, step_traffic, trainable, wire_bytes
    from maskwise.build.networks import method as build_method
    from maskwise.distributed.world import World
    from maskwise.recipe.reading import read_recipe

    def recipe_of(ranks: int):
        return read_recipe(*words, f"train.batch_size={images * ranks}", try_model=False)

    method = build_method(recipe_of(1), World(), "fp32", classes=1000)
    traffic = step_traffic(recipe_of(8), method, 8, packed=True)
    head = {*method.student.head.parameters()}
    result = {
        "recipe": words,
        "images": images,
        "gradients_bytes": sum(weight.nbytes for weight in trainable(method)),
        "head_gradients_bytes": sum(weight.nbytes for weight in trainable(method) if weight in head),
        "others_bytes": sum(volume.bytes for key, volume in traffic.items() if key.purpose != "gradients"),
        "sent_bytes": wire_bytes(traffic),
        "buckets": len(efficiency.buckets(method)),
        "traffic_of_8": as_rows(traffic),
        "efficiency": {},
    }
    for milliseconds in step_ms:
        for name, link in efficiency.INTERCONNECTS.items():
            for ranks in gpus:
                row = "NVLink 4" if ranks <= efficiency.NODE else name
                made = efficiency.predict(recipe_of(ranks), method, ranks, link, milliseconds / 1e3, assumed)
                result["efficiency"].setdefault(f"{row}, {milliseconds:g} ms", {})[str(ranks)] = made
    return result


def measured(options) -> dict:
    """Return the weak scaling of a recipe on this machine."""
    from launch.reproduce.growth import weak_scaling
    from maskwise.bench import record

    about = record.describe(seed=0)  # with the machine's load before the ranks start
    words = options.recipe
    result = weak_scaling.measure(words, options.ranks, options.steps, options.batch, options.turns)
    about["threads"] = 1
    return {"record": about, "recipe": words, "batch": options.batch, "turns": options.turns, **result}


def rank(options) -> int:
    """Print what one rank measures as a line of JSON."""
    from launch.reproduce.growth import weak_scaling

    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # what libraries print must not mix with the answer
    print(json.dumps(weak_scaling.run_rank(options.recipe, options.steps, options.batch)), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    status = main()
    if "rank" in sys.argv[1:2]:
        from maskwise.process.ending import end_process

        end_process(status)
    raise SystemExit(status)
