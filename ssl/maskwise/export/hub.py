"""The Hugging Face Hub: uploading an exported folder, and finding one there or in its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from maskwise.functional.errors import UserError

PREFIX = "hub:"
NAME = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ["*.json", "*.safetensors"]
REPLACED = (  # files of an earlier export that must not stay beside a new one
    "model.safetensors", "backbone.safetensors", "transformers.safetensors", "model.safetensors.index.json", "maskwise.safetensors",
    "training.safetensors", "classifier.safetensors", "onnx/model.onnx", "onnx/model_attention.onnx", "encoder.pt2",
)  # fmt: skip
LOGIN = "`hf auth login`, or HF_TOKEN in the environment, gives one with write access"


def check_name(name: str) -> None:
    """Raise UserError for what cannot be a repository's name."""
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except errors.HFValidationError:
        raise UserError(f"{name!r} is no name on the Hub: give owner/name, of letters, digits, dashes, dots and underscores") from None


def require_token() -> None:
    """Raise UserError where nobody is logged in or the Hub is switched off, before anything is computed."""
    if constants.HF_HUB_OFFLINE:
        raise UserError("cannot push to the Hub: HF_HUB_OFFLINE forbids it; unset it, or use --dry-run")
    if huggingface_hub.get_token() is None:
        raise UserError(f"cannot push to the Hub: there is no token; {LOGIN}")


def upload(folder: Path, name: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a folder as one commit, making repository and branch where they are missing; returns the commit's address.

    Raises UserError, in one line, for everything that the Hub or the network refuses.
    """
    client = huggingface_hub.HfApi()
    try:
        name = client.create_repo(name, private=private, exist_ok=True).repo_id
        if private and not client.model_info(name).private:
            raise UserError(f"{name} is there already and is public: make it private on the Hub, or give another name")
        if revision is not None:
            client.create_branch(name, branch=revision, exist_ok=True)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        stale = sorted(set(REPLACED) & set(client.list_repo_files(name, revision=revision)) - set(files))
        commit = client.create_commit(
            name,
            [*(huggingface_hub.CommitOperationAdd(there, here) for there, here in files.items()), *map(huggingface_hub.CommitOperationDelete, stale)],
            commit_message="Export of maskwise",
            revision=revision,
        ).commit_url
    except UserError:
        raise
    except Exception as error:  # the client raises a dozen unrelated types for "offline", "not logged in" and "refused"
        raise UserError(f"cannot push to the Hub ({reason(error)}): {advice(error)}") from None
    return str(commit)


def rehearse(folder: Path, name: str, *, private: bool, revision: str | None, say: Callable[[str], None] | None) -> str:
    """Tell what an upload would send, and send nothing; returns the address that it would have."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    to = f"{constants.ENDPOINT}/{name}" + (f"/tree/{revision}" if revision else "")
    if say is not None:
        say(f"dry run: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB, to the {'private' if private else 'public'} {to}")
        for path in files:
            say(f"  {path.stat().st_size:>12,}  {path.relative_to(folder)}")
    return to


def named(text: str) -> tuple[str, str | None] | None:
    """Repository and revision of "hub:owner/name@revision" or, where no such path can be meant, of "owner/name"; else None."""
    forced = text.startswith(PREFIX)
    name, _, revision = text.removeprefix(PREFIX).partition("@")
    if forced:
        check_name(name)
        return name, revision or None
    if os.path.exists(text) or not NAME.fullmatch(name) or os.path.isdir(name.partition("/")[0]):
        return None
    return (name, revision or None) if Path(name).suffix not in (".pth", ".pt", ".tar", ".safetensors", ".bin") else None


def fetch(name: str, revision: str | None = None, **options) -> Path:
    """The folder of a repository in the Hub's cache, fetched where the network allows; `options` as in snapshot_download.

    Raises UserError where there is none.
    """
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=WANTED, **options))
    except Exception as error:  # as in `upload`
        where = f"{name}@{revision}" if revision else name
        raise UserError(f"{where} is no path here, and the Hub does not give it ({reason(error)}): check the name, the network, and `hf auth login` for a private one") from None


def reason(error: Exception) -> str:
    """The first words of an error, or its type."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def advice(error: Exception) -> str:
    """What to do about an upload that failed."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the token is refused; {LOGIN}"
    return "check the network, and `hf auth login`"
