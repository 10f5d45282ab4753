"""A finished bundle goes to the Hugging Face Hub, by huggingface_hub. Nothing is made public unless that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import voidprune
from voidprune.errors import OutputError
from voidprune.execution import manifest as manifests
from voidprune.models.downloads import client_errors, first_line

# What an earlier bundle may have left there and a new one may not bring: a stale shard would be loaded with the new ones.
_REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.onnx", "genai_config.json")


def check_push_target(repo: str, *, public: bool) -> None:
    """Say early, before hours of work, that a bundle cannot go to this repository. Raises OutputError."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    if huggingface_hub.get_token() is None:
        raise OutputError(f"nothing can be pushed to {repo}: no token of the Hub is at hand", hint="hf auth login")
    try:
        info = _hub().model_info(repo)
    except RepositoryNotFoundError:
        return
    except client_errors() as error:
        raise OutputError(f"nothing can be pushed to {repo}: {first_line(error)}", hint="check its name") from error
    if info.private is public:
        found, asked = ("private", "leave --public out") if info.private else ("public", "add --public")
        raise OutputError(f"{repo} exists and is {found}", hint=f"{asked}, or choose another name")
    names = {sibling.rfilename for sibling in info.siblings or ()}
    if manifests.FILE not in names and any(name.endswith((".safetensors", ".bin", ".onnx")) for name in names):
        raise OutputError(
            f"{repo} holds a model that was not written by this command: it has no {manifests.FILE}",
            hint="choose another name",
        )


def push_bundle(folder: Path, repo: str, *, public: bool = False) -> str:
    """Upload a bundle in one commit, into a repository that is made where there is none. Returns the address of the commit.

    Raises OutputError.
    """
    manifests.read_manifest(folder)
    check_push_target(repo, public=public)
    hub = _hub()
    # RuntimeError: one file of several could not be uploaded.
    failures: tuple[type[Exception], ...] = (*client_errors(), RuntimeError)
    try:
        hub.create_repo(repo, private=not public, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=f"Written by voidprune {voidprune.__version__}",
            delete_patterns=list(_REPLACED),
        )
    except failures as error:
        raise OutputError(
            f"{folder} was written, but not pushed to {repo}: {first_line(error)}",
            hint=f"hf upload {repo} {folder}{'' if public else ' --private'}",
        ) from error
    return str(done.commit_url)


def _hub() -> Any:
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT)
