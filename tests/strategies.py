"""Random values for Hypothesis. Valid by construction, so that no example is thrown away."""

from __future__ import annotations

from hypothesis import strategies as st

from voidprune.schedule import Boundary, LayerAction, ModelIdentity, Schedule, satisfy_kv_contract


@st.composite
def schedules(
    draw: st.DrawFn,
    model: ModelIdentity,
    *,
    boundary: Boundary | None = None,
    single_turn: bool | None = None,
) -> Schedule:
    """Any valid schedule of a model: all six actions, in both phases, in any combination that the rules allow."""
    phases = []
    for _ in range(2):
        actions = draw(st.lists(st.sampled_from(LayerAction), min_size=model.num_layers, max_size=model.num_layers))
        if not any(action.executes for action in actions):
            layer = draw(st.integers(0, model.num_layers - 1))
            actions[layer] = draw(st.sampled_from([action for action in LayerAction if action.executes]))
        phases.append(actions)
    single_turn = draw(st.booleans()) if single_turn is None else single_turn
    prefill, decode = satisfy_kv_contract(*phases, single_turn=single_turn)
    return Schedule(
        model=model,
        prefill=prefill,
        decode=decode,
        boundary=draw(st.sampled_from(Boundary)) if boundary is None else boundary,
        single_turn=single_turn,
        origin={"criterion": "random"},
    )
