"""A model by the name that a user gives it, and where it runs."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from voidprune.execution.manifest import is_bundle, read_manifest
from voidprune.models.checkpoint import Checkpoint, find_model, open_checkpoint
from voidprune.models.pretrained import default_device
from voidprune.models.remote import open_remote_checkpoint
from voidprune.schedule import ModelIdentity


def open_model(name: str) -> Checkpoint:
    """A model by folder, Hub id, or "demo" for the one that ships with the package. Raises ModelError, CheckpointError."""
    if name == "demo" and not Path(name).exists():
        return open_checkpoint(demo_folder(), name="voidprune-demo")
    folder = find_model(name)
    return open_checkpoint(folder, name=folder.resolve().name if Path(name).is_dir() else name)


def open_kept_layers(name: str) -> Checkpoint:
    """`open_model` for who needs some layers only: of a model on the Hub, headers are fetched now, and tensors when they are read.

    Offline, and where the whole model was fetched before, that is `open_model`.
    """
    from huggingface_hub import constants

    is_local = Path(name).exists() or name == "demo" or name.count("/") > 1 or name.startswith((".", "/", "~"))
    return open_model(name) if is_local or constants.HF_HUB_OFFLINE else open_remote_checkpoint(name)


def whole_identity(checkpoint: Checkpoint) -> ModelIdentity:
    """Of the model that a bundle was made of; of any other checkpoint its own. Raises ArtifactError."""
    is_pruned = is_bundle(checkpoint.folder)
    return read_manifest(checkpoint.folder).schedule.model if is_pruned else checkpoint.identity


def default_provider() -> str:
    """ "cuda" where onnxruntime was built for it and torch sees a device, else "cpu"."""
    import onnxruntime as ort

    built = "CUDAExecutionProvider" in ort.get_available_providers()
    return "cuda" if built and default_device() == "cuda" else "cpu"


def demo_folder() -> Path:
    return Path(str(resources.files("voidprune.demo") / "model"))
