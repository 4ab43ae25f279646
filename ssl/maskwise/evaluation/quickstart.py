"""The story of a run: what it learnt beside the lines it must beat, in a table, two pictures and one screen."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from maskwise.data.subset import evenly
from maskwise.evaluation.hiding import hiding
from maskwise.evaluation.knn import knn
from maskwise.evaluation.pictures import attention_sheet, curves
from maskwise.evaluation.report import Report
from maskwise.functional.draw import write_png
from maskwise.methods.masking import MASKINGS

MASKED = {"attmask-high": "attmask_high", "attmask-hint": "attmask_hint", "random": "random", "block-wise": "block"}
K, RATIO, SHOWN = 20, 0.3, 8


@dataclasses.dataclass
class Story(Report):
    """A report whose text is the last screen."""

    screen: str = ""

    def __str__(self) -> str:
        return self.screen


def quickstart(encoder, untrained, run_folder, data: dict, *, bank: int = 1024, queries: int = 512) -> Story:
    """Compare a trained encoder with its untrained self, raw pixels and chance; draw it; save it -> Story.

    data: {"train", "test"}, evenly thinned to `bank` and `queries` images; labels give the k-NN, `.mask` gives the share of
    hidden patches on objects. Writes reports/quickstart.json, pictures/sheet.png and pictures/curves.png in the run folder.
    """
    begin = time.perf_counter()
    folder = Path(run_folder)
    few = {"train": evenly(data["train"], bank), "test": evenly(data["test"], queries)}
    numbers, protocol, corrupt, digest = {}, {"evaluation": "quickstart"}, {}, few["test"].fingerprint()
    if few["train"].labels is not None and few["test"].labels is not None:
        side = int(encoder.image_size[0]) if hasattr(encoder, "image_size") else 32
        for who, report in (("teacher", knn(encoder, few, k=K, pixels=min(side, 96))), ("untrained", knn(untrained, few, k=K))):
            k = report.protocol["headline_k"]
            numbers |= {f"knn_{who}_{name}": report.numbers[f"{name}_top1_k{k}"] for name in ("pooled", "patch_mean")}
            if who == "teacher":
                numbers["knn_pixels"] = report.numbers[f"pixels_top1_k{k}"]
                protocol["knn"], corrupt, digest = report.protocol, report.corrupt, report.data_hash
        numbers["knn_chance"] = 100.0 / len(few["test"].labels.unique())
    if hasattr(few["test"], "mask"):
        report = hiding(encoder, few["test"], untrained=untrained, ratio=RATIO)
        numbers |= {f"hidden_{name}": value for name, value in report.numbers.items()}
        protocol["hiding"] = report.protocol
    pictures = {"sheet.png": sheet(encoder, untrained, data["test"])}
    if (folder / "metrics.jsonl").is_file():
        pictures["curves.png"] = curves(folder / "metrics.jsonl")
    for name, picture in pictures.items():
        write_png(folder / "pictures" / name, picture)
    cost = {"seconds": round(time.perf_counter() - begin, 1), "device": str(next(encoder.parameters()).device)}
    story = Story(numbers, protocol, digest, cost, corrupt)
    Report(numbers, protocol, digest, cost, corrupt).save(folder / "reports" / "quickstart.json")
    story.screen = "\n\n".join([*tables(story), places(folder), next_steps(folder)])
    return story


def sheet(encoder, untrained, dataset):
    """Some test images, both attentions, and what each masking hides -> uint8 [H, W, 3]."""
    images = torch.stack([encoder.uncoloured(dataset.image(i)) for i in range(min(SHOWN, len(dataset)))])
    rules = {title: MASKINGS[name](ratio=RATIO, var=0.0, prob=1.0) for title, name in MASKED.items()}
    return attention_sheet(encoder, images, rules, torch.arange(len(images)), untrained=untrained)


def tables(report: Report) -> list[str]:
    """The numbers as two small tables."""
    found, numbers = [], report.numbers
    if "knn_teacher_pooled" in numbers:
        about = report.protocol["knn"]
        found.append(
            f"k-NN top-1, per cent (k = {about['headline_k']}, {about['bank']} images vote, {about['queries']} are asked; chance {numbers['knn_chance']:.1f})\n"
            f"                                 pooled   mean patch\n"
            f"  trained teacher               {numbers['knn_teacher_pooled']:7.1f}   {numbers['knn_teacher_patch_mean']:10.1f}\n"
            f"  untrained network             {numbers['knn_untrained_pooled']:7.1f}   {numbers['knn_untrained_patch_mean']:10.1f}\n"
            f"  raw pixels                    {numbers['knn_pixels']:7.1f}"
        )
    if "hidden_chance" in numbers:
        rows = {
            "AttMask-High, trained teacher": "attmask_high", "AttMask-Hint, trained teacher": "attmask_hint",
            "AttMask-High, untrained": "attmask_high_untrained", "random": "random", "block-wise": "block",
            "chance (area of the objects)": "chance",
        }  # fmt: skip
        lines = [f"  {title:<32}{numbers[f'hidden_{name}']:5.1f}" for title, name in rows.items() if f"hidden_{name}" in numbers]
        share = f"Share of hidden patches that lie on objects, per cent ({100 * report.protocol['hiding']['ratio']:.0f} % of the patches hidden)"
        found.append("\n".join([share, *lines]))
    return found


def places(folder: Path) -> str:
    """Where everything is."""
    known = {
        "pictures/sheet.png": "images, attention before and after training, masks",
        "pictures/curves.png": "training curves (tensorboard --logdir shows more)",
        "reports/quickstart.json": "the numbers above and their protocol",
        "exported": 'the encoder: maskwise.load("...") or any safetensors reader',
        "recipe.yaml": "the recipe with every value",
        "checkpoints": "to continue from",
    }
    lines = [f"  {str(folder / name):<42}  {what}" for name, what in known.items() if (folder / name).exists()]
    return "\n".join(["Where everything is", *lines])


def next_steps(folder: Path) -> str:
    """What to try next."""
    return (
        "What to try next\n"
        "  . .venv/bin/activate\n"
        f"  maskwise look {folder} YOUR.jpg --out look.png          # where it looks in your image\n"
        f"  maskwise train {folder / 'recipe.yaml'} --out runs/random masking.name=random    # does it matter what is hidden?\n"
        "  maskwise train pretrain/attmask_hint_vits16 --out runs/mine data.path=YOUR_IMAGES    # your own images\n"
        "  maskwise evaluate knn runs/mine train=LABELLED/train test=LABELLED/val"
    )
