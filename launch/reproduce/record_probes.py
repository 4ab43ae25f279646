"""Probe a run's teacher and its untrained network: `python -m launch.reproduce.record_probes RUN DATA OUT [IMAGES]`.

DATA has train/ and val/ with one folder per class; IMAGES (default: all) is the number of evenly spread training images
of the frozen probes, twice that of the others. k-NN, linear probes (frozen features with iBOT's 45 learning rates,
fresh crops), logistic regression, attentive probing and a short fine-tuning, each shortened to a minute or two; every
difference from the papers is in the reports. Also measured: throughput of feature extraction, cold and from its cache,
and of the learning-rate sweep against separate heads. The file OUT (JSON) is written after every probe.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import maskwise
from maskwise import build
from maskwise.bench import record
from maskwise.data.datasets.folder import Folder
from maskwise.data.datasets.subset import subsample_evenly
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.features import extract
from maskwise.evaluation.linear import SWEEP
from maskwise.evaluation.probes.linear_heads import HeadSpec, LinearHeads
from maskwise.recipe.reading import read_recipe

# evaluation, share of the training images, whether features come from the cache, options
PROBES = {
    "knn": ("knn", 1.0, True, {"k": [20]}),
    "linear, frozen, 45 rates": (
        "linear",
        1.0,
        True,
        {
            "preset": "ibot-sweep",
            "feature": "pooled",
            "augment": False,
            "epochs": 30,
            "evaluate_every": 10,
            "batch_size": 256,
        },
    ),
    "logistic": ("logistic", 1.0, True, {}),
    "attentive, simpool": (
        "attentive",
        0.5,
        False,
        {"epochs": 3, "warmup_epochs": 1, "lr": [1e-3, 1e-2], "batch_size": 128, "augment": False, "evaluate_every": 3},
    ),
    "linear, crops, simpool": (
        "linear",
        0.5,
        False,
        {"preset": "simpool", "epochs": 3, "lr": 0.3, "batch_size": 128, "evaluate_every": 3},
    ),
    "finetune, short": (
        "finetune",
        0.5,
        False,
        {
            "epochs": 2,
            "warmup_epochs": 0,
            "batch_size": 32,
            "lr": 8e-3,
            "repeats": 1,
            "mixup": 0.0,
            "cutmix": 0.0,
            "rand_augment": "none",
            "evaluate_every": 2,
        },
    ),
}


def extractor(encoder, data) -> dict:
    """Images per second of the extractor and of its cache, seconds to open the cache again."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in (
            ("fp32", {}),
            ("fp32, to a new cache", {"cache": folder}),
            ("from the cache", {"cache": folder}),
        ):
            start = time.perf_counter()
            bank = extract.extract(encoder, data, ("pooled", "patch_mean"), **options)
            rates[name] = round(len(bank) / (time.perf_counter() - start), 1)
    return rates


def sweep(encoder, data, steps: int = 5) -> dict:
    """Seconds of `steps` steps of 45 heads at once, and of the 45 one after the other."""
    bank = extract.extract(encoder, subsample_evenly(data, 1024), "pooled")
    x, y, classes = bank.pooled, bank.labels, len(data.classes)
    specs = [HeadSpec(lr) for lr in SWEEP]

    def seconds(heads) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            for head in heads:
                head.step(x, y)
        return time.perf_counter() - start

    together = seconds([LinearHeads(specs, x.shape[1], classes)])
    alone = seconds([LinearHeads([spec], x.shape[1], classes) for spec in specs])
    rate = round(steps * len(x) * len(specs) / together)
    return {
        "together_seconds": round(together, 3),
        "one_by_one_seconds": round(alone, 3),
        "head_images_per_second": rate,
        "width": x.shape[1],
        "batch": len(x),
    }


def measure(run: Path, folder: Path, out: Path, images: int | None) -> None:
    """Measure and write everything worth keeping, without paths of the machine."""
    data = {"train": Folder(folder, split="train"), "test": Folder(folder, split="val")}
    if images:
        data = {"train": subsample_evenly(data["train"], images), "test": subsample_evenly(data["test"], images)}
    encoders = {"trained": maskwise.load(run), "untrained": build.encoder(read_recipe(run))}
    result = {
        "record": record.describe(seed=0),
        "run": json.loads((run / "run.json").read_text(encoding="utf-8"))["recipe_hash"],
        "images": {role: len(images_of) for role, images_of in data.items()},
        "extractor_images_per_second": extractor(encoders["trained"], data["train"]),
        "sweep": sweep(encoders["trained"], data["train"]),
        "probes": {},
    }
    print(json.dumps({key: result[key] for key in ("extractor_images_per_second", "sweep")}), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for name, (row, share, cached, options) in PROBES.items():
            result["probes"][name] = {}
            given = {**data, "train": subsample_evenly(data["train"], round(share * len(data["train"])))}
            for who, encoder in encoders.items():
                report = EVALUATIONS[row](encoder, given, **options, **({"cache": cache} if cached else {}))
                top = {key: value for key, value in report.numbers.items() if not key.startswith("top1_lr")}
                result["probes"][name][who] = {
                    "numbers": top,
                    "cost": report.cost,
                    "differences": report.protocol.get("differences", []),
                }
                print(
                    f"{name:28} {who:10} top-1 {report.numbers['top1']:.1f}  {report.cost['seconds']:.0f} s", flush=True
                )
                record.write(out, result)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    measure(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) == 5 else None)
