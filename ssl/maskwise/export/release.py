"""Handing an encoder out: a run, a folder, a file or an encoder in memory becomes an exported folder or a repository on the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from maskwise.export import folder as exported
from maskwise.export import hub, layouts, trained_classifier
from maskwise.export.about import UNKNOWN, About, about_run
from maskwise.functional.errors import UserError
from maskwise.nn.backbone import read_tensors
from maskwise.nn.encoder import Encoder

PICTURES = ("run", "shapes")


def export(
    model,
    folder,
    *,
    weights: str = "teacher",
    heads: bool = False,
    light: bool = False,
    onnx: Sequence[str] = (),
    licence: str = UNKNOWN,
    datasets: Sequence[str] = (),
    base_model: str | None = None,
    picture: str = "run",
    name: str | None = None,
    address: str | None = None,
    reports: Sequence = (),
    say: Callable[[str], None] | None = print,
) -> Path:
    """Write an encoder, or what `maskwise.load` accepts, as a folder that opens in timm, transformers and `maskwise.load`.

    What a run of method supervised has learnt of labels comes along, `light` without the tokens' heads of classifier map (MAP-light).
    `weights`: "teacher" or "student" of a run. `heads` adds its projection head and centers. `onnx`: programs to add, of
    "onnx", "onnx-attention" and "pt2". `licence`, `datasets` and `base_model` go into the card, `name` is its title,
    `address` the Hub's name that its examples use.
    `picture`: "run" takes the run's newest sheet, which shows images of its data; "shapes" draws on the embedded ones.
    `reports`: Report objects beside those of the run. `say` gets a line for each library that the folder was opened in.
    Raises UserError when something is missing or does not fit, or a library gives other features; nothing is then written.
    """
    unknown = sorted(set(onnx) - set(exported.PROGRAMS))
    if unknown:
        raise UserError(f"onnx={unknown[0]!r} is unknown: choose from {', '.join(exported.PROGRAMS)}")
    if picture not in PICTURES:
        raise UserError(f"picture={picture!r} is unknown: choose run or shapes")
    given = {"licence": licence, "base_model": base_model, "datasets": tuple(datasets), "name": name, "address": address}
    told = about_run(model) if isinstance(model, (str, Path)) else {}
    told |= {key: value for key, value in given.items() if value}
    for report in reports:
        kind = str(report.protocol.get("evaluation") or "report")
        kept = told.setdefault("reports", {})
        kept[kind if kind not in kept else f"{kind}_{len(kept)}"] = {"numbers": report.numbers, "protocol": report.protocol, "data_hash": report.data_hash, "cost": report.cost}
    if picture == "run" and isinstance(model, (str, Path)):
        told["picture"] = newest_sheet(Path(model))
    about = About(**{"name": Path(folder).resolve().name, **told}, weights=weights)
    encoder = layouts.load(model, weights=weights) if isinstance(model, (str, Path)) else model
    training = training_tensors(model, weights) if heads else None
    classifier = trained_classifier.read(layouts.found(model), weights) if isinstance(model, (str, Path)) else None
    if light and classifier is None:
        raise UserError(f"{model if isinstance(model, (str, Path)) else 'an encoder in memory'} has no classifier: light is for a run that has learnt labels with classifier map; leave it out")
    if light:
        classifier = classifier.lightened(encoder)
    return exported.write(encoder, folder, about=about, training=training, classifier=classifier, onnx=tuple(onnx), say=say)


def push_to_hub(
    model,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    picture: str | None = None,
    say: Callable[[str], None] | None = print,
    **options,
) -> str:
    """Export to a temporary folder and upload it as one commit to the Hub's model `name` ("owner/name"); returns the address.

    `revision` is a branch, made where it is missing. `dry_run` tells what would be uploaded and touches no network. A public
    repository gets a picture of embedded images unless `picture` says otherwise. Further options as in `export`.
    Raises UserError without a token, without a network, or when the Hub refuses.
    """
    hub.check_name(name)
    if not dry_run:
        hub.require_token()
    picture = picture or ("run" if private else "shapes")
    with tempfile.TemporaryDirectory(prefix="maskwise-") as place:
        made = export(model, Path(place) / name.rpartition("/")[2], picture=picture, address=name, say=say, **options)
        if dry_run:
            return hub.rehearse(made, name, private=private, revision=revision, say=say)
        return hub.upload(made, name, private=private, revision=revision)


def newest_sheet(run: Path) -> bytes | None:
    """The newest picture of a run that shows attention, None where it has none."""
    sheets = sorted((*run.glob("pictures/sheet.png"), *run.glob("pictures/*attention*.png")), key=lambda path: (path.stat().st_mtime, path.name))
    return sheets[-1].read_bytes() if sheets else None


def training_tensors(model, weights: str) -> dict[str, Tensor]:
    """The projection head of these weights and the centers, under a checkpoint's names; raises UserError where there are none."""
    found: dict[str, Tensor] = {}
    if isinstance(model, (str, Path)) and (Path(model) / "checkpoints" / "last").is_file():
        last = Path(model) / "checkpoints" / "last"
        tensors = read_tensors(last.parent / last.read_text().strip() / "model.safetensors")
        found = {key: value for key, value in tensors.items() if key.startswith(f"{weights}.head.") or key in ("center", "patch_center")}
    if not any(key.startswith(f"{weights}.head.") for key in found):
        raise UserError(f"{model if isinstance(model, (str, Path)) else 'an encoder in memory'} holds no projection head of the {weights}: export a run folder, or leave the heads out")
    return found
