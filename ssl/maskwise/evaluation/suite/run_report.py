"""Report of a finished run: k-NN and mask overlap against baselines, as tables and pictures."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from maskwise.data.datasets.subset import subsample_evenly
from maskwise.engine.atomic_file import write_error
from maskwise.errors import UserError
from maskwise.evaluation.baselines import baselines
from maskwise.evaluation.knn import knn
from maskwise.evaluation.mask_overlap import mask_overlap
from maskwise.evaluation.report import Report
from maskwise.evaluation.suite.attention_sheets import attention_sheet, curves
from maskwise.imaging.drawing import write_png
from maskwise.methods.masking import MASKINGS
from maskwise.process.progress import titled
from maskwise.process.streams import print_notice

SHEET_MASKINGS = ("attmask_high", "attmask_hint", "random", "block")
K, RATIO = 20, 0.3
SHEET_IMAGES = 8
OVERLAP_ROWS = {
    "attmask_high": "attmask_high, trained teacher",
    "attmask_hint": "attmask_hint, trained teacher",
    "attmask_high_untrained": "attmask_high, untrained",
    "random": "random",
    "block": "block",
    "chance": "chance (area of the objects)",
    "best": "if masks took objects first",
}
PIXEL_ROWS = {"knn_pixels": "raw pixels", "knn_whitened_pixels": "whitened pixels"}
FILES = {
    "pictures/sheet.png": "images, attention before and after training, masks",
    "pictures/curves.png": "training curves (tensorboard --logdir shows more)",
    "reports/run_report.json": "the numbers above and their protocol",
    "exported": 'the encoder: maskwise.load("...") or any safetensors reader',
    "recipe.yaml": "the recipe with every value",
    "checkpoints": "to continue the run",
}


@dataclasses.dataclass
class RunReport(Report):
    """A report with its text for the console."""

    text: str = ""

    def __str__(self) -> str:
        return self.text


def run_report(encoder, untrained, run_folder, data: dict, *, bank: int = 4096, queries: int = 1024) -> RunReport:
    """Compare a trained encoder with its untrained weights, pixels and chance -> RunReport, in per cent.

    data: {"train", "test"}, evenly subsampled to `bank` and `queries` images; k-NN needs labels, the share of masked
    patches on objects needs `.mask`. Writes reports/run_report.json, pictures/sheet.png and pictures/curves.png in the
    run folder.
    """
    begin = time.perf_counter()
    folder = Path(run_folder)
    subset = {"train": subsample_evenly(data["train"], bank), "test": subsample_evenly(data["test"], queries)}
    numbers, protocol, corrupt = {}, {"evaluation": "run_report"}, {}
    data_hash = subset["test"].fingerprint()
    if subset["train"].labels is not None and subset["test"].labels is not None:
        by_knn, trivial = knn_numbers(encoder, untrained, subset, numbers)
        protocol |= {"knn": by_knn.protocol, "baselines": trivial.protocol}
        corrupt, data_hash = by_knn.corrupt, by_knn.data_hash
    if hasattr(subset["test"], "mask"):
        overlap = mask_overlap(encoder, subset["test"], untrained=untrained, ratio=RATIO, maskings=SHEET_MASKINGS)
        numbers |= {f"hidden_{name}": value for name, value in overlap.numbers.items()}
        protocol["mask_overlap"] = overlap.protocol
    pictures = {"sheet.png": sheet(encoder, untrained, data["test"])}
    if (folder / "metrics.jsonl").is_file():
        pictures["curves.png"] = curves(folder / "metrics.jsonl")
    cost = {"seconds": round(time.perf_counter() - begin, 1), "device": str(next(encoder.parameters()).device)}
    report = RunReport(numbers, protocol, data_hash, cost, corrupt)
    try:
        for name, picture in pictures.items():
            write_png(folder / "pictures" / name, picture)
        report.save(folder / "reports" / "run_report.json")
    except (OSError, UserError) as error:  # a folder that cannot be written can be reported on
        text = str(error) if isinstance(error, UserError) else write_error(folder / "pictures", error)
        print_notice(f"{text}; the report is not saved there")
    report.text = "\n\n".join([*tables(report), files(folder), next_steps(folder)])
    return report


def knn_numbers(encoder, untrained, data: dict, numbers: dict) -> tuple[Report, Report]:
    """Add the k-NN accuracies of the trained encoder and of its baselines to `numbers` -> both reports."""
    with titled("k-NN"):
        trained = knn(encoder, data, k=K)
    with titled("k-NN baselines"):
        trivial = baselines(data, untrained=untrained, k=K)
    k = trained.protocol["headline_k"]
    for name in ("pooled", "patch_mean"):
        numbers[f"knn_teacher_{name}"] = trained.numbers[f"{name}_top1_k{k}"]
    ending = f"_top1_k{k}"
    numbers |= {f"knn_{key.removesuffix(ending)}": value for key, value in trivial.numbers.items()}
    return trained, trivial


def sheet(encoder, untrained, dataset):
    """Draw some test images, the attention of both encoders and the mask of each masking -> uint8 [H, W, 3]."""
    images = torch.stack([encoder.uint8_crop(dataset.image(i)) for i in range(min(SHEET_IMAGES, len(dataset)))])
    maskings = {name: MASKINGS[name](ratio=RATIO, var=0.0, prob=1.0) for name in SHEET_MASKINGS}
    return attention_sheet(encoder, images, maskings, torch.arange(len(images)), untrained=untrained)


def tables(report: Report) -> list[str]:
    """Return the numbers as text tables: k-NN accuracy, and overlap of masks with objects."""
    texts, numbers = [], report.numbers
    if "knn_teacher_pooled" in numbers:
        setup = report.protocol["knn"]
        title = (
            f"k-NN top-1, per cent (k = {setup['headline_k']}, bank of {setup['bank']} images, "
            f"{setup['queries']} queries; chance {numbers['knn_chance']:.1f})"
        )
        lines = [title, f"  {'':<30}{'pooled':>7}   {'mean patch':>10}"]
        for row, network in (("trained teacher", "teacher"), ("untrained network", "untrained")):
            pooled, patch_mean = numbers[f"knn_{network}_pooled"], numbers[f"knn_{network}_patch_mean"]
            lines.append(f"  {row:<30}{pooled:7.1f}   {patch_mean:10.1f}")
        for key, row in PIXEL_ROWS.items():
            if key in numbers:
                lines.append(f"  {row:<30}{numbers[key]:7.1f}")
        texts.append("\n".join(lines))
    if "hidden_chance" in numbers:
        ratio = 100 * report.protocol["mask_overlap"]["ratio"]
        lines = [f"Share of masked patches that lie on objects, per cent ({ratio:.0f} % of the patches are masked)"]
        for name, row in OVERLAP_ROWS.items():
            if f"hidden_{name}" in numbers:
                lines.append(f"  {row:<32}{numbers[f'hidden_{name}']:5.1f}")
        texts.append("\n".join(lines))
    return texts


def files(folder: Path) -> str:
    """List the files of the run that exist, with their contents."""
    paths = {str(folder / name): content for name, content in FILES.items() if (folder / name).exists()}
    width = max(map(len, paths), default=0)
    return "\n".join(["Files", *(f"  {path:<{width}}  {content}" for path, content in paths.items())])


def next_steps(folder: Path) -> str:
    """Return commands to try next."""
    return (
        "Next steps\n"
        "  . .venv/bin/activate\n"
        f"  maskwise look {folder} YOUR.jpg --out look.png    # attention in your image\n"
        f"  maskwise train {folder / 'recipe.yaml'} --out runs/random masking.name=random    # random masks\n"
        "  maskwise train pretrain/attmask_hint_vits16 --out runs/mine data.path=YOUR_IMAGES    # your own images\n"
        "  maskwise evaluate knn runs/mine train=LABELED/train test=LABELED/val"
    )
