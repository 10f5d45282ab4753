"""How the matrices of a bundle are packed, and what that changed: a part of `voidprune.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from voidprune.models.packed import (
    ACTIVATIONS,
    BITS,
    BLOCK_SIZES,
    FOUR_BIT_PRECISIONS,
    PACKED_PRECISIONS,
    ROUNDINGS,
    activation_dtype,
    differs_by_phase,
    multiplies_rows,
    packed_file,
)
from voidprune.schedule import Phase


@dataclass(frozen=True)
class Fidelity:
    """What packing changed: the graphs beside the same schedule with weights that are not packed, on `num_tokens` response tokens.

    `top1`: share of tokens on which both find the same token likeliest; `kl`: mean KL(not packed || packed), in nats;
    `perplexity_ratio`: perplexity of the responses, as a multiple of that without packing.
    """

    top1: float
    kl: float
    perplexity_ratio: float
    num_tokens: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) not in (int, float):
                raise ValueError(f"{name} is {value!r}")


@dataclass(frozen=True)
class Quantization:
    """How the matrices that the graphs read are packed, into `model.{precision}.safetensors`.

    `layer_bits[i]`: bits of attention and of MLP in layer i of the checkpoint; `head_bits`: of embedding and head. `activations`:
    "int8" where products round what they multiply with the matrices, block by block (in a phase that multiplies rows token by
    token), "fp32" where they do not; in "fp16" and "bf16" the graphs compute in 16 bits throughout. Where the phases have matrices
    of their own, `layer_bits`, `average_bits` and `weight_error` are of those of decode; prefill's are rows of 8 bits.
    `weight_error`: root of the mean square error of all matrices over that of their weights; `average_bits`: of a weight of the
    layers' matrices, scales and zero points not counted. `rounding`: of the layers' matrices in 4 bits, "nearest" or "gptq"; the
    others, embedding and head are rounded to nearest. `prompts`: hashes of those that matrices were rounded on (see
    `healing.training_data.prompt_hash`): what weights were fitted to, they may not be evaluated on. Older files have neither.
    """

    precision: str
    block_size: int
    zero_points: bool
    layer_bits: tuple[tuple[int, int], ...]
    head_bits: int
    activations: str
    average_bits: float
    weight_error: float
    fidelity: Fidelity | None = None
    rounding: str = "nearest"
    prompts: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        return packed_file(self.precision)

    @property
    def computes_in_16_bits(self) -> bool:
        """Whether the graphs do."""
        return activation_dtype(self.activations) != "F32"

    def multiplies_rows(self, phase: Phase) -> bool:
        """As `packed.multiplies_rows` says it of a precision."""
        return multiplies_rows(self.precision, phase)

    @property
    def differs_by_phase(self) -> bool:
        """As `packed.differs_by_phase` says it of a precision."""
        return differs_by_phase(self.precision)

    def __post_init__(self) -> None:
        """Raises ValueError."""
        bits = [self.head_bits, *(number for pair in self.layer_bits for number in pair)]
        for name, valid in (
            ("precision", self.precision in PACKED_PRECISIONS),
            ("block_size", self.block_size in BLOCK_SIZES),
            ("zero_points", type(self.zero_points) is bool),
            ("layer_bits", all(number in BITS for number in bits) and all(len(pair) == 2 for pair in self.layer_bits)),
            ("activations", self.activations in ACTIVATIONS),
            ("rounding", self.rounding in (ROUNDINGS if self.precision in FOUR_BIT_PRECISIONS else ("nearest",))),
            ("prompts", all(type(prompt) is str for prompt in self.prompts)),
            ("prompts", bool(self.prompts) == (self.rounding == "gptq")),
            ("average_bits", type(self.average_bits) in (int, float)),
            ("weight_error", type(self.weight_error) in (int, float)),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}")

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Quantization:
        fidelity, prompts = document["fidelity"], document.get("prompts", [])
        if not isinstance(prompts, (list, tuple)):
            raise ValueError(f"prompts is {prompts!r}")
        values = {
            **document,
            "layer_bits": tuple(map(tuple, document["layer_bits"])),
            "fidelity": None if fidelity is None else Fidelity(**fidelity),
            "prompts": tuple(prompts),
        }
        return cls(**values)

    def to_document(self) -> dict[str, Any]:
        """As it was before there were two ways of rounding, where it is to nearest."""
        document = asdict(self)
        if self.rounding == "nearest":
            del document["rounding"], document["prompts"]
        return document
