"""The README.md of an exported folder: what was dropped, what it is worth, what to know before using it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from voidprune.errors import ModelError
from voidprune.execution.manifest import Healing, Manifest
from voidprune.execution.packing_record import Fidelity
from voidprune.schedule import Boundary, LayerAction, Phase, Schedule

_INHERITED = ("license", "license_name", "license_link", "language")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def write_model_card(folder: Path, manifest: Manifest, *, source_card: Mapping[str, Any]) -> None:
    """Write README.md. Licence and languages are those of the source's own card (`read_card`)."""
    front_matter = describe_card(manifest, source_card)
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n\n{_render(manifest)}")


def read_card(path: Path) -> dict[str, Any]:
    """The metadata in front of a model card; empty where there is no card, or none in it. Raises ModelError."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    if not path.is_file():
        return {}
    try:
        return dict(metadata_load(path) or {})
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ModelError(
            f"the metadata of {path} is not YAML", hint="mend the lines between --- and --- in it"
        ) from error


def describe_card(manifest: Manifest, source_card: Mapping[str, Any]) -> str:
    """The front matter, as the Hub accepts it: a base model has to be the id of a model there, not a folder's name."""
    from huggingface_hub import ModelCardData

    fields = {name: source_card[name] for name in _INHERITED if source_card.get(name)}
    if source_card.get("language") is False:
        fields["language"] = [False]
    if isinstance(languages := fields.get("language"), list):  # YAML 1.1 reads Norwegian, `no`, as a refusal
        fields["language"] = ["no" if language is False else language for language in languages]
    if _HUB_ID.fullmatch(manifest.source):
        fields["base_model"] = manifest.source
    card = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["voidprune", "layer-pruning"], **fields
    )
    return str(card.to_yaml()).strip()


def _render(manifest: Manifest) -> str:
    schedule = manifest.schedule
    rows = [
        f"| {layer} | {schedule.prefill[layer]} | {schedule.decode[layer]} | {_new_number(manifest, layer)} |"
        for layer in range(schedule.num_layers)
    ]
    return "\n".join(
        [
            f"# {manifest.source}, with fewer decoder layers",
            "",
            f"Written by {manifest.written_by}. {len(manifest.kept_layers)} of {schedule.num_layers} layers are in the "
            f"checkpoint; prefill executes {schedule.num_executed(Phase.PREFILL)} of them, decode "
            f"{schedule.num_executed(Phase.DECODE)}. Weights: {manifest.weight_bytes:,} bytes, of the "
            f"source {manifest.source_bytes:,}.{_render_revision(manifest)}{_render_quantization(manifest)}"
            f"{_render_kv_cache(manifest)}",
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
    """What a user of the folder has to know, decided from what it says of itself."""
    schedule = manifest.schedule
    found = []
    if not schedule.is_full:
        found.append(
            "Leaving out layers costs quality, in generation far more than in multiple choice, unless the model is healed. "
            "Measure it on your own task with voidprune eval."
        )
    if manifest.healing is not None:
        found.append(_render_healing(manifest.healing))
    if schedule.prefill != schedule.decode or any(
        action not in (LayerAction.FULL, LayerAction.SKIP) for action in schedule.prefill
    ):
        found.append(
            "Stock transformers loads this folder and runs every layer in it, in both phases. Only the ONNX graphs (and "
            "voidprune's reference) follow the schedule."
        )
    if not manifest.has_checkpoint:
        found.append("There are no weights for transformers here: the folder runs in onnxruntime.")
    elif manifest.quantization is not None:
        found.append("Stock transformers reads the unpacked weights; only the ONNX graphs read the packed ones.")
    return found + schedule_caveats(schedule) or ["This is the whole model."]


def schedule_caveats(schedule: Schedule) -> list[str]:
    """What follows from a schedule alone."""
    found = []
    if schedule.single_turn:
        found.append("The schedule is for one prompt and one response; a second turn is refused.")
    frozen = [
        layer
        for layer in range(schedule.num_layers)
        if schedule.decode[layer].attends and not schedule.prefill[layer].attends
    ]
    if len(frozen) == 1:
        found.append(
            f"Layer {frozen[0]} attends in decode only: its keys and values of the prompt are made from a residual stream that "
            "fewer layers have changed."
        )
    elif frozen:
        layers = ", ".join(map(str, frozen))
        found.append(
            f"Layers {layers} attend in decode only: their keys and values of the prompt are made from a residual stream "
            "that fewer layers have changed."
        )
    return found


def _render_healing(healing: Healing) -> str:
    if not healing.has_helped:
        return "Healing was tried and helped nothing on held-out samples: the weights are the source's."
    return (
        f"Healed ({', then '.join(healing.methods)}): its weights are not the source's. On {healing.held_out.num_samples} "
        f"held-out samples, {healing.held_out.describe()}. voidprune eval refuses the {len(healing.prompts)} prompts that it was "
        "healed with."
    )


def _new_number(manifest: Manifest, layer: int) -> str:
    return str(manifest.kept_layers.index(layer)) if layer in manifest.kept_layers else "dropped"


def _render_parity(manifest: Manifest) -> str:
    parity = manifest.parity
    if parity is None:
        return (
            "Not verified: nobody has run this checkpoint. It is quantized, and where it was made it could not be run, or not "
            "compared with its source. Its tensors are the source's, byte for byte, and its layers are numbered without gaps."
        )
    if parity.hf is None:
        compared = f"of the ONNX graphs, {parity.onnx:.2g}"
    else:
        onnx = "" if parity.onnx is None else f"; of the ONNX graphs, {parity.onnx:.2g}"
        compared = f"of the checkpoint, {parity.hf:.2g}{onnx}"
    packed = ""
    if manifest.quantization is not None:
        within = (
            f"twice what torch loses when it computes in the same 16 bits, {parity.tolerance:.2g}"
            if manifest.quantization.computes_in_16_bits
            else "0.0001"
        )
        packed = f" The ONNX graphs are compared with what their packed matrices mean, and stay within {within}."
    if parity.rounded is not None:
        packed += (
            f" With activations rounded to 8 bits, as they run, they differ by {parity.rounded:.2g}; allowed is twice what the "
            f"same rounding changes in the reference, {parity.rounded_tolerance:.2g}."
        )
    if parity.kv is not None:
        packed += (
            f" With keys and values in 8 bits, as they run, they differ by {parity.kv:.2g} from a reference that holds them so; "
            f"allowed is what that changes in the reference, and what is allowed without, {parity.kv_tolerance:.2g}."
        )
    by_phase = manifest.quantization is not None and manifest.quantization.differs_by_phase
    passes = "with a cache" if by_phase else "in one pass without a cache"
    how = (
        f"over {parity.num_prompts} prompts with responses of {parity.num_decode_steps} tokens, {passes}, "
        "decoder layers loaded one at a time because both models do not fit into the memory"
        if parity.layer_streamed
        else f"over {parity.num_prompts} prompts with {parity.num_decode_steps} decode steps each and a second turn"
    )
    model = "source" if manifest.healing is None else "healed"
    return (
        f"Largest difference of logits from the reference (the {model} model, its weights in {manifest.dtype}, with the dropped "
        f"parts left out), {how}: {compared}; allowed, {parity.tolerance:.2g}.{packed}"
    )


def _render_quantization(manifest: Manifest) -> str:
    quantization = manifest.quantization
    if quantization is None:
        return ""
    second = " in decode, and once more in 8 bits for prefill" if quantization.differs_by_phase else ""
    rounding = ""
    if quantization.rounding == "gptq":
        rounding = f", rounded by GPTQ on {len(quantization.prompts)} prompts (which voidprune eval refuses)"
    beside = "unpacked weights" if manifest.kv_cache is None else "unpacked weights and unrounded keys and values"
    changed = _render_fidelity(quantization.fidelity, beside=beside)
    return (
        f" The ONNX graphs read {quantization.file} alone: {manifest.graph_weight_bytes:,} bytes, "
        f"{quantization.average_bits:.3g} bits a weight of the layers{second}{rounding}, "
        f"relative error {quantization.weight_error:.2%}.{changed}"
    )


def _render_kv_cache(manifest: Manifest) -> str:
    kv_cache = manifest.kv_cache
    if kv_cache is None:
        return ""
    return (
        f" The ONNX graphs hold keys and values in {kv_cache.dtype}, with steps that were measured on {len(kv_cache.prompts)} "
        f"prompts (which voidprune eval refuses).{_render_fidelity(kv_cache.fidelity, beside='all in float32')}"
    )


def _render_fidelity(fidelity: Fidelity | None, *, beside: str) -> str:
    if fidelity is None:
        return ""
    return (
        f" Beside the same schedule with {beside}, on {fidelity.num_tokens:,} response tokens: perplexity times "
        f"{fidelity.perplexity_ratio:.4f}, KL {fidelity.kl:.2g} nats, the same likeliest token on {fidelity.top1:.1%}."
    )


def _render_revision(manifest: Manifest) -> str:
    if manifest.source_revision is None:
        return ""
    return f" Only what is kept was fetched from the Hub, at commit {manifest.source_revision}."
