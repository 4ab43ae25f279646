"""Hugging Face Hub: upload of an exported folder, and lookup of a repository there or in the local cache."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from maskwise.errors import UserError
from maskwise.export.formats import folder_weights, training_arguments

PREFIX = "hub:"
NAME = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ["*.json", "*.safetensors", *training_arguments.FILES]
REPLACED = (  # files of an earlier export to delete where a new export lacks them
    "model.safetensors",
    "backbone.safetensors",
    "transformers.safetensors",
    "model.safetensors.index.json",
    "maskwise.safetensors",
    "training.safetensors",
    "classifier.safetensors",
    "onnx/model.onnx",
    "onnx/model_attention.onnx",
    "encoder.pt2",
)
LOGIN = "get one with write access by `hf auth login`, or set HF_TOKEN"


def check_name(name: str) -> None:
    """Raise UserError for an invalid repository name."""
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except errors.HFValidationError:
        raise UserError(
            f"{name!r} is not a valid Hub name: give owner/name, of letters, digits, dashes, dots and underscores"
        ) from None


def require_token() -> None:
    """Raise UserError without a token or in offline mode; called before any computation."""
    if constants.HF_HUB_OFFLINE:
        raise UserError("cannot push to the Hub: HF_HUB_OFFLINE forbids it; unset it, or use --dry-run")
    if huggingface_hub.get_token() is None:
        raise UserError(f"cannot push to the Hub: there is no token; {LOGIN}")


def upload(folder: Path, name: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a folder as one commit, creating repository and branch if missing; return the commit's URL.

    Raises UserError, in one line, for any refusal of the Hub or the network.
    """
    client = huggingface_hub.HfApi()
    try:
        name = client.create_repo(name, private=private, exist_ok=True).repo_id
        if private and not client.model_info(name).private:
            raise UserError(f"{name} exists and is public: make it private on the Hub, or give another name")
        if revision is not None:
            client.create_branch(name, branch=revision, exist_ok=True)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        stale = sorted(set(REPLACED) & set(client.list_repo_files(name, revision=revision)) - set(files))
        commit = client.create_commit(
            name,
            [
                *(huggingface_hub.CommitOperationAdd(name, file) for name, file in files.items()),
                *map(huggingface_hub.CommitOperationDelete, stale),
            ],
            commit_message="Export of maskwise",
            revision=revision,
        ).commit_url
    except UserError:
        raise
    except Exception as error:  # the client raises many unrelated types
        raise UserError(f"cannot push to the Hub ({reason(error)}): {advice(error)}") from None
    return str(commit)


def rehearse(folder: Path, name: str, *, private: bool, revision: str | None, say: Callable[[str], None] | None) -> str:
    """Print the files that an upload would send, without sending them; return the URL."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    url = f"{constants.ENDPOINT}/{name}" + (f"/tree/{revision}" if revision else "")
    if say is not None:
        size = sum(path.stat().st_size for path in files) / 1e6
        say(f"dry run: {len(files)} files, {size:.1f} MB, to the {'private' if private else 'public'} {url}")
        for path in files:
            say(f"  {path.stat().st_size:>12,}  {path.relative_to(folder)}")
    return url


def parse_name(text: str) -> tuple[str, str | None] | None:
    """Split "hub:owner/name@revision", or "owner/name" that can be no local path, into name and revision; else None."""
    forced = text.startswith(PREFIX)
    name, _, revision = text.removeprefix(PREFIX).partition("@")
    if forced:
        check_name(name)
        return name, revision or None
    if os.path.exists(text) or not NAME.fullmatch(name) or os.path.isdir(name.partition("/")[0]):
        return None
    if Path(name).suffix in (".pth", ".pt", ".tar", ".safetensors", ".bin"):
        return None
    return name, revision or None


def fetch(name: str, revision: str | None = None, **options) -> Path:
    """Return a repository's folder in the Hub's cache, or the training file in it, downloaded if needed.

    Pickled weights are downloaded where there are no safetensors. `options`: cache_dir, force_download,
    local_files_only and token, as in snapshot_download. Raises UserError if it is neither on the Hub nor in the cache.
    """
    where = f"{name}@{revision}" if revision else name
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=WANTED, **options))
        if any(folder.glob("*.safetensors")):
            return folder
        return fetch_pickled(name, folder, where, options)
    except UserError:
        raise
    except Exception as error:  # as in `upload`
        raise UserError(
            f"{where} is no local path, and cannot be downloaded from the Hub ({reason(error)}): "
            "check the name, the network, and `hf auth login` for a private one"
        ) from None


def fetch_pickled(name: str, folder: Path, where: str, options: dict) -> Path:
    """Download the pickled weights of a repository without safetensors; return its folder, or a training file in it.

    `folder` is that of one commit in the cache. Raises UserError for several training files.
    """
    files = files_of(name, folder, options)
    described = fnmatch.filter(files, "pytorch_model*.bin") if "config.json" in files else []
    for file in described:
        huggingface_hub.hf_hub_download(name, file, revision=folder.name, **options)
    if described:
        return folder
    found = folder_weights.research_files(files, name.rpartition("/")[2])
    if len(found) > 1:
        raise UserError(
            f"{where} holds {len(found)} weights files ({', '.join(found[:4])}): download one, and give its path"
        )
    if not found:
        raise UserError(f"{where} holds no weights: it needs *.safetensors, pytorch_model.bin or *.pth")
    return Path(huggingface_hub.hf_hub_download(name, found[0], revision=folder.name, **options))


def files_of(name: str, folder: Path, options: dict) -> list[str]:
    """Return the names of a repository's files at the commit of a cached folder; those in the cache without network."""
    cached = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    if options.get("local_files_only"):
        return cached
    try:
        return huggingface_hub.HfApi().list_repo_files(name, revision=folder.name, token=options.get("token"))
    except Exception:  # as in `upload`
        if not any(file.endswith((".bin", *folder_weights.RESEARCH_SUFFIXES)) for file in cached):
            raise
        return cached


def reason(error: Exception) -> str:
    """Return the first line of an error, or its type."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def advice(error: Exception) -> str:
    """Return what to do about a failed upload."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the token is refused; {LOGIN}"
    return "check the network, and `hf auth login`"
