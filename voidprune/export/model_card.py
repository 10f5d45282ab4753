"""The README.md of an exported folder: what was dropped, what it is worth, what to know before using it."""

from __future__ import annotations

from pathlib import Path

from voidprune.execution.manifest import Manifest
from voidprune.schedule import Boundary, LayerAction, Phase


def write_model_card(folder: Path, manifest: Manifest) -> None:
    (folder / "README.md").write_text(_render(manifest))


def _render(manifest: Manifest) -> str:
    schedule = manifest.schedule
    rows = [
        f"| {layer} | {schedule.prefill[layer]} | {schedule.decode[layer]} | {_new_number(manifest, layer)} |"
        for layer in range(schedule.num_layers)
    ]
    return "\n".join(
        [
            "---",
            f"base_model: {manifest.source}",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [voidprune, layer-pruning]",
            "---",
            "",
            f"# {manifest.source}, with fewer decoder layers",
            "",
            f"Written by {manifest.written_by}. {len(manifest.kept_layers)} of {schedule.num_layers} layers are in the "
            f"checkpoint; prefill executes {schedule.num_executed(Phase.PREFILL)} of them, decode "
            f"{schedule.num_executed(Phase.DECODE)}. Weights: {manifest.sizes['model.safetensors']:,} bytes, of the "
            f"source {manifest.source_bytes:,}.",
            "",
            "## Know before use",
            "",
            *(f"- {caveat}" for caveat in caveats(manifest)),
            "",
            "## Schedule",
            "",
            "| original layer | prefill | decode | layer here |",
            "|---|---|---|---|",
            *rows,
            "",
            "The last prompt token runs the decode schedule."
            if schedule.boundary is Boundary.DECODE
            else "All prompt tokens run the prefill schedule.",
            "",
            "## Verified",
            "",
            _render_parity(manifest),
            "",
        ]
    )


def caveats(manifest: Manifest) -> list[str]:
    """What a user of the folder has to know, decided from its schedule."""
    schedule = manifest.schedule
    found = []
    if not schedule.is_full:
        found.append(
            "Leaving out layers costs quality, in generation far more than in multiple choice, unless the model is healed. "
            "Measure it on your own task with voidprune eval."
        )
    if schedule.prefill != schedule.decode or any(
        action not in (LayerAction.FULL, LayerAction.SKIP) for action in schedule.prefill
    ):
        found.append(
            "Stock transformers loads this folder and runs every layer in it, in both phases. Only the ONNX graphs (and "
            "voidprune's reference) follow the schedule."
        )
    if schedule.single_turn:
        found.append("The schedule is for one prompt and one response; a second turn is refused.")
    frozen = [
        layer
        for layer in range(schedule.num_layers)
        if schedule.decode[layer].attends and not schedule.prefill[layer].attends
    ]
    if frozen:
        layers = ", ".join(map(str, frozen))
        found.append(
            f"Layers {layers} attend in decode only: their keys and values of the prompt are made from a residual stream "
            "that fewer layers have changed."
        )
    return found or ["This is the whole model."]


def _new_number(manifest: Manifest, layer: int) -> str:
    return str(manifest.kept_layers.index(layer)) if layer in manifest.kept_layers else "dropped"


def _render_parity(manifest: Manifest) -> str:
    parity = manifest.parity
    assert parity is not None, "nothing unverified is published"
    onnx = "" if parity.onnx is None else f"; of the ONNX graphs, {parity.onnx:.2g}"
    return (
        f"Largest difference of logits from the reference (the source model with the dropped parts left out), over "
        f"{parity.num_prompts} prompts with {parity.num_decode_steps} decode steps each and a second turn: of the checkpoint, "
        f"{parity.hf:.2g}{onnx}; allowed, {parity.tolerance:.2g}."
    )
