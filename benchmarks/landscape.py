"""The landscape of poolings on real images: `python -m benchmarks.landscape --packs ../shared/data --out docs/results/landscape_cpu.json`.

Packs are cifar10-jpeg-small and imagenette224-core, with --profile gpu tinyimagenet100; they are unpacked into --work. Every pooling is trained
by the library's own loop from a recipe beside this file, three seeds each; only pooling and seed differ. --profile map does so for the
steps from average pooling to MAP. Seeds go round before poolings repeat, each finished run is written into the JSON at once, and the same command goes on where it was cut; after
--minutes no further run begins. --processes runs as many side by side, one thread each. Then, or with --report alone, a
table (.md) and a plot (.png) are written beside the JSON. --miniature does all that with a few steps, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "ssl"))

# SimPool's exponent of convolutional networks; with CaiT's own 1e-5 a run of minutes ends at chance, its token not having seen the image
OPTIONS = {"simpool": ("pooling.gamma=2.0",), "cait": ("pooling.layer_scale=0.1",)}
LANDSCAPE = {
    name: (f"pooling.name={name}", *OPTIONS.get(name, ()))
    for name in ("gap", "max", "gap_max", "gem", "lse", "how", "otk", "kmeans", "slot", "se", "cbam", "ge", "vit", "cait", "simpool")
}
# the paper's figures are those of ResNet-18 on a fifth of ImageNet-1k, 100 epochs (pooling.md 2.2)
PAPER = {"gap": 55.0, "max": 53.9, "gem": 55.9, "lse": 55.3, "how": 54.8, "otk": 55.9, "kmeans": 55.4, "slot": 56.7, "se": 55.7, "cbam": 55.6, "vit": 56.1,
         "cait": 56.7, "simpool": 57.1}  # fmt: skip
ONE = ("classifier.groups=1", "classifier.tokens=1", "classifier.average=null", "classifier.intra=0", "classifier.inter=0")
STEPS_OF_MAP = {
    "gap": ("classifier=linear",),
    "cap": (*ONE, "classifier.layers=[3]", "classifier.gram=false", "classifier.gram_width=null", "classifier.gram_groups=null", "classifier.dim=128", "classifier.embed=128", "classifier.heads=4"),
    "token": ONE,
    "tokens": ("classifier.intra=0", "classifier.inter=0"),
    "intra": ("classifier.inter=0",),
    "inter": (),
}  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """Rows trained alike: a recipe beside this file, the pack it reads, what is changed for all and for each row, the number of a report that is
    told, the part of the network whose weights are counted, and what a paper has for the rows."""

    title: str
    recipe: str
    pack: str
    words: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    report: str = "top1"
    number: str = "top1"
    part: str = "pooling"
    paper: tuple[str, Mapping[str, float]] | None = ("ImageNet-20 %", PAPER)
    seeds: tuple[int, ...] = (0, 1, 2)


CIFAR = Experiment("CIFAR-10 at 32 px, ResNet of 3 blocks", "landscape_supervised", "cifar10-jpeg-small", ("train.epochs=2",), LANDSCAPE)
IMAGENETTE = Experiment(
    "Imagenette at 64 px, ResNet of 3 blocks", "landscape_supervised", "imagenette224-core",
    ("train.epochs=4", "train.batch_size=32", "data.per_class=160", "data.side=72", "augment.size=64", "augment.scale=[0.35,1.0]", "backbone.output_stride=16", "evaluate.crop_pct=0.889"), LANDSCAPE,
)  # fmt: skip
DINO = Experiment(
    "CIFAR-10 at 32 px, DINO, ViT of 3 blocks", "landscape_dino", "cifar10-jpeg-small", (), {name: (f"pooling.name={name}",) for name in ("cls", "gap", "simpool")},
    "knn", "pooled_top1_k20", paper=None,
)  # fmt: skip
MAP = Experiment(
    "CIFAR-10 at 32 px, ResNet of 3 blocks, MAP step by step", "landscape_map", "cifar10-jpeg-small", (), STEPS_OF_MAP,
    part="classifier", paper=("ImageNet, ResNet-50", {"gap": 77.1, "cap": 78.5, "token": 78.5, "intra": 80.2, "inter": 80.7}),
)  # fmt: skip
TINY = Experiment(
    "Tiny-ImageNet-100 at 64 px, ResNet-18", "landscape_supervised", "tinyimagenet100",
    ("train.epochs=40", "train.batch_size=256", "augment.size=64", "augment.scale=[0.25,1.0]", "augment.jitter=0.4", "augment.smoothing=0.1",
     "backbone.channels=[64,128,256,512]", "backbone.layers=[2,2,2,2]", "backbone.output_stride=8", "optimizer.lr=0.1", "optimizer.warmup_epochs=2",
     "train.precision=auto", "speed.workers=auto"), LANDSCAPE,
)  # fmt: skip
PROFILES = {"cpu": {"cifar": CIFAR, "imagenette": IMAGENETTE, "dino": DINO}, "map": {"steps": MAP}, "gpu": {"tinyimagenet": TINY}}
FEW = ("data.per_class=12", "train.steps=2", "train.batch_size=8", "optimizer.warmup_epochs=0")
SMALL = {
    "landscape_supervised": (*FEW, "backbone.channels=[8,8,8]", "speed.workers=0"),
    "landscape_map": (*FEW, "speed.workers=0"),
    "landscape_dino": (*FEW, "backbone.embed_dim=16", "backbone.depth=1", "head.prototypes=16"),
}
PARTS = {"pooling": "student.encoder.pooling.", "classifier": "student.head."}


@dataclass(frozen=True)
class Task:
    """One run: an experiment's row and seed."""

    experiment: str
    row: str
    seed: int
    recipe: str
    words: tuple[str, ...]
    report: str
    part: str

    @property
    def key(self) -> str:
        """What names its result in the JSON."""
        return f"{self.experiment}/{self.row}/{self.seed}"


def tasks(profile: str, packs: dict[str, Path], seeds: int | None = None, rows: tuple[str, ...] | None = None, miniature: bool = False) -> Iterator[Task]:
    """All runs of a profile: a seed of every experiment and row, then the next seed."""
    for seed in range(3 if seeds is None else seeds):
        for name, each in PROFILES[profile].items():
            for row, own in each.rows.items():
                if seed in each.seeds and (rows is None or row in rows):
                    small = SMALL[each.recipe] if miniature else ()
                    words = ("data.name=benchmarks.kept:Kept", f"data.path={packs[each.pack]}", f"seed={seed}", *own, *each.words, *small)
                    yield Task(name, row, seed, str(HERE / f"{each.recipe}.yaml"), words, each.report, each.part)


def run(task: Task, work: str) -> dict:
    """Train one, in a folder of its own that an interrupted run is continued from -> its line of the JSON."""
    import torch

    import maskwise
    from maskwise.engine.journal import read_metrics
    from maskwise.recipe import read_recipe

    os.environ["MASKWISE_MODULES"] = "benchmarks.kept"  # for the recipes that runs leave in their folders
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    recipe, folder = read_recipe(task.recipe, *task.words), Path(work) / task.key.replace("/", "-")
    begin = time.perf_counter()
    maskwise.train(recipe, out=folder, quiet=True)
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    line = {
        "numbers": next(line["numbers"] for line in reversed(lines) if line.get("report") == task.report), "loss": steps[-1]["loss"], "steps": steps[-1]["step"],
        f"{task.part}_parameters": weights(folder, PARTS[task.part]), "seconds": round(time.perf_counter() - begin, 1),
        "batch_size": recipe.train.batch_size, "recipe_hash": recipe.hash(), "device": "cuda" if torch.cuda.is_available() else "cpu",
    }  # fmt: skip
    shutil.rmtree(folder)
    return line


def weights(folder: Path, part: str) -> int:
    """How many learned numbers a run's last checkpoint has under a name."""
    from safetensors import safe_open

    last = folder / "checkpoints" / (folder / "checkpoints" / "last").read_text().strip()
    with safe_open(last / "model.safetensors", "np") as held:
        names = [name for name in held.keys() if name.startswith(part) and not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
        return sum(math.prod(held.get_slice(name).get_shape()) for name in names)


def measure(todo: list[Task], out: Path, work: Path, processes: int, minutes: float | None, profile: str = "cpu") -> int:
    """Run what the JSON lacks, `processes` at a time; each result is kept as it comes -> how many are left."""
    found = read(out, profile)
    waiting = [task for task in todo if task.key not in found["runs"]]
    begin = time.monotonic()
    before = found.get("minutes", 0.0)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running: dict = {}
        while waiting or running:
            while waiting and len(running) < processes and (minutes is None or time.monotonic() - begin < 60 * minutes):
                task = waiting.pop(0)
                running[pool.submit(run, task, str(work))] = task
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(done)
                found["runs"][task.key] = done.result()
                found |= {"minutes": round(before + (time.monotonic() - begin) / 60, 1), "processes": processes}
                keep(found, out)
                numbers = found["runs"][task.key]["numbers"]
                print(f"{task.key:<28} {next(iter(numbers.values())):6.2f}  {found['runs'][task.key]['seconds']:6.1f} s  {len(waiting)} to begin", flush=True)
    return len(waiting)


def read(out: Path, profile: str = "cpu") -> dict:
    """What was measured before, or the beginning of it."""
    if out.is_file():
        return json.loads(out.read_text())
    import torch

    from maskwise.run_record import commit

    versions = {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.machine()}
    return {"date": str(date.today()), "command": f"python -m benchmarks.landscape --profile {profile}", "commit": commit(), "versions": versions, "runs": {}}


def keep(found: dict, out: Path) -> None:
    """Write the JSON aside and put it in place."""
    aside = out.with_name(f".{out.name}.aside")
    aside.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(aside, out)


def told(found: dict, profile: str) -> str:
    """Tables of means and spreads over seeds, Markdown."""
    parts = [f"# Poolings side by side ({profile})", "", f"`{found['command']}`, {found['date']}, commit {str(found['commit'])[:12]}, "
             f"{found.get('minutes', 0)} minutes in all, runs at a time: {found.get('processes', 1)}. Mean and spread (half the range) over seeds; seconds of one run."]  # fmt: skip
    for name, each in PROFILES[profile].items():
        rows = samples(found, name, each)
        if not rows:
            continue
        what = "k-NN (k = 20) of the teacher" if each.report == "knn" else "top-1"
        heads = [each.part, f"{what}, %", "spread", "seeds", f"weights of the {each.part}", "seconds", *([f"paper, {each.paper[0]}"] if each.paper else [])]
        parts += ["", f"## {each.title}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for row, values in sorted(rows.items(), key=lambda row: -statistics.mean(row[1])):
            lines = [found["runs"][f"{name}/{row}/{seed}"] for seed in each.seeds if f"{name}/{row}/{seed}" in found["runs"]]
            seconds = statistics.mean(line["seconds"] for line in lines)
            cells = [f"`{row}`", f"{statistics.mean(values):.2f}", f"{(max(values) - min(values)) / 2:.2f}", len(values), f"{lines[0][f'{each.part}_parameters']:,}", f"{seconds:.0f}"]
            parts.append("| " + " | ".join(map(str, [*cells, *([each.paper[1].get(row, "-")] if each.paper else [])])) + " |")
    return "\n".join(parts) + "\n"


def samples(found: dict, name: str, each: Experiment) -> dict[str, list[float]]:
    """The numbers of every row of an experiment, a seed each."""
    rows = {row: [found["runs"][key]["numbers"][each.number] for seed in each.seeds if (key := f"{name}/{row}/{seed}") in found["runs"]] for row in each.rows}
    return {row: values for row, values in rows.items() if values}


def report(out: Path, profile: str) -> None:
    """Write table and plot beside the JSON."""
    import numpy as np

    from maskwise.functional.draw import write_png
    from maskwise.functional.plots import ranges

    found = read(out)
    out.with_suffix(".md").write_text(told(found, profile))
    charts = [ranges(rows, each.title) for name, each in PROFILES[profile].items() if (rows := samples(found, name, each))]
    if charts:
        wide = max(chart.shape[1] for chart in charts)
        write_png(out.with_suffix(".png"), np.concatenate([np.pad(chart, ((0, 0), (0, wide - chart.shape[1]), (0, 0)), constant_values=255) for chart in charts]))


def main(words: list[str] | None = None) -> int:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, help="the folder of the .tar.xz packs")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; table and plot stand beside it")
    parser.add_argument("--profile", choices=PROFILES, default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="runs side by side, one thread each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no run after that long (default: all)")
    parser.add_argument("--seeds", type=int, help="how many of the three (default: all)")
    parser.add_argument("--rows", help="only these, such as gap,simpool")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "maskwise-landscape", help="where packs and unfinished runs lie (default: %(default)s)")
    parser.add_argument("--miniature", action="store_true", help="two steps of a tiny network each")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    given = parser.parse_args(words)
    left = 0
    if not given.report:
        if given.packs is None:
            parser.error("give --packs FOLDER, or --report for what is measured already")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        chosen = tuple(given.rows.split(",")) if given.rows else None
        from benchmarks.evaluate_packs import unpack

        packs = {each.pack: unpack(given.packs / f"{each.pack}.tar.xz", given.work).resolve() for each in PROFILES[given.profile].values()}
        todo = list(tasks(given.profile, packs, given.seeds, chosen, given.miniature))
        left = measure(todo, given.out, given.work, given.processes, given.minutes, given.profile)
    report(given.out, given.profile)
    print(f"{given.out.with_suffix('.md')}: " + (f"{left} runs left; the same command goes on" if left else "complete"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
