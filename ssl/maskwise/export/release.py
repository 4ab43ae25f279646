"""Export of a run, a folder, a file or an encoder to an exported folder or to the Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.export import hub_repository, load, run_checkpoint, write
from maskwise.export.folder.licenses import UNKNOWN
from maskwise.export.folder.local_paths import without_paths
from maskwise.export.folder.provenance import Provenance, read_provenance
from maskwise.export.formats import saved_classifier
from maskwise.export.formats.saved_classifier import SavedClassifier
from maskwise.nn.backbones.weights_file import read_tensors
from maskwise.nn.encoder import Encoder

PICTURES = ("run", "shapes")


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    weights: "teacher" or "student" of a run. heads: add its projection head and centers. light: leave the token heads
    out of a MAP classifier (MAP-light). onnx: programs to add, of "onnx", "onnx-attention" and "pt2".
    license, datasets, base_model: for the model card; name: its title; address: the Hub name in its examples.
    picture: "run" for the run's newest attention sheet, which shows images of its data; "shapes" for embedded images.
    reports: Report objects to add to those of the run. Raises UserError for an unknown program or picture.
    """

    weights: str = "teacher"
    heads: bool = False
    light: bool = False
    onnx: Sequence[str] = ()
    license: str = UNKNOWN
    datasets: Sequence[str] = ()
    base_model: str | None = None
    picture: str = "run"
    name: str | None = None
    address: str | None = None
    reports: Sequence = ()

    def __post_init__(self):
        unknown = sorted(set(self.onnx) - set(write.PROGRAMS))
        if unknown:
            raise UserError(f"onnx={unknown[0]!r} is unknown: choose from {', '.join(write.PROGRAMS)}")
        if self.picture not in PICTURES:
            raise UserError(f"picture={self.picture!r} is unknown: choose run or shapes")

    def card_fields(self) -> dict:
        """Return the fields of the model card that are set."""
        fields = {
            "license": self.license,
            "base_model": self.base_model,
            "datasets": tuple(self.datasets),
            "name": self.name,
            "address": self.address,
        }
        return {key: value for key, value in fields.items() if value}


def export(model, folder, *, say: Callable[[str], None] | None = print, **options) -> Path:
    """Write an encoder, or what `maskwise.load` reads, as a folder for timm, transformers and `maskwise.load`.

    The classifier of a supervised run is exported with it. `options`: those of `ExportOptions`. `say` gets a line
    with the differences in each library. Raises UserError, and writes nothing, if something is missing or does not
    fit, or a library computes different features.
    """
    settings = ExportOptions(**options)
    model = unwrapped(model)
    provenance = provenance_of(model, Path(folder), settings)
    encoder = load.load(model, weights=settings.weights) if _is_path(model) else model
    return write.write(
        encoder,
        folder,
        provenance=provenance,
        training=training_tensors(model, settings.weights) if settings.heads else None,
        classifier=classifier_of(model, encoder, settings),
        onnx=tuple(settings.onnx),
        say=say,
    )


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
    """Export to a temporary folder and upload it as one commit to the model `name` ("owner/name"); return the URL.

    `revision`: a branch, created if missing. `dry_run`: print what would be uploaded, without using the network.
    By default the picture of a public repository shows embedded images. Further options as in `export`.
    Raises UserError without a token or network, or when the Hub refuses.
    """
    hub_repository.check_name(name)
    if not dry_run:
        hub_repository.require_token()
    picture = picture or ("run" if private else "shapes")
    with tempfile.TemporaryDirectory(prefix="maskwise-") as temporary:
        folder = Path(temporary) / name.rpartition("/")[2]
        export(model, folder, picture=picture, address=name, say=say, **options)
        if dry_run:
            return hub_repository.rehearse(folder, name, private=private, revision=revision, say=say)
        return hub_repository.upload(folder, name, private=private, revision=revision)


def unwrapped(model):
    """Return a path, or the Encoder in a model that torch.compile, DistributedDataParallel or HubEncoder wraps.

    Raises UserError for anything else.
    """
    if _is_path(model):
        return model
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, Encoder):
        wrapped = (getattr(inner, name, None) for name in ("_orig_mod", "module", "encoder"))
        inner = next((part for part in wrapped if isinstance(part, nn.Module)), None)
    if not isinstance(inner, Encoder):
        remedy = "give the folder of the run" if isinstance(model, dict) else "give what maskwise.load returns"
        raise UserError(
            "export takes an Encoder, a run folder, an exported folder or a weights file; "
            f"this is a {type(model).__name__}: {remedy}"
        )
    return inner


def provenance_of(model, folder: Path, settings: ExportOptions) -> Provenance:
    """Return what the model card reports: the run's facts, overridden by the options."""
    fields = {"name": folder.resolve().name}
    if _is_path(model):
        fields |= read_provenance(model)
    fields |= settings.card_fields()
    reports = dict(fields.get("reports", {}))
    for report in settings.reports:
        kind = str(report.protocol.get("evaluation") or "report")
        reports[kind if kind not in reports else f"{kind}_{len(reports)}"] = {
            "numbers": report.numbers,
            "protocol": without_paths(report.protocol),
            "data_hash": report.data_hash,
            "cost": report.cost,
        }
    fields["reports"] = reports
    if settings.picture == "run" and _is_path(model):
        checkpoint = run_checkpoint.find(model)
        fields["picture"] = newest_sheet(Path(model) if checkpoint is None else checkpoint.run)
    return Provenance(**fields, weights=settings.weights)


def classifier_of(model, encoder: Encoder, settings: ExportOptions) -> SavedClassifier | None:
    """Return the classifier of a supervised run; raises UserError for `light` without one."""
    classifier = saved_classifier.read(load.resolve_path(model), settings.weights) if _is_path(model) else None
    if not settings.light:
        return classifier
    if classifier is None:
        raise UserError(
            f"{_model_text(model)} has no classifier: light is for a supervised run with classifier map; leave it out"
        )
    return classifier.lightened(encoder)


def newest_sheet(run: Path) -> bytes | None:
    """Return the newest attention picture of a run as PNG; None without one."""
    sheets = sorted(
        (*run.glob("pictures/sheet.png"), *run.glob("pictures/*attention*.png")),
        key=lambda path: (path.stat().st_mtime, path.name),
    )
    return sheets[-1].read_bytes() if sheets else None


def training_tensors(model, weights: str) -> dict[str, Tensor]:
    """Return the projection head of these weights and the centers under checkpoint names; raises UserError without."""
    tensors: dict[str, Tensor] = {}
    prefix = f"{weights}.head."
    checkpoint = run_checkpoint.find(model) if _is_path(model) else None
    if checkpoint is not None:
        tensors = {
            key: value
            for key, value in read_tensors(checkpoint.model).items()
            if key.startswith(prefix) or key in ("center", "patch_center")
        }
    if not any(key.startswith(prefix) for key in tensors):
        raise UserError(
            f"{_model_text(model)} holds no projection head of the {weights}: export a run folder, or leave heads out"
        )
    return tensors


def _is_path(model) -> bool:
    return isinstance(model, (str, os.PathLike))


def _model_text(model) -> str:
    return str(model) if _is_path(model) else "an encoder in memory"
