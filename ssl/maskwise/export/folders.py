"""Folders that hold a model: run folders and exports of maskwise, folders of timm and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from maskwise.errors import UserError
from maskwise.export import run_checkpoint
from maskwise.export.folder import format
from maskwise.export.formats import folder_weights, spec_checks, timm, transformers
from maskwise.export.formats.imported_model import SINGLE_NETWORK, ImportedModel, add_checkpoint_tensors
from maskwise.export.formats.spec_checks import json_object
from maskwise.export.run_checkpoint import RunCheckpoint
from maskwise.nn.backbones.weights_file import read_tensors
from maskwise.nn.encoder import encoder_from_spec


def described_by(file: Path) -> Path | None:
    """Return the folder of a weights file whose config.json describes the network; None for other files."""
    folder = file.parent
    is_model = format.description(folder) is not None or timm.is_timm_folder(folder) or transformers.recognized(folder)
    return folder if is_model and file in folder_weights.files(folder) else None


def training_file(folder: Path) -> Path | None:
    """Return the training file of another project in a folder that holds no model of its own; None without one.

    Raises UserError for several.
    """
    names = [file.name for file in folder.glob("*") if file.is_file()]
    if "config.json" in names or any(name.endswith((".safetensors", ".distcp")) for name in names):
        return None
    found = folder_weights.research_files(names, folder.name)
    if not found or (folder / run_checkpoint.CHECKPOINTS).is_dir():
        return None
    if len(found) > 1:
        raise UserError(f"{folder} holds {len(found)} weights files: give one of them ({', '.join(found[:4])})")
    return folder / found[0]


def read(folder: Path) -> ImportedModel:
    """Read an exported folder, a run's last sound checkpoint, one checkpoint, or a folder of timm or transformers.

    Raises UserError for another folder, and for one whose weights files disagree.
    """
    checkpoint = run_checkpoint.find(folder)
    if checkpoint is not None:
        return read_checkpoint(checkpoint, folder)
    if (folder / run_checkpoint.CHECKPOINTS).is_dir():
        raise UserError(f"{folder} holds no checkpoint yet: let the run reach its first one (train.save_every)")
    if "maskwise" in json_object(folder / format.CONFIG) and format.description(folder) is None:
        raise UserError(f"{folder}: the section maskwise of its config.json is incomplete: export again")
    found = folder_weights.agreeing(folder)
    if format.description(folder) is not None and found.native is not None:
        return read_exported(folder, found.native)
    if transformers.recognized(folder) and found.foreign is not None:
        return transformers.read(folder, folder_weights.read(found.foreign), found.foreign)
    if timm.is_timm_folder(folder) and found.native is not None:
        return timm.read_folder(folder, folder_weights.read(found.native), found.native)
    raise UserError(f"{folder} {foreign_folder(folder)}")


def foreign_folder(folder: Path) -> str:
    """Return why a folder cannot be read."""
    if any(folder.glob("*.distcp")):
        return "is a sharded checkpoint: join it by torch's dcp_to_torch_save, and give that file"
    kind = json_object(folder / "config.json").get("model_type")
    if isinstance(kind, str) and kind not in transformers.MODELS:
        return f"holds a model of transformers that is not read ({kind}); read are {', '.join(transformers.MODELS)}"
    if format.description(folder) is not None or kind or timm.is_timm_folder(folder):
        return f"has a config.json and no weights: it needs one of {', '.join(folder_weights.FILES)}"
    return "is neither a run folder nor an exported one: it has no config.json of a model and no checkpoints"


def read_checkpoint(checkpoint: RunCheckpoint, origin: Path) -> ImportedModel:
    """Read all networks of a checkpoint; raises UserError where it holds none."""
    try:
        spec = json.loads(checkpoint.encoder.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {checkpoint.encoder}: {error}; use an earlier checkpoint") from None
    spec = spec_checks.check(spec, checkpoint.encoder)
    model = ImportedModel(str(origin), "run", spec, {}, file=checkpoint.model)
    add_checkpoint_tensors(model, read_tensors(checkpoint.model))
    if not model.networks:
        raise UserError(
            f"{checkpoint.directory} holds neither a teacher nor a student: is it a checkpoint of maskwise?"
        )
    return model


def read_exported(folder: Path, weights: Path) -> ImportedModel:
    """Read an exported folder: its encoder, and the other network, heads and centers if it has them.

    Where transformers has saved the backbone since, the pooling is only kept if it has no weights.
    """
    if weights.name != format.BACKBONE and "transformers_version" in json_object(folder / format.CONFIG):
        spec = spec_checks.check(format.description(folder)["encoder"], folder / format.CONFIG)
        if (folder / format.OWN).is_file():
            raise UserError(
                f"{folder}: {weights.name} was saved by transformers and {format.OWN} by an earlier export: remove "
                f"{format.OWN} to load the former, pooled as timm pools; or export again"
            )
        with torch.device("meta"):
            keys = encoder_from_spec(spec).state_dict().keys()
        if any(key.startswith("pooling.") for key in keys):
            model = timm.read_folder(folder, folder_weights.read(weights), weights)
            model.notes.append(
                f"the weights of its pooling {spec['pooling']['name']} were not saved by transformers: "
                "its vector is that of timm's model"
            )
            return model
    role = format.description(folder)["weights"]
    spec, state, training = format.read(folder)
    model = ImportedModel(str(folder), "export", spec, {}, file=weights)
    if not training:
        model.networks = {SINGLE_NETWORK: state}
        return model
    return add_checkpoint_tensors(
        model, {**{f"{role}.encoder.{key}": value for key, value in state.items()}, **training}
    )
