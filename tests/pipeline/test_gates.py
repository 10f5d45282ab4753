"""What passes a gate and what does not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from voidprune.errors import DatasetError, ModelError, QualityGateError
from voidprune.pipeline.evaluation import ONNX, REFERENCE, WHOLE, EvaluationReport
from voidprune.pipeline.gates import Gates
from voidprune.profiling.calibration import Row
from voidprune.quality.evaluation import Evaluation


def report(*, onnx: Sequence[bool] = (True, False, True, True), nll: float = 2.0) -> EvaluationReport:
    def evaluation(right: Sequence[bool], nll: float) -> Evaluation:
        groups = ("a", "a", "b", "b")
        return Evaluation(np.array([nll]), np.array([10.0]), np.array(right, np.bool_), groups)

    evaluations = {
        WHOLE: evaluation((True,) * 4, 2.0),
        REFERENCE: evaluation((True,) * 4, 2.0),
        ONNX: evaluation(onnx, nll),
    }
    return EvaluationReport("tiny", "sha256:0", "data", 4, 64, evaluations)


@pytest.mark.parametrize(
    "gates",
    [
        Gates(),
        Gates(min_scores={"a": 0.5, "b": 1.0}),
        Gates(min_score=0.5),
        Gates(min_scores={"a": 0.5}, min_score=0.9),  # a task's own gate goes before the one of all
        Gates(max_ppl_ratio=1.0),
    ],
)
def test_a_gate_that_is_met(gates: Gates) -> None:
    gates.check(report())


def test_the_onnx_bundle_is_judged_not_its_reference() -> None:
    with pytest.raises(
        QualityGateError, match=r"tiny \(onnx\) misses its gate: a scores 0.5000, asked is at least 0.6"
    ):
        Gates(min_score=0.6).check(report())


def test_every_missed_gate_is_told() -> None:
    with pytest.raises(QualityGateError) as caught:
        Gates(min_scores={"b": 0.9}, max_ppl_ratio=1.05).check(
            report(onnx=(True, True, True, False), nll=3.0), consequence="nothing was published"
        )
    assert "b scores 0.5000, asked is at least 0.9" in caught.value.message
    assert "perplexity is 1.1052 times that of the whole model, asked is at most 1.05" in caught.value.message
    assert str(caught.value.hint).startswith("nothing was published; ")
    assert caught.value.exit_code == 3


def test_gates_that_cannot_be_measured() -> None:
    answered, scored = Row("here", answer="x", group="a"), Row("here", response="x")
    Gates(min_score=0.5, min_scores={"a": 0.5}).check_rows([answered], has_whole=False)
    Gates(max_ppl_ratio=1.1).check_rows([scored], has_whole=True)
    Gates(max_ppl_ratio=1.1).check_rows([Row("here", text="x")], has_whole=True)
    with pytest.raises(DatasetError, match="the task b has no score") as caught:
        Gates(min_scores={"b": 0.5}).check_rows([answered], has_whole=True)
    assert caught.value.hint == "tasks with a score: a"
    with pytest.raises(DatasetError, match="no task has a score"):
        Gates(min_score=0.5).check_rows([scored], has_whole=True)
    with pytest.raises(DatasetError, match="no item has a response"):
        Gates(max_ppl_ratio=1.1).check_rows([answered], has_whole=True)
    with pytest.raises(ModelError, match="the perplexity ratio is to the whole model"):
        Gates(max_ppl_ratio=1.1).check_rows([scored], has_whole=False)
