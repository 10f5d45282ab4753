"""Of a model on the Hub, only what is kept is fetched: whatever the server does, the bytes are right or the error is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import COMMIT, Hub, using_hub
from tests.models.test_checkpoint import shard
from tests.tiny_models import NUM_LAYERS, TinyModel, build_model
from voidprune.errors import ArtifactError, CheckpointError, ModelError
from voidprune.models import remote
from voidprune.models.checkpoint import Checkpoint, layer_tensor_order, open_checkpoint, read_tensor
from voidprune.models.copying import copy_tensors
from voidprune.models.downloads import Patience
from voidprune.models.remote import open_remote_checkpoint
from voidprune.models.tensors import TensorRecord, fetch_tensors, missing_bytes

HASTE = Patience(attempts=3, first_wait=0.001)
KEPT = (1, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Large enough for headers and layers to be apart: about 0.8 MB a layer."""
    folder = tmp_path_factory.mktemp("remote")
    return build_model("llama", folder / "model", hidden_size=128, intermediate_size=384)


@pytest.fixture(scope="module")
def published(model: TinyModel) -> Path:
    folder = shard(model, model.folder.parent / "published")
    (folder / "LICENSE").write_text("as you like")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(remote, "_START", 1 << 14)
    monkeypatch.setattr(remote, "_PART", 1 << 17)
    with using_hub(Hub("some/model", published), monkeypatch, tmp_path / "home") as hub:
        yield hub


def open_it() -> Checkpoint:
    return open_remote_checkpoint("some/model", patience=HASTE)


def kept_records(checkpoint: Checkpoint) -> list[TensorRecord]:
    return [record for _, record in layer_tensor_order(checkpoint, KEPT)]


def assert_same_copy(checkpoint: Checkpoint, model: TinyModel, folder: Path) -> None:
    copy_tensors(layer_tensor_order(checkpoint, KEPT), folder / "remote")
    copy_tensors(layer_tensor_order(model.checkpoint, KEPT), folder / "local")
    assert (folder / "remote").read_bytes() == (folder / "local").read_bytes()


def test_opening_reads_headers_only(hub: Hub, model: TinyModel) -> None:
    checkpoint = open_it()
    assert checkpoint.identity.fingerprint == model.identity.fingerprint
    assert (checkpoint.name, checkpoint.revision) == ("some/model", COMMIT)
    assert hub.weight_bytes_sent == 3 * (1 << 14)
    assert (checkpoint.folder / "LICENSE").read_text() == "as you like"
    assert not list(checkpoint.folder.glob("*.safetensors"))


@pytest.mark.parametrize("through_cdn", [True, False])
def test_kept_layers_arrive_and_others_do_not(hub: Hub, model: TinyModel, tmp_path: Path, through_cdn: bool) -> None:
    hub.through_cdn = through_cdn
    checkpoint = open_it()
    missing = missing_bytes(kept_records(checkpoint))
    before = hub.weight_bytes_sent
    assert_same_copy(checkpoint, model, tmp_path)
    assert hub.weight_bytes_sent - before == missing
    assert hub.weight_bytes_sent < 0.45 * checkpoint.num_bytes  # two layers of six, embedding and head
    assert missing_bytes(kept_records(checkpoint)) == 0


def test_progress_counts_every_byte_once(hub: Hub) -> None:
    hub.drops = 2
    records = kept_records(open_it())
    missing, told = missing_bytes(records), list[int]()
    fetch_tensors(records, advance=told.append)
    assert sum(told) == missing


def test_what_is_there_is_not_fetched_again(hub: Hub, model: TinyModel, tmp_path: Path) -> None:
    fetch_tensors(kept_records(open_it()))
    hub.requests.clear()
    hub.weight_bytes_sent = 0
    again = open_it()
    assert missing_bytes(kept_records(again)) == 0
    assert_same_copy(again, model, tmp_path)
    assert hub.weight_bytes_sent == 0
    assert not [path for _, path, _ in hub.requests if path.endswith(".safetensors")]


def test_reading_one_tensor_fetches_that_one(hub: Hub, model: TinyModel) -> None:
    checkpoint = open_it()
    name = "model.layers.3.mlp.up_proj.weight"
    before = hub.weight_bytes_sent
    assert (read_tensor(checkpoint.tensors[name]) == read_tensor(model.checkpoint.tensors[name])).all()
    assert hub.weight_bytes_sent - before <= checkpoint.tensors[name].num_bytes


@pytest.mark.parametrize(
    "trouble", [{"drops": 3}, {"busy": 2}, {"drops": 1, "busy": 1}, {"honours_ranges": False, "drops": 2}], ids=str
)
def test_connections_that_break_are_taken_up_again(
    hub: Hub, model: TinyModel, tmp_path: Path, trouble: dict[str, Any]
) -> None:
    vars(hub).update(trouble)
    assert_same_copy(open_it(), model, tmp_path)
    assert (hub.drops, hub.busy) == (0, 0), "the trouble came"


def test_an_interrupted_fetch_goes_on_where_it_stopped(hub: Hub, model: TinyModel, tmp_path: Path) -> None:
    class Interrupted(BaseException):
        """Stands for Ctrl-C."""

    def interrupt(amount: int) -> None:
        nonlocal seen
        seen += amount
        if seen > 500_000:
            raise Interrupted

    seen = 0
    records = kept_records(open_it())
    missing = missing_bytes(records)
    with pytest.raises(Interrupted):
        fetch_tensors(records, advance=interrupt)
    left = missing_bytes(kept_records(open_it()))
    assert 0 < left < missing
    hub.weight_bytes_sent = 0
    assert_same_copy(open_it(), model, tmp_path)
    assert hub.weight_bytes_sent == left


def test_server_without_ranges_sends_whole_shards(hub: Hub, model: TinyModel, published: Path, tmp_path: Path) -> None:
    hub.honours_ranges = False
    checkpoint = open_it()
    only = [record for record in kept_records(checkpoint) if record.file.name.startswith("model-00002")]
    size = (published / "model-00002-of-00003.safetensors").stat().st_size
    assert missing_bytes(only) == size
    told: list[int] = []
    fetch_tensors(only, advance=told.append)
    assert sum(told) == size
    assert missing_bytes(only) == 0
    assert_same_copy(checkpoint, model, tmp_path)


def test_server_that_forgets_ranges_later(hub: Hub, model: TinyModel, tmp_path: Path) -> None:
    open_it()
    hub.honours_ranges = False
    assert_same_copy(open_it(), model, tmp_path)  # nothing but journals told that there are ranges


# ---- what must not pass


def test_truncated_answers_end_in_an_error(hub: Hub) -> None:
    checkpoint = open_it()
    hub.short_by = 1 << 30
    with pytest.raises(ModelError, match=r"of some/model cannot be fetched: .*bytes arrived") as caught:
        fetch_tensors(kept_records(checkpoint))
    assert caught.value.hint == "run the command again: it goes on where it stopped"


def test_answers_a_little_short_are_asked_for_again(hub: Hub, model: TinyModel, tmp_path: Path) -> None:
    checkpoint = open_it()
    hub.short_by = 10_000
    with pytest.raises(ModelError, match="cannot be fetched"):
        fetch_tensors(kept_records(checkpoint))  # the last 10,000 bytes of each range never come
    hub.short_by = 0
    assert_same_copy(checkpoint, model, tmp_path)


@pytest.mark.parametrize("through_cdn", [True, False])
def test_changed_etag_is_named(hub: Hub, through_cdn: bool) -> None:
    hub.through_cdn = through_cdn
    checkpoint = open_it()
    hub.etag_suffix = "changed"
    with pytest.raises(CheckpointError, match="changed while it was being fetched: its ETag is another"):
        fetch_tensors(kept_records(checkpoint))


def test_changed_etag_is_named_on_resume(hub: Hub) -> None:
    open_it()
    hub.etag_suffix = "changed"
    with pytest.raises(CheckpointError, match="its ETag is another"):
        fetch_tensors(kept_records(open_it()))


def test_file_of_another_length_where_it_is_stored(hub: Hub) -> None:
    checkpoint = open_it()
    hub.total_offset = -1
    with pytest.raises(CheckpointError, match=r"bytes where it is stored; the Hub says"):
        fetch_tensors(kept_records(checkpoint))


def test_damaged_whole_shard_is_found(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without ranges sends the file once; its ETag is the SHA-256 of what should have come."""
    hub.honours_ranges = False
    checkpoint = open_it()
    write = remote._write_at
    monkeypatch.setattr(
        remote, "_write_at", lambda file, content, offset: write(file, bytes([content[0] ^ 1]) + content[1:], offset)
    )
    with pytest.raises(CheckpointError, match="arrived damaged: its SHA-256 is"):
        fetch_tensors(kept_records(checkpoint))


def test_full_disk_is_not_taken_for_a_bad_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from voidprune.errors import OutputError

    checkpoint = open_it()

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote.os, "pwrite", full)
    with pytest.raises(OutputError, match="No space left on device"):
        fetch_tensors(kept_records(checkpoint))


@pytest.mark.parametrize(
    "change",
    [{"size": -1}, {"size": "7"}, {"ranges": [[0]]}, {"ranges": 3}, {"commit": "f" * 40}, {"etag": None}],
    ids=str,
)
def test_broken_journal_is_named(hub: Hub, change: dict[str, Any]) -> None:
    folder = next(iter(open_it().tensors.values())).file.parent
    journal = sorted(folder.glob("*.json"))[0]
    journal.write_text(json.dumps({**json.loads(journal.read_text()), **change}))
    with pytest.raises(ArtifactError, match="is broken"):
        open_it()


def test_lost_data_file_starts_again(hub: Hub, model: TinyModel, tmp_path: Path) -> None:
    checkpoint = open_it()
    fetch_tensors(kept_records(checkpoint))
    for file in {record.file for record in checkpoint.tensors.values()}:
        file.unlink()
    assert_same_copy(open_it(), model, tmp_path)


# ---- what is no model


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: TinyModel) -> Iterator[Path]:
    folder = tmp_path / "other"
    folder.mkdir()
    shutil.copyfile(model.folder / "config.json", folder / "config.json")
    with using_hub(Hub("some/model", folder), monkeypatch, tmp_path / "home"):
        yield folder


def test_pickles_on_the_hub_are_refused_with_the_way_out(other: Path) -> None:
    (other / "pytorch_model.bin").write_bytes(b"cos\nsystem")
    with pytest.raises(ModelError, match=r"some/model holds pytorch_model\.bin but no model\.safetensors") as caught:
        open_it()
    assert caught.value.hint is not None
    assert "M.from_pretrained('\"'\"'some/model'\"'\"'" in caught.value.hint


def test_repository_without_weights(other: Path) -> None:
    with pytest.raises(ModelError, match=r"some/model holds no model\.safetensors"):
        open_it()


def test_repository_that_is_not_there(other: Path) -> None:
    with pytest.raises(ModelError, match="no model some/thing: not a folder here, and the Hub says"):
        open_remote_checkpoint("some/thing", patience=HASTE)


def test_index_with_a_missing_shard(other: Path) -> None:
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"some/model lacks the shard model-1\.safetensors"):
        open_it()


def test_header_longer_than_the_file(other: Path) -> None:
    (other / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x00" + b"x" * 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors of some/model says that its header has"):
        open_it()


def test_what_the_cache_holds_whole_is_not_fetched(hub: Hub, model: TinyModel) -> None:
    from voidprune.models.checkpoint import find_model

    folder = find_model("some/model")
    hub.weight_bytes_sent = 0
    checkpoint = open_it()
    assert checkpoint.revision is None
    assert (checkpoint.folder, hub.weight_bytes_sent) == (folder, 0)
    assert checkpoint.architecture.num_layers == NUM_LAYERS
    assert open_checkpoint(folder).identity.fingerprint == model.identity.fingerprint
