"""Fixtures: tiny random models of every family, bundles made of them, and the trained models where they are present."""

from __future__ import annotations

import contextlib
import functools
import os

# Read by huggingface_hub when it is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.tiny_models import CORE_SHAPES, GRAPH_SHAPES, SHAPES, TinyModel, build_model
from voidprune.doctor import collection
from voidprune.errors import RuntimeProviderError
from voidprune.execution.manifest import Manifest, Parity
from voidprune.execution.providers import require_integer_products, size_thread_pool
from voidprune.execution.session import BundleSession
from voidprune.export.bundle import export_bundle
from voidprune.models.checkpoint import open_checkpoint
from voidprune.quality.parity import check_bundle
from voidprune.schedule import LayerAction, Schedule

TRAINED = Path(__file__).resolve().parents[2] / "shared" / "data" / "models"

settings.register_profile(
    "voidprune",
    deadline=None,
    max_examples=15,
    derandomize="VOIDPRUNE_EXPLORE" not in os.environ,  # the same examples in every run, or others in each
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
    print_blob=True,
)
settings.load_profile("voidprune")


@dataclass(frozen=True)
class Bundle:
    """An exported and verified folder."""

    source: TinyModel
    schedule: Schedule
    folder: Path
    manifest: Manifest
    session: BundleSession

    @property
    def parity(self) -> Parity:
        assert self.manifest.parity is not None
        return self.manifest.parity


class MakeBundle(Protocol):
    def __call__(self, source: TinyModel, schedule: Schedule, *, operators: str = "ort") -> Bundle: ...


def open_plainly(graph: Path | bytes) -> ort.InferenceSession:
    """A session of onnxruntime as it comes, on the threads that all sessions of the process share."""
    with contextlib.suppress(RuntimeProviderError):  # another test was first
        size_thread_pool(1)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.use_per_session_threads = False
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@pytest.fixture
def patient_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examinations may take as long as they like: nobody knows how busy the machine is that the tests run on."""
    for name in ("IMPORT_SECONDS", "PROVIDER_SECONDS", "MODEL_SECONDS"):
        monkeypatch.setattr(collection, name, 3600.0)


GetModel = Callable[[str], TinyModel]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """On matrices this small a second thread only costs."""
    torch.set_num_threads(1)


W8A8, W8A8_INT4 = (pytest.param(name, marks=pytest.mark.integer_products) for name in ("w8a8", "w8a8-int4"))
"""Precisions, as parameters of tests that run their graphs."""


@functools.cache
def _integers_multiply() -> bool:
    try:
        require_integer_products("anything")
    except RuntimeProviderError:
        return False
    return True


@pytest.fixture(autouse=True)
def _integer_products(request: pytest.FixtureRequest) -> None:
    """Graphs that multiply numbers of 8 bits are refused on processors that do it wrongly, so there is nothing to test there."""
    if request.node.get_closest_marker("integer_products") and not _integers_multiply():
        pytest.skip("products of 8-bit numbers overflow on this processor")


@pytest.fixture(autouse=True)
def _clean_working_directory(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Each test works in an empty folder and leaves it empty."""
    folder = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(folder)
    yield
    assert not sorted(folder.iterdir()), "the test left files in the working directory"


@pytest.fixture(scope="session")
def get_model(tmp_path_factory: pytest.TempPathFactory) -> GetModel:
    """The tiny model of a shape, built once. Read only."""
    made: dict[str, TinyModel] = {}

    def get(name: str) -> TinyModel:
        if name not in made:
            made[name] = build_model(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return get


@pytest.fixture(scope="session", params=sorted(CORE_SHAPES))
def tiny_model(request: pytest.FixtureRequest, get_model: GetModel) -> TinyModel:
    """Every shape of the families that differ least, in turn: for what does not depend on the family."""
    return get_model(request.param)


@pytest.fixture(scope="session", params=sorted(GRAPH_SHAPES))
def graph_model(request: pytest.FixtureRequest, get_model: GetModel) -> TinyModel:
    """Every shape of every family of which graphs are authored, in turn."""
    return get_model(request.param)


@pytest.fixture(scope="session", params=sorted(SHAPES))
def family_model(request: pytest.FixtureRequest, get_model: GetModel) -> TinyModel:
    """Every shape of every family in turn."""
    return get_model(request.param)


@pytest.fixture(scope="session")
def llama(get_model: GetModel) -> TinyModel:
    return get_model("llama")


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """The verified bundle of a model under a schedule, made once. Read only."""
    made: dict[tuple[Path, tuple[LayerAction, ...], tuple[LayerAction, ...], str, bool, str], Bundle] = {}

    def make(source: TinyModel, schedule: Schedule, *, operators: str = "ort") -> Bundle:
        key = (
            source.folder,
            schedule.prefill,
            schedule.decode,
            str(schedule.boundary),
            schedule.single_turn,
            operators,
        )
        if key not in made:
            folder = tmp_path_factory.mktemp("bundles") / source.name
            manifest = export_bundle(
                source.checkpoint,
                schedule,
                folder,
                operators=operators,
                verify=lambda stage: check_bundle(stage, source=source.model, schedule=schedule),
            )
            made[key] = Bundle(source, schedule, folder, manifest, BundleSession(folder))
        return made[key]

    return make


def _trained(name: str) -> TinyModel:
    folder = TRAINED / name
    if not folder.is_dir():
        pytest.skip(f"the trained model {name} is not beside the repository")
    assert open_checkpoint(folder).architecture.num_layers == 5
    return TinyModel(name, folder)


@pytest.fixture(scope="session")
def stories260k() -> TinyModel:
    """A trained Llama of 260,000 parameters that tells stories."""
    return _trained("stories260k")


@pytest.fixture(scope="session")
def babyllama() -> TinyModel:
    """A trained Llama of a million parameters and a vocabulary of 105."""
    return _trained("babyllama-105")
