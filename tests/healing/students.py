"""A tiny teacher, the student that a schedule leaves of it, and samples that the teacher answered."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from tests.tiny_models import TinyModel
from voidprune.export.hf_checkpoint import write_slim_checkpoint
from voidprune.models.pretrained import load_model
from voidprune.profiling.calibration import Sample
from voidprune.schedule import LayerAction, Schedule

A = LayerAction


def split_schedule(source: TinyModel) -> Schedule:
    """Of six layers, 1 goes; prefill runs 0, 2 and 3, decode 0, 4 and 5, and the attention of 3."""
    return Schedule(
        model=source.identity,
        prefill=(A.FULL, A.SKIP, A.FULL, A.FULL, A.KV_ONLY, A.KV_ONLY),
        decode=(A.FULL, A.SKIP, A.KV_ONLY, A.SKIP_MLP, A.FULL, A.FULL),
        origin={"criterion": "test"},
    )


def load_student(source: TinyModel, schedule: Schedule, folder: Path, *, dtype: str = "fp32") -> PreTrainedModel:
    """The slim model, from a folder that may be there already."""
    if not folder.exists():
        folder.mkdir()
        write_slim_checkpoint(source.checkpoint, schedule.union, folder)
    return load_model(folder, dtype=dtype)


def make_samples(num_samples: int, *, seed: int = 0) -> list[Sample]:
    """Random prompts and responses of 1 to 9 tokens."""
    rng = torch.Generator().manual_seed(seed)

    def tokens() -> tuple[int, ...]:
        length = int(torch.randint(1, 10, (), generator=rng))
        return tuple(torch.randint(3, 101, (length,), generator=rng).tolist())

    return [Sample(tokens(), tokens(), None, "default", f"sample {number}") for number in range(num_samples)]
