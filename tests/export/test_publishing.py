"""What goes over HTTP when a bundle is pushed, and what is refused before anything goes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeBundle
from tests.hub_server import Hub, using_hub
from tests.tiny_models import TinyModel
from voidprune.errors import ModelError, OutputError
from voidprune.export.publishing import check_push_target, push_bundle
from voidprune.schedule import dropped_schedule

# huggingface_hub 2.4 uploads with httpx2 in a way that httpx2 2.16 deprecates; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def bundle(llama: TinyModel, make_bundle: MakeBundle) -> Path:
    return make_bundle(llama, dropped_schedule(llama.identity, {2})).folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "there").mkdir()
    with using_hub(Hub("me/slim", tmp_path / "there", private=True), monkeypatch, tmp_path / "home") as hub:
        yield hub


@pytest.mark.parametrize("public", [False, True])
def test_a_push_makes_a_repository_and_one_commit(hub: Hub, bundle: Path, public: bool) -> None:
    hub.private = not public
    assert push_bundle(bundle, "me/slim", public=public).startswith(hub.url)
    posts = [(path, body) for method, path, body in hub.bodies if method == "POST"]
    (created,) = [json.loads(body) for path, body in posts if path == "/api/repos/create"]
    assert (created["name"], created["organization"]) == ("slim", "me")
    seen_by = created.get("visibility", "private" if created.get("private") else "public")  # 2.x says it in a word
    assert seen_by == ("public" if public else "private")
    (commit,) = [body for path, body in posts if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    files = {line["value"]["path"]: line for line in lines if line["key"] in ("file", "lfsFile")}
    assert files.keys() == {path.name for path in bundle.iterdir()}
    card = files["README.md"]["value"]
    assert base64.b64decode(card["content"]) == (bundle / "README.md").read_bytes()
    assert files["model.safetensors"]["key"] == "lfsFile"
    uploads = {path: body for method, path, body in hub.bodies if method == "PUT"}
    (weights,) = uploads.values()
    assert weights == (bundle / "model.safetensors").read_bytes()


def test_stale_shards_go(hub: Hub, bundle: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "voidprune.json", "figure.png"):
        (hub.folder / name).write_text("old")
    push_bundle(bundle, "me/slim")
    (commit,) = [body for _, path, body in hub.bodies if "/commit/" in path]
    gone = [json.loads(line)["value"]["path"] for line in commit.splitlines() if b"deletedFile" in line]
    assert gone == ["model-00001-of-00002.safetensors"]


@pytest.mark.parametrize(("private", "hint"), [(True, "leave --public out"), (False, "add --public")])
def test_visibility_is_never_changed_in_silence(hub: Hub, bundle: Path, private: bool, hint: str) -> None:
    hub.private = private
    with pytest.raises(OutputError, match="exists and is") as caught:
        push_bundle(bundle, "me/slim", public=private)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(hint)
    assert hub.bodies == []


def test_somebody_else_s_model_is_not_replaced(hub: Hub, bundle: Path) -> None:
    (hub.folder / "model.safetensors").write_text("precious")
    with pytest.raises(OutputError, match="was not written by this command"):
        push_bundle(bundle, "me/slim")
    assert hub.bodies == []


def test_a_new_name_is_free(hub: Hub) -> None:
    check_push_target("me/new", public=False)


def test_no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(OutputError, match="no token of the Hub is at hand"):
        check_push_target("me/slim", public=False)


def test_a_push_that_fails_says_how_to_push_again(hub: Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "refuses_uploads", True)
    with pytest.raises(OutputError, match="was written, but not pushed to me/slim") as caught:
        push_bundle(bundle, "me/slim")
    assert caught.value.hint == f"hf upload me/slim {bundle} --private"


def test_only_bundles_are_pushed(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a bundle"):
        push_bundle(tmp_path, "me/slim")
