"""The front matter that the Hub reads, and what a card says of quality, read back as the Hub reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny_models import TinyModel
from voidprune.errors import ModelError
from voidprune.execution.manifest import Manifest, Parity
from voidprune.export.bundle import export_bundle
from voidprune.export.model_card import describe_card, read_card, write_model_card
from voidprune.schedule import dropped_schedule

PARITY = Parity(hf=3e-6, onnx=None, tolerance=1e-4, num_prompts=6, num_decode_steps=4)


@pytest.fixture(scope="module")
def manifest(llama: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return export_bundle(
        llama.checkpoint,
        dropped_schedule(llama.identity, {1, 4}),
        tmp_path_factory.mktemp("card") / "out",
        formats=("hf",),
        verify=lambda _stage: PARITY,
    )


def front_matter(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    parsed: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return parsed


@pytest.mark.parametrize(
    ("card", "inherited"),
    [
        ("# No metadata", {}),
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlanguage: [no, en]\n---\n", {"language": ["no", "en"]}),
        ("---\nlanguage: no\n---\n", {"language": ["no"]}),
        (
            "---\nlicense: other\nlicense_name: a\nlicense_link: LICENSE\ntags: [x]\nbase_model: b/c\n---\n",
            {"license": "other", "license_name": "a", "license_link": "LICENSE"},
        ),
    ],
)
def test_licence_and_languages_are_the_source_s(
    manifest: Manifest, tmp_path: Path, card: str, inherited: dict[str, Any]
) -> None:
    (tmp_path / "README.md").write_text(card)
    source_card = read_card(tmp_path / "README.md")
    write_model_card(tmp_path, replace(manifest, source="some/model"), source_card=source_card)
    assert front_matter(tmp_path) == inherited | {
        "base_model": "some/model",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["voidprune", "layer-pruning"],
    }


@pytest.mark.parametrize("source", ["model", "a/b/c", "some/mod\u00e8l", "with space/model"])
def test_base_model_is_an_id_or_nothing(manifest: Manifest, source: str) -> None:
    assert "base_model" not in describe_card(replace(manifest, source=source), {})


def test_layers_map_to_those_of_the_source(manifest: Manifest, tmp_path: Path) -> None:
    write_model_card(tmp_path, manifest, source_card={})
    rows = [
        line.split("|")[1:-1] for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| ")
    ]
    new = [row[3].strip() for row in rows[1:]]
    assert new == ["0", "dropped", "1", "2", "dropped", "3"]


@pytest.mark.parametrize("content", [b"---\nlicense: [\n---\n", b"---\n- a\n---\n", b"---\nlicense: mit\n---\n\xff"])
def test_broken_cards_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(ModelError, match=r"metadata of .*README\.md is not YAML"):
        read_card(tmp_path / "README.md")


def test_no_card_is_no_metadata(tmp_path: Path) -> None:
    assert read_card(tmp_path / "README.md") == {}


def test_how_it_was_verified(manifest: Manifest, tmp_path: Path) -> None:
    def verified(parity: Parity | None, dtype: str = "F32") -> str:
        write_model_card(tmp_path, replace(manifest, parity=parity, dtype=dtype), source_card={})
        return (tmp_path / "README.md").read_text().split("## Verified\n\n")[1]

    whole = verified(PARITY, "F16")
    assert "6 prompts with 4 decode steps each and a second turn: of the checkpoint, 3e-06; allowed, 0.0001" in whole
    assert "the source model, its weights in F16," in whole
    assert "layers loaded one at a time" not in whole
    assert "layers loaded one at a time" in verified(replace(PARITY, layer_streamed=True))
    assert verified(None).startswith("Not verified")
