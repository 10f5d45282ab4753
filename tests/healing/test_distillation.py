"""A student learns, is never worse than it was, and a training that was killed ends in the same bits."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.healing.students import load_student, make_samples, split_schedule
from tests.several_processes import environment, launcher
from tests.tiny_models import TinyModel, build_model
from voidprune.errors import ArtifactError, DatasetError, HealingError, MissingExtraError
from voidprune.execution.reference import scheduled
from voidprune.healing.distillation import Distilled, distill
from voidprune.healing.losses import DistillLoss, divergence
from voidprune.healing.settings import DistillSettings, Parameters
from voidprune.healing.training_data import hold_out, prompt_hash
from voidprune.healing.training_state import Measurement
from voidprune.models.pretrained import load_model

LORA, FULL = Parameters.LORA, Parameters.FULL
SAMPLES = make_samples(60)
SHORT = DistillSettings(steps=12, batch_size=6, evaluate_every=4, held_out=0.2, learning_rate=3e-3, rank=4)


def run(
    source: TinyModel, folder: Path, settings: DistillSettings = SHORT, *, dtype: str = "fp32", **options: Any
) -> Distilled:
    """Distil the student of `split_schedule`; the state of the training lies in `folder`."""
    folder.mkdir(exist_ok=True)
    schedule = split_schedule(source)
    student = load_student(source, schedule, folder / "slim", dtype=dtype)
    teacher = load_model(source.folder, dtype=dtype)
    return distill(teacher, student, schedule, SAMPLES, settings=settings, folder=folder / "state", **options)


def same_bits(one: Distilled, other: Distilled) -> bool:
    assert one.state.keys() == other.state.keys()
    assert one.state
    return all(torch.equal(one.state[name], other.state[name]) for name in one.state)


def held_out_divergence(source: TinyModel, state: dict[str, Tensor], folder: Path) -> float:
    """Measured without any of the training's code: stock models under their schedules, one row at a time."""
    schedule = split_schedule(source)
    student = load_student(source, schedule, folder)
    missing = student.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    slim_schedule = schedule.on_slim_model(replace(schedule.model, num_layers=5))
    total, count = 0.0, 0
    for sample in hold_out(SAMPLES, share=SHORT.held_out)[1]:
        with scheduled(student, slim_schedule) as running:
            found = running.predict([sample.prompt], [sample.response or ()])[0]
        tokens = torch.tensor([[*sample.prompt, *(sample.response or ())[:-1]]])
        with torch.no_grad():
            wanted = source.model(tokens).logits[0, len(sample.prompt) - 1 :]
        total += float(divergence(torch.from_numpy(found), wanted).sum())
        count += len(found)
    return total / count


@pytest.mark.parametrize("parameters", Parameters)
def test_student_learns(llama: TinyModel, tmp_path: Path, parameters: Parameters) -> None:
    measurements: list[Measurement] = []
    settings = replace(SHORT, parameters=parameters, learning_rate=None, steps=30, evaluate_every=10)
    done = run(llama, tmp_path, settings, report=measurements.append)
    assert done.improved
    assert done.loss_after < 0.95 * done.loss_before
    assert [measurement.step for measurement in measurements] == [0, 10, 20, 30]
    assert tuple(measurements) == done.history
    assert done.stopped == "steps"
    assert held_out_divergence(llama, {}, tmp_path / "slim") == pytest.approx(done.loss_before, rel=1e-4)
    assert held_out_divergence(llama, dict(done.state), tmp_path / "slim") == pytest.approx(done.loss_after, rel=1e-3)
    assert {*done.trained, *done.held_out} == {prompt_hash(sample.prompt) for sample in SAMPLES}
    assert not {*done.trained} & {*done.held_out}


def test_input_is_returned_where_nothing_beats_it(llama: TinyModel, tmp_path: Path) -> None:
    done = run(llama, tmp_path, replace(SHORT, learning_rate=3.0, patience=2))
    assert not done.improved
    assert done.state == {}
    assert done.best_step == 0
    assert done.stopped == "patience"
    assert done.loss_after == done.loss_before == done.history[0].held_out_loss
    assert [measurement.step for measurement in done.history] == [0, 4, 8]
    assert min(measurement.held_out_loss for measurement in done.history[1:]) > done.loss_before


class KilledError(Exception):
    pass


def kill_at(step: int) -> Callable[[Measurement], None]:
    def report(measurement: Measurement) -> None:
        if measurement.step == step:
            raise KilledError

    return report


@pytest.mark.parametrize("parameters", Parameters)
@pytest.mark.parametrize("steps", [(0,), (4,), (4, 8), (12,)])
def test_killed_and_resumed_is_uninterrupted(
    llama: TinyModel, tmp_path: Path, parameters: Parameters, steps: tuple[int, ...]
) -> None:
    settings = replace(SHORT, parameters=parameters)
    for step in steps:
        with pytest.raises(KilledError):
            run(llama, tmp_path / "killed", settings, report=kill_at(step))
    resumed = run(llama, tmp_path / "killed", settings)
    plain = run(llama, tmp_path / "plain", settings)
    assert same_bits(resumed, plain)
    assert [m.held_out_loss for m in resumed.history] == [m.held_out_loss for m in plain.history]
    assert [m.training_loss for m in resumed.history] == [m.training_loss for m in plain.history]


def test_killed_between_two_looks(llama: TinyModel, tmp_path: Path) -> None:
    """Steps behind the last state are run again."""
    fed = 0

    class Track:
        def __enter__(self) -> Callable[[int], None]:
            return self.advance

        def __exit__(self, *_error: object) -> None:
            return None

        def advance(self, amount: int) -> None:
            nonlocal fed
            fed += 1
            if fed == 6:
                raise KilledError

    with pytest.raises(KilledError):
        run(llama, tmp_path / "killed", track=lambda _what, _total, _unit: Track())
    resumed = run(llama, tmp_path / "killed")
    assert same_bits(resumed, run(llama, tmp_path / "plain"))


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.healing.test_distillation import SHORT, run
from tests.tiny_models import TinyModel

def report(measurement):
    if measurement.step == 8 and {kill}:
        os.kill(os.getpid(), signal.SIGKILL)

done = run(TinyModel("llama", Path({model!r})), Path({folder!r}), report=report)
from accelerate import PartialState
from safetensors.torch import save_file
state = PartialState()
(Path({folder!r}) / f"process {{state.process_index}} of {{state.num_processes}}").touch()
if os.environ.get("RANK", "0") == "0":
    save_file(dict(done.state), {folder!r} + "/healed.safetensors")
"""


def start(source: TinyModel, folder: Path, *launching: str, kill: bool = False) -> subprocess.CompletedProcess[str]:
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT.format(kill=kill, model=str(source.folder), folder=str(folder)))
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, *launching, str(script)],
        env=environment(PYTHONPATH=str(root)),
        capture_output=True,
        text=True,
        check=False,
    )


def test_process_that_was_killed(llama: TinyModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    killed = start(llama, tmp_path / "killed", kill=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "healed.safetensors").exists()
    again = start(llama, tmp_path / "killed")
    assert again.returncode == 0, again.stderr
    found = load_file(tmp_path / "killed" / "healed.safetensors")
    plain = run(llama, tmp_path / "plain")
    assert found.keys() == plain.state.keys()
    assert all(torch.equal(found[name], plain.state[name]) for name in found)


def test_two_processes_train_what_one_trains(llama: TinyModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (tmp_path / "two").mkdir()
    load_student(llama, split_schedule(llama), tmp_path / "two" / "slim")  # or both would write it
    done = start(llama, tmp_path / "two", *launcher())
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "two").glob("process *")} == {"process 0 of 2", "process 1 of 2"}
    found = load_file(tmp_path / "two" / "healed.safetensors")
    plain = run(llama, tmp_path / "plain")
    assert found.keys() == plain.state.keys()
    for name, tensor in plain.state.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


def test_time_that_is_up_ends_it_cleanly(llama: TinyModel, tmp_path: Path) -> None:
    """And more time takes it up where it ended."""
    first = run(llama, tmp_path / "timed", replace(SHORT, max_minutes=1e-9))
    assert first.stopped == "time"
    assert [measurement.step for measurement in first.history] == [0]
    assert not first.improved
    rest = run(llama, tmp_path / "timed", SHORT)
    assert rest.stopped == "steps"
    assert same_bits(rest, run(llama, tmp_path / "plain"))


def test_finished_training_is_not_repeated(llama: TinyModel, tmp_path: Path) -> None:
    first = run(llama, tmp_path)
    again = run(llama, tmp_path)
    assert same_bits(first, again)
    assert again.history == first.history


def test_state_of_another_run_is_refused(llama: TinyModel, tmp_path: Path) -> None:
    run(llama, tmp_path)
    with pytest.raises(ArtifactError, match="begun by another run, with another settings"):
        run(llama, tmp_path, replace(SHORT, seed=1))


def test_weights_come_back_in_the_dtype_of_the_student(llama: TinyModel, tmp_path: Path) -> None:
    for parameters in Parameters:
        settings = replace(SHORT, parameters=parameters, precision="bf16", steps=20, evaluate_every=10)
        done = run(llama, tmp_path / parameters, settings, dtype="bf16")
        assert done.improved
        assert {tensor.dtype for tensor in done.state.values()} == {torch.bfloat16}


def test_phases_count_in_training(llama: TinyModel, tmp_path: Path) -> None:
    """The control that is trained with all layers in both phases learns something else, and is measured all the same."""
    settings = replace(SHORT, steps=30, evaluate_every=30)
    phased, blind = (
        run(llama, tmp_path / "phased", settings),
        run(llama, tmp_path / "blind", replace(settings, phase_blind=True)),
    )
    assert blind.loss_before == phased.loss_before
    assert phased.history[-1].held_out_loss < blind.history[-1].held_out_loss
    assert blind.history[-1].training_loss != phased.history[-1].training_loss


def test_checkpointed_training_is_the_same(llama: TinyModel, tmp_path: Path) -> None:
    plain, saved = run(llama, tmp_path / "plain"), run(llama, tmp_path / "saved", replace(SHORT, checkpointing=True))
    assert same_bits(plain, saved)


def test_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    source = build_model("llama", tmp_path / "llama")
    with torch.no_grad():
        source.model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    source.model.save_pretrained(source.folder)
    with pytest.raises(HealingError, match="the loss is not a number any more after 0 steps"):
        run(source, tmp_path / "run")


def test_samples_without_responses_are_refused(llama: TinyModel, tmp_path: Path) -> None:
    schedule = split_schedule(llama)
    student = load_student(llama, schedule, tmp_path / "slim")
    samples = [*SAMPLES, replace(SAMPLES[0], response=None, place="items.jsonl, line 7")]
    with pytest.raises(DatasetError, match=r"items\.jsonl, line 7 has no response"):
        distill(llama.model, student, schedule, samples, settings=SHORT, folder=tmp_path / "state")


@pytest.mark.parametrize("package", ["accelerate", "peft"])
def test_missing_package_is_named(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=f"{package} is not installed") as caught:
        run(llama, tmp_path, replace(SHORT, parameters=LORA))
    assert caught.value.hint == "pip install 'voidprune[heal]'"


def test_document_is_json(llama: TinyModel, tmp_path: Path) -> None:
    from voidprune.artifacts import canonical_bytes

    document = run(llama, tmp_path).to_document()
    assert b'"improved": true' in canonical_bytes(document)
    assert document["history"][0] == {
        "step": 0,
        "held_out_loss": document["loss_before"],
        "training_loss": None,
        "tokens_per_second": None,
    }
    assert dataclasses.asdict(DistillLoss())["temperature"] == 1.0
