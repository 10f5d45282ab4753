"""Single requests to a server that misbehaves; what they are for is tested in `test_remote.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.hub_server import COMMIT, Hub, using_hub
from voidprune.errors import CheckpointError, ModelError
from voidprune.models import downloads
from voidprune.models.downloads import (
    Patience,
    RangesIgnored,
    RemoteFile,
    access_hint,
    fetch_range,
    fetch_start,
    fetch_whole,
    inspect_file,
)

NAME = "model.safetensors"
CONTENT = bytes(range(256)) * 40
HASTE = Patience(attempts=3, first_wait=0.001)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / NAME).write_bytes(CONTENT)
    with using_hub(Hub("some/model", tmp_path / "there"), monkeypatch, tmp_path / "home") as hub:
        yield hub


class Received:
    """A sink that keeps what arrives where it belongs."""

    def __init__(self) -> None:
        self.content = bytearray(len(CONTENT))

    def __call__(self, offset: int, piece: bytes) -> None:
        self.content[offset : offset + len(piece)] = piece


def inspected() -> RemoteFile:
    return inspect_file("some/model", NAME, COMMIT)


@pytest.mark.parametrize("through_cdn", [True, False])
def test_size_and_hash_are_those_of_the_file(hub: Hub, through_cdn: bool) -> None:
    hub.through_cdn = through_cdn
    found = inspected()
    assert (found.size, found.etag) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (17, 300), (len(CONTENT) - 1, 1), (0, len(CONTENT))])
def test_a_range_is_those_bytes_and_no_more(hub: Hub, offset: int, length: int) -> None:
    received = Received()
    fetch_range(inspected(), offset, length, received, patience=HASTE)
    expected = bytearray(len(CONTENT))
    expected[offset : offset + length] = CONTENT[offset : offset + length]
    assert received.content == expected
    assert hub.weight_bytes_sent == length


def test_a_broken_connection_goes_on_where_it_stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_PIECE", 50)
    file, received = inspected(), Received()
    hub.drops = 2
    fetch_range(file, 100, 1000, received, patience=HASTE)
    assert received.content[100:1100] == CONTENT[100:1100]
    assert hub.ranges_of(NAME)[-1] == "bytes=850-1099"


def test_a_busy_server_is_asked_again_but_not_for_ever(hub: Hub) -> None:
    file, received = inspected(), Received()
    hub.busy = 2
    fetch_range(file, 0, 10, received, patience=HASTE)
    assert received.content[:10] == CONTENT[:10]
    hub.busy = 3
    with pytest.raises(ModelError, match=r"model\.safetensors of some/model cannot be fetched: the Hub answers 503"):
        fetch_range(file, 0, 10, received, patience=HASTE)


def test_a_server_without_ranges_is_found_out(hub: Hub) -> None:
    hub.honours_ranges = False
    with pytest.raises(RangesIgnored):
        fetch_range(inspected(), 5, 10, Received(), patience=HASTE)
    assert fetch_start(inspected(), 20, patience=HASTE) == (CONTENT[:20], False)
    hub.honours_ranges = True
    assert fetch_start(inspected(), 20, patience=HASTE) == (CONTENT[:20], True)


def test_a_whole_file_that_breaks_off_starts_again(hub: Hub) -> None:
    file, received = inspected(), Received()
    hub.honours_ranges, hub.drops = False, 1
    fetch_whole(file, received, patience=HASTE)
    assert received.content == CONTENT
    hub.drops = 3
    with pytest.raises(ModelError, match="cannot be fetched"):
        fetch_whole(file, received, patience=HASTE)


def test_who_was_let_in_and_is_not_any_more(hub: Hub) -> None:
    file = inspected()
    hub.denies = (403, "GatedRepo")
    with pytest.raises(ModelError, match="the Hub answers 403") as caught:
        fetch_range(file, 0, 10, Received(), patience=HASTE)
    assert caught.value.hint == "check your access"


def test_another_file_under_the_same_name(hub: Hub) -> None:
    file = inspected()
    hub.etag_suffix = "-new"
    with pytest.raises(CheckpointError, match="its ETag is another"):
        fetch_range(file, 0, 10, Received(), patience=HASTE)


def test_offline_the_hint_is_a_folder() -> None:
    """The other hints are tested where the Hub answers: `tests/pipeline/test_export.py`, `test_remote.py`."""
    assert access_hint(LocalEntryNotFoundError("offline")).endswith("offline, give the path of a local folder")
