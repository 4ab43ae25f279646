"""Probe a run's teacher beside its untrained self: `python benchmarks/record_probes.py RUN DATA docs/results/NAME.json [IMAGES]`.

DATA holds train/ and val/ with one folder per class; IMAGES (default: all) is how many evenly spread training images the frozen probes
see, the others see half of that. k-NN, linear probes (frozen features with iBOT's 45 learning rates, fresh crops), logistic regression,
attentive probing and a short fine-tuning, shortened to a minute or two; every difference from the papers is in the reports. Beside them
the throughput of the extractor, cold and from its cache, and of the sweep against its heads one by one. Written after every probe.
"""

import json
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

import maskwise
from maskwise import build, run_record
from maskwise.data.datasets import Folder
from maskwise.data.subset import evenly
from maskwise.evaluation import EVALUATIONS, features
from maskwise.evaluation.linear import SWEEP
from maskwise.evaluation.linear_heads import HeadSpec, LinearHeads
from maskwise.recipe import read_recipe

# evaluation, share of the training images, whether features come from the cache, options
PROBES = {
    "knn": ("knn", 1.0, True, {"k": [20]}),
    "linear, frozen, 45 rates": ("linear", 1.0, True, {"preset": "ibot-sweep", "feature": "pooled", "augment": False, "epochs": 30, "evaluate_every": 10, "batch_size": 256}),
    "logistic": ("logistic", 1.0, True, {}),
    "attentive, simpool": ("attentive", 0.5, False, {"epochs": 3, "warmup_epochs": 1, "lr": [1e-3, 1e-2], "batch_size": 128, "augment": False, "evaluate_every": 3}),
    "linear, crops, simpool": ("linear", 0.5, False, {"preset": "simpool", "epochs": 3, "lr": 0.3, "batch_size": 128, "evaluate_every": 3}),
    "finetune, short": ("finetune", 0.5, False, {"epochs": 2, "warmup_epochs": 0, "batch_size": 32, "lr": 8e-3, "repeats": 1, "mixup": 0.0, "cutmix": 0.0,
                                                 "rand_augment": "none", "evaluate_every": 2}),
}  # fmt: skip


def extractor(encoder, data) -> dict:
    """Images per second of the extractor and of its cache, seconds to open the cache again."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in (("fp32", {}), ("fp32, to a new cache", {"cache": folder}), ("from the cache", {"cache": folder})):
            start = time.perf_counter()
            bank = features.extract(encoder, data, ("pooled", "patch_mean"), **options)
            found[name] = round(len(bank) / (time.perf_counter() - start), 1)
    return found


def sweep(encoder, data, steps: int = 5) -> dict:
    """Seconds of `steps` steps of 45 heads at once, and of the 45 one after the other."""
    bank = features.extract(encoder, evenly(data, 1024), "pooled")
    x, y, classes = bank.pooled, bank.labels, len(data.classes)
    specs = [HeadSpec(lr) for lr in SWEEP]

    def seconds(heads) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            for each in heads:
                each.step(x, y)
        return time.perf_counter() - start

    together = seconds([LinearHeads(specs, x.shape[1], classes)])
    alone = seconds([LinearHeads([spec], x.shape[1], classes) for spec in specs])
    rate = round(steps * len(x) * len(specs) / together)
    return {"together_seconds": round(together, 3), "one_by_one_seconds": round(alone, 3), "head_images_per_second": rate, "width": x.shape[1], "batch": len(x)}


def record(run: Path, folder: Path, out: Path, images: int | None) -> None:
    """Measure and write everything worth keeping, without paths of the machine."""
    data = {"train": Folder(folder, split="train"), "test": Folder(folder, split="val")}
    if images:
        data = {"train": evenly(data["train"], images), "test": evenly(data["test"], images)}
    encoders = {"trained": maskwise.load(run), "untrained": build.encoder(read_recipe(run))}
    result = {
        "date": str(date.today()), "commit": run_record.commit(), "run": json.loads((run / "run.json").read_text())["recipe_hash"],
        "device": run_record.device_name(torch.device("cpu")), "threads": torch.get_num_threads(), "versions": {"torch": torch.__version__, "platform": platform.machine()},
        "images": {role: len(found) for role, found in data.items()},
        "extractor_images_per_second": extractor(encoders["trained"], data["train"]), "sweep": sweep(encoders["trained"], data["train"]), "probes": {},
    }  # fmt: skip
    print(json.dumps({key: result[key] for key in ("extractor_images_per_second", "sweep")}), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for name, (row, share, cached, options) in PROBES.items():
            result["probes"][name] = {}
            given = {**data, "train": evenly(data["train"], round(share * len(data["train"])))}
            for who, encoder in encoders.items():
                report = EVALUATIONS[row](encoder, given, **options, **({"cache": cache} if cached else {}))
                top = {key: value for key, value in report.numbers.items() if not key.startswith("top1_lr")}
                result["probes"][name][who] = {"numbers": top, "cost": report.cost, "differences": report.protocol.get("differences", [])}
                print(f"{name:28} {who:10} top-1 {report.numbers['top1']:.1f}  {report.cost['seconds']:.0f} s", flush=True)
                out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    record(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) == 5 else None)
