"""The rules of a schedule, each with its words; what follows from the actions; the file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import schedules
from voidprune import artifacts
from voidprune.errors import ArtifactError, OutputError, ScheduleError
from voidprune.schedule import (
    KIND,
    VERSION,
    Boundary,
    LayerAction,
    ModelIdentity,
    Phase,
    Schedule,
    dropped_schedule,
    full_schedule,
    read_schedule,
    satisfy_kv_contract,
    write_schedule,
)

A = LayerAction
MODEL = ModelIdentity(name="tiny", model_type="llama", num_layers=4, fingerprint="sha256:" + "0" * 64)
GOLDEN = Path(__file__).parent / "golden" / "schedule.json"
GOLDEN_SCHEDULE = Schedule(
    model=MODEL,
    prefill=(A.FULL, A.KV_ONLY, A.KV_MLP, A.SKIP_ATTENTION),
    decode=(A.FULL, A.SKIP_MLP, A.FULL, A.SKIP),
    boundary=Boundary.DECODE,
    single_turn=False,
    origin={"criterion": "lac", "alpha": 0.8, "keep_prefill": 0.25, "seed": 7, "healed": False, "note": None},
)

two_phases = st.tuples(
    st.lists(st.sampled_from(A), min_size=4, max_size=4), st.lists(st.sampled_from(A), min_size=4, max_size=4)
)


def actions(text: str) -> tuple[LayerAction, ...]:
    return tuple(map(A, text.split()))


def build(prefill: str, decode: str, **fields: Any) -> Schedule:
    return Schedule(model=MODEL, prefill=actions(prefill), decode=actions(decode), **fields)


def refusal(make: Callable[[], object]) -> tuple[str, str | None]:
    with pytest.raises(ScheduleError) as caught:
        make()
    return caught.value.message, caught.value.hint


# ---- actions


@pytest.mark.parametrize(
    ("action", "attends", "writes_kv", "runs_mlp", "executes"),
    [
        (A.FULL, True, True, True, True),
        (A.SKIP_MLP, True, True, False, True),
        (A.SKIP_ATTENTION, False, False, True, True),
        (A.KV_MLP, False, True, True, True),
        (A.KV_ONLY, False, True, False, False),
        (A.SKIP, False, False, False, False),
    ],
)
def test_action_flags(action: LayerAction, attends: bool, writes_kv: bool, runs_mlp: bool, executes: bool) -> None:
    assert (action.attends, action.writes_kv, action.runs_mlp, action.executes) == (
        attends,
        writes_kv,
        runs_mlp,
        executes,
    )


def test_actions_fill_all_six_cells() -> None:
    cells = {(action.attends, action.writes_kv, action.runs_mlp) for action in A}
    assert len(A) == len(cells) == 6


@pytest.mark.parametrize("action", A)
def test_writing_kv_changes_nothing_else(action: LayerAction) -> None:
    mended = action.writing_kv()
    assert mended.writes_kv
    assert (mended.attends, mended.runs_mlp) == (action.attends, action.runs_mlp)
    assert (mended is action) == action.writes_kv


# ---- rules


@pytest.mark.parametrize("phase", Phase)
def test_phase_that_lists_too_few_layers(phase: Phase) -> None:
    lists = {"prefill": (A.FULL,) * 4, "decode": (A.FULL,) * 4, str(phase): (A.FULL,) * 3}
    assert refusal(lambda: Schedule(model=MODEL, **lists)) == (
        f"{phase} lists 3 layers; tiny has 4",
        "list one action for every layer of the model",
    )


@pytest.mark.parametrize("idle", ["skip skip skip skip", "kv_only kv_only kv_only kv_only", "skip kv_only skip skip"])
def test_prefill_in_which_no_layer_executes(idle: str) -> None:
    assert refusal(lambda: build(idle, "skip_attention skip skip skip")) == (
        "no layer executes in prefill",
        'make at least one layer of prefill "full"',
    )


def test_decode_in_which_no_layer_executes() -> None:
    assert refusal(lambda: build("full skip skip skip", "kv_only skip skip skip")) == (
        "no layer executes in decode",
        'make at least one layer of decode "full"',
    )


@pytest.mark.parametrize("attending", ["full", "skip_mlp"])
@pytest.mark.parametrize(("silent", "mend"), [("skip", "kv_only"), ("skip_attention", "kv_mlp")])
@pytest.mark.parametrize("single_turn", [False, True])
def test_decode_attends_without_keys_and_values_of_the_prompt(
    attending: str, silent: str, mend: str, single_turn: bool
) -> None:
    message, hint = refusal(
        lambda: build(f"full full {silent} full", f"full full {attending} full", single_turn=single_turn)
    )
    assert message == "layer 2 attends in decode but prefill writes no K/V for it"
    assert hint == f'make prefill[2] "{mend}", or decode[2] "skip"'
    build(f"full full {mend} full", f"full full {attending} full", single_turn=single_turn)
    build(f"full full {silent} full", "full full skip full", single_turn=single_turn)


@pytest.mark.parametrize("attending", ["full", "skip_mlp"])
@pytest.mark.parametrize(("silent", "mend"), [("skip", "kv_only"), ("skip_attention", "kv_mlp")])
def test_prefill_attends_without_keys_and_values_of_the_response(attending: str, silent: str, mend: str) -> None:
    message, hint = refusal(lambda: build(f"full {attending} full full", f"full {silent} full full"))
    assert message == ("layer 1 attends in prefill but decode writes no K/V for it, so a second turn would miss them")
    assert hint == f'make decode[1] "{mend}", or set single_turn'
    build(f"full {attending} full full", f"full {mend} full full")
    build(f"full {attending} full full", f"full {silent} full full", single_turn=True)


def test_unknown_action_and_boundary_cannot_be_constructed() -> None:
    with pytest.raises(ValueError, match="'half' is not a valid LayerAction"):
        Schedule(model=MODEL, prefill=("full", "full", "full", "half"), decode=(A.FULL,) * 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'middle' is not a valid Boundary"):
        build("full full full full", "full full full full", boundary="middle")


def test_a_schedule_is_frozen() -> None:
    schedule = full_schedule(MODEL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.prefill = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        schedule.origin["criterion"] = "other"  # type: ignore[index]


def test_origin_is_a_copy() -> None:
    origin = {"criterion": "lac"}
    schedule = build("full full full full", "full full full full", origin=origin)
    origin["criterion"] = "other"
    assert schedule.origin == {"criterion": "lac"}


# ---- the K/V contract


@given(two_phases, st.booleans())
def test_contract_adds_writes_and_nothing_else(
    phases: tuple[list[LayerAction], list[LayerAction]], single_turn: bool
) -> None:
    prefill, decode = phases
    new_prefill, new_decode = satisfy_kv_contract(prefill, decode, single_turn=single_turn)
    for layer in range(4):
        needed_in_prefill = decode[layer].attends
        needed_in_decode = prefill[layer].attends and not single_turn
        assert new_prefill[layer] == (prefill[layer].writing_kv() if needed_in_prefill else prefill[layer])
        assert new_decode[layer] == (decode[layer].writing_kv() if needed_in_decode else decode[layer])
    assert satisfy_kv_contract(new_prefill, new_decode, single_turn=single_turn) == (new_prefill, new_decode)
    if any(action.executes for action in prefill) and any(action.executes for action in decode):
        Schedule(model=MODEL, prefill=new_prefill, decode=new_decode, single_turn=single_turn)


@given(two_phases, st.booleans())
def test_a_schedule_is_accepted_exactly_when_the_rules_hold(
    phases: tuple[list[LayerAction], list[LayerAction]], single_turn: bool
) -> None:
    """The rules once more, in the words of sets."""
    prefill, decode = phases
    runs = all(any(action in ("full", "skip_mlp", "skip_attention", "kv_mlp") for action in phase) for phase in phases)
    silent, reads = {A.SKIP, A.SKIP_ATTENTION}, {A.FULL, A.SKIP_MLP}
    broken = any(
        (after in reads and before in silent) or (before in reads and after in silent and not single_turn)
        for before, after in zip(prefill, decode, strict=True)
    )
    if runs and not broken:
        Schedule(model=MODEL, prefill=tuple(prefill), decode=tuple(decode), single_turn=single_turn)
    else:
        with pytest.raises(ScheduleError):
            Schedule(model=MODEL, prefill=tuple(prefill), decode=tuple(decode), single_turn=single_turn)


def test_freezing_layers_is_keys_and_values_only_from_a_layer_up() -> None:
    """arXiv 2409.03621 and SwiftKV: the planner skips, the contract makes it K/V only."""
    prefill, decode = satisfy_kv_contract(actions("full full skip skip"), actions("full full full full"))
    assert prefill == actions("full full kv_only kv_only")
    assert decode == actions("full full full full")


def test_skipping_attention_from_a_layer_up() -> None:
    phase = actions("full full skip_attention skip_attention")
    assert satisfy_kv_contract(phase, phase) == (phase, phase)
    schedule = Schedule(model=MODEL, prefill=phase, decode=phase)
    assert schedule.kv_layers == (0, 1)
    assert schedule.union == (0, 1, 2, 3)


def test_dropping_is_skipping_in_both_phases() -> None:
    schedule = dropped_schedule(MODEL, [1, 2])
    assert schedule.prefill == schedule.decode == actions("full skip skip full")
    assert schedule.union == schedule.kv_layers == (0, 3)
    assert not schedule.single_turn


def test_dropping_every_layer_is_refused() -> None:
    assert refusal(lambda: dropped_schedule(MODEL, range(4)))[0] == "no layer executes in prefill"


# ---- what follows


def test_union_slots_and_counts() -> None:
    schedule = build("full skip kv_only skip_attention", "full skip skip_mlp skip")
    assert schedule.union == (0, 2, 3)
    assert schedule.kv_layers == (0, 2)
    assert schedule.num_executed(Phase.PREFILL) == 2
    assert schedule.num_executed(Phase.DECODE) == 2
    assert not schedule.is_full
    assert full_schedule(MODEL).is_full
    assert full_schedule(MODEL, boundary=Boundary.PREFILL).boundary is Boundary.PREFILL


def test_defaults() -> None:
    schedule = build("full full full full", "full full full full")
    assert schedule.boundary is Boundary.DECODE
    assert schedule.single_turn is False


@given(schedules(MODEL))
def test_renumbered_schedule_keeps_the_actions_of_the_union(schedule: Schedule) -> None:
    slim = dataclasses.replace(MODEL, name="slim", num_layers=len(schedule.union), fingerprint="sha256:1")
    renumbered = schedule.on_slim_model(slim)
    assert renumbered.model == slim
    assert renumbered.union == tuple(range(len(schedule.union)))
    for position, layer in enumerate(schedule.union):
        assert renumbered.prefill[position] == schedule.prefill[layer]
        assert renumbered.decode[position] == schedule.decode[layer]
    assert (renumbered.boundary, renumbered.single_turn) == (schedule.boundary, schedule.single_turn)
    assert len(renumbered.kv_layers) == len(schedule.kv_layers)
    assert [schedule.union[layer] for layer in renumbered.kv_layers] == list(schedule.kv_layers)


def test_schedule_of_another_model_is_refused() -> None:
    schedule = full_schedule(MODEL)
    schedule.check_model(dataclasses.replace(MODEL, name="a fine-tuning"), place="schedule.json")
    other = ModelIdentity(name="other", model_type="qwen2", num_layers=4, fingerprint="sha256:f")
    assert refusal(lambda: schedule.check_model(other, place="schedule.json")) == (
        "schedule.json is for tiny (llama, 4 layers), not for other (qwen2, 4 layers)",
        "profile and plan the model that you export",
    )
    longer = dataclasses.replace(MODEL, num_layers=5)
    assert "not for tiny (llama, 5 layers)" in refusal(lambda: schedule.check_model(longer, place="it"))[0]


# ---- the file


@given(schedules(MODEL))
def test_document_round_trip(schedule: Schedule) -> None:
    content = artifacts.canonical_bytes(schedule.to_document())
    document = artifacts.parse_document(content, kind=KIND, version=VERSION, place="here")
    again = Schedule.from_document(document, place="here")
    assert again == schedule
    assert artifacts.canonical_bytes(again.to_document()) == content


def test_file_is_byte_for_byte_the_golden_file(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    write_schedule(path, GOLDEN_SCHEDULE)
    assert path.read_bytes() == GOLDEN.read_bytes()
    assert read_schedule(GOLDEN) == GOLDEN_SCHEDULE


def test_existing_file_is_kept_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    write_schedule(path, GOLDEN_SCHEDULE)
    with pytest.raises(OutputError, match=re.escape(f"{path} exists")):
        write_schedule(path, full_schedule(MODEL))
    assert read_schedule(path) == GOLDEN_SCHEDULE
    write_schedule(path, full_schedule(MODEL), overwrite=True)
    assert read_schedule(path) == full_schedule(MODEL)
    assert [file.name for file in tmp_path.iterdir()] == ["schedule.json"]


def test_broken_rule_in_a_file_names_the_file(tmp_path: Path) -> None:
    document = GOLDEN_SCHEDULE.to_document()
    document["prefill"][1] = "skip"
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(document))
    assert refusal(lambda: read_schedule(path)) == (
        f"layer 1 attends in decode but prefill writes no K/V for it ({path})",
        'make prefill[1] "kv_only", or decode[1] "skip"',
    )


def _set(*keys: str | int, value: Any) -> Callable[[Any], Any]:
    def change(document: Any) -> Any:
        inner = document
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return document

    return change


def _without(*keys: str) -> Callable[[Any], Any]:
    def change(document: Any) -> Any:
        inner = document
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return document

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("decode"), "here lacks decode"),
        (_without("schema"), "is not a schedule: its schema is None"),
        (_set("colour", value=1), "here has unknown keys: colour"),
        (_set("schema", value="voidprune.profile/1"), "is not a schedule: its schema is 'voidprune.profile/1'"),
        (
            _set("schema", value="voidprune.schedule/2"),
            "has schedule format 2; this version of voidprune reads format 1",
        ),
        (_set("schema", value="voidprune.schedule/new"), "has schedule format new"),
        (_set("schema", value=7), "is not a schedule: its schema is 7"),
        (_set("prefill", value="full"), "here: prefill is not a list of actions"),
        (_set("prefill", value=None), "here: prefill is not a list of actions"),
        (_set("decode", 2, value="half"), r"here: decode\[2\] is 'half'"),
        (_set("decode", 2, value=["full"]), r"here: decode\[2\] is \['full'\]"),
        (_set("decode", 2, value=None), r"here: decode\[2\] is None"),
        (_set("boundary", value="middle"), "here: boundary is 'middle'"),
        (_set("boundary", value=[]), r"here: boundary is \[\]"),
        (_set("single_turn", value="no"), "here: single_turn is not true or false"),
        (_set("single_turn", value=0), "here: single_turn is not true or false"),
        (_set("origin", value=[]), "here: origin is not an object of plain values"),
        (_set("origin", value={"deep": {"er": 1}}), "here: origin is not an object of plain values"),
        (_set("model", value="tiny"), "here: model is not an object"),
        (_without("model", "fingerprint"), "here: model lacks fingerprint"),
        (_set("model", "size", value=1), "here: model has unknown keys: size"),
        (_set("model", "num_layers", value=True), "here: model.num_layers is not of type int"),
        (_set("model", "num_layers", value="4"), "here: model.num_layers is not of type int"),
        (_set("model", "name", value=None), "here: model.name is not of type str"),
    ],
)
def test_hostile_documents_have_named_errors(change: Callable[[Any], Any], message: str) -> None:
    content = json.dumps(change(GOLDEN_SCHEDULE.to_document())).encode()
    with pytest.raises(ArtifactError, match=message):
        Schedule.from_document(
            artifacts.parse_document(content, kind=KIND, version=VERSION, place="here"), place="here"
        )


@pytest.mark.parametrize("num_layers", [-1, 0, 3, 10**12])
def test_document_whose_layer_count_is_wrong(num_layers: int) -> None:
    document = _set("model", "num_layers", value=num_layers)(GOLDEN_SCHEDULE.to_document())
    message, hint = refusal(lambda: Schedule.from_document(document, place="here"))
    assert message == f"prefill lists 4 layers; tiny has {num_layers} (here)"
    assert hint == "list one action for every layer of the model"
