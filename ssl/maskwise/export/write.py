"""Writing of exported folders: weights and configuration for maskwise, timm and transformers, verified by loading."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from maskwise.engine.atomic_file import sync, write_error
from maskwise.engine.plain_tensors import plain
from maskwise.errors import UserError
from maskwise.export import load
from maskwise.export.folder import format, model_card, verify
from maskwise.export.folder.provenance import Provenance
from maskwise.export.folder.timm_layout import tag_of, timm_config, timm_layout
from maskwise.export.folder.transformers_layout import INDEX, WEIGHTS, dinov2, index, preprocessor, processor_type
from maskwise.export.formats import saved_classifier
from maskwise.export.formats.saved_classifier import SavedClassifier
from maskwise.nn.encoder import Encoder

PROGRAMS = ("onnx", "onnx-attention", "pt2")


def write(
    encoder: Encoder,
    folder,
    *,
    provenance: Provenance | None = None,
    training: dict[str, Tensor] | None = None,
    classifier: SavedClassifier | None = None,
    onnx: tuple[str, ...] = (),
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write a folder that opens in timm, transformers and `maskwise.load`; atomic, replacing an earlier export.

    A vision transformer with class token becomes a Dinov2Model and a timm model, any other encoder a timm model.
    Tensors without a place in either (pooling, mask token) go to maskwise.safetensors, `training` (heads and centers
    under checkpoint names) to training.safetensors, a `classifier` to classifier.safetensors and config.json.
    Weights are float32. `onnx`: programs to add, of PROGRAMS. The folder is opened again in every installed library
    and `say` gets the largest differences. Raises UserError for a folder that holds something else or cannot be
    written, an encoder without a timm model, or a difference above the tolerance (`verify.require`).
    """
    folder = Path(folder).expanduser()
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    provenance = provenance or Provenance(weights="teacher")
    with replacing(folder) as temporary:
        write_files(encoder, temporary, provenance, training, classifier)
        programs = [line for kind in onnx for line in write_program(encoder, temporary, kind)]
        differences, untried = verify.compare(encoder, temporary, load_exported)
        lines = [difference.line() for difference in differences] + programs
        model_card.write(encoder, temporary, provenance, differences, untried)
    if say is not None:
        say("opened again, largest differences:")
        for line in lines:
            say(line)
        for name, reason in untried.items():
            say(f"  {name:<22} {reason}")
    return folder


def write_files(
    encoder: Encoder,
    folder: Path,
    provenance: Provenance,
    training: dict[str, Tensor] | None,
    classifier: SavedClassifier | None = None,
) -> None:
    """Write weights and configuration for all three libraries."""
    from safetensors.torch import save_file

    layout = timm_layout(encoder)
    model = dinov2(encoder, layout)
    weights = format.MODEL if model is None else format.BACKBONE
    own = {key: value for key, value in encoder.state_dict().items() if key not in layout.names} | layout.changed
    for name, tensors in (
        (weights, layout.tensors),
        (format.OWN, own),
        (format.TRAINING, training),
        (saved_classifier.FILE, classifier and classifier.state),
    ):
        if tensors:
            save_file(plain(tensors), folder / name, metadata={"format": "pt"})
    tag = tag_of(provenance.method.replace(" with ", "_") or "maskwise")
    config = timm_config(layout, encoder, tag=tag, license=provenance.license, filename=weights)
    if model is not None:
        fields, tensors = model
        save_file(plain(tensors), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / INDEX).write_text(index(tensors), encoding="utf-8")
        config = {**fields, **config}
    config["image_processor_type"] = processor_type(encoder)
    config["maskwise"] = {"format": format.FORMAT, "encoder": encoder.spec(), "weights": provenance.weights}
    if classifier is not None:
        config["maskwise"]["classifier"] = classifier.spec()
    for name, content in ((format.CONFIG, config), ("preprocessor_config.json", preprocessor(encoder))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_program(encoder: Encoder, folder: Path, kind: str) -> list[str]:
    """Write one of PROGRAMS and return lines with its difference from the encoder."""
    from maskwise.export.folder import programs  # torch.export is slow to import

    return programs.write(encoder, folder, kind)


@contextlib.contextmanager
def replacing(folder) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` on success and is removed on failure or Ctrl-C.

    Raises UserError if `folder` holds something other than an export or cannot be written.
    """
    from safetensors import SafetensorError

    folder = Path(folder)
    if folder.exists() and not _is_replaceable(folder):
        raise UserError(f"{folder} holds something other than an export: give a new folder")
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield temporary
        for file in sorted(temporary.rglob("*")):
            file.chmod(0o755 if file.is_dir() else 0o644)
            sync(file)
        temporary.chmod(0o755)
        _exchange(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(write_error(folder, error)) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # after a success it holds the earlier export, or is gone
            if folder.exists():
                shutil.rmtree(_aside(temporary), ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):  # not empty after a success
                parent.rmdir()


def _exchange(temporary: Path, folder: Path) -> None:
    """Move `temporary` to `folder`, and what is there to `temporary`; an interruption leaves the earlier folder."""
    if not folder.exists():
        temporary.rename(folder)
        return
    old = _aside(temporary)
    try:
        folder.rename(old)
        temporary.rename(folder)
        old.rename(temporary)
    except BaseException:  # Ctrl-C included
        if not folder.exists():
            old.rename(folder)
        raise


def _aside(temporary: Path) -> Path:
    """Return the place of the earlier folder during an exchange."""
    return temporary.with_name(f"{temporary.name}.old")


def _is_replaceable(folder: Path) -> bool:
    return folder.is_dir() and (not any(folder.iterdir()) or format.description(folder) is not None)


def load_exported(folder: Path) -> Encoder:
    """Load the encoder of an exported folder, in eval mode."""
    return load.load(folder, weights=format.description(folder)["weights"])
