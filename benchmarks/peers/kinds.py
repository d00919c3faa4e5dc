"""The peers: their modes, the memory that they need, and what they calculate in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Precision(NamedTuple):
    """What weights, activations and KV are; products may be of less."""

    weights: str
    activations: str
    kv: str


_FLOAT32 = Precision("float32", "float32", "float32")
_BFLOAT16 = Precision("bfloat16", "bfloat16", "bfloat16")
_AS_ASKED = {"float32": _FLOAT32, "bfloat16": _BFLOAT16}
_BFLOAT16_PRODUCTS = "float32, products of bfloat16"


@dataclass(frozen=True, slots=True)
class PeerKind:
    modes: tuple[str, ...]
    shares_process: bool
    only_batch_1: frozenset[str] = frozenset()
    base_gib: float = 0.5
    """Memory of an idle process, about."""
    weight_copies: int = 1
    """How often the weights are in memory."""
    engine: str = ""
    """Whose environment and worker it runs in; empty for its own."""
    only_checkpoint: str = ""
    """The checkpoint that it has weights of its own for. It is there for information: it runs
    another model, in fewer bits, and is nobody's rival."""
    precision: Mapping[str, Precision] = field(default_factory=lambda: _AS_ASKED)
    """By the type that is asked for."""
    older_precision: Mapping[str, Precision] = field(default_factory=dict)
    """Where that differs on a processor with nothing wider than AVX2."""

    @property
    def is_rival(self) -> bool:
        return not self.only_checkpoint

    def precision_of(self, dtype: str, wide: bool) -> Precision:
        """What it calculates in, with vectors wider than those of AVX2 or without."""
        return (None if wide else self.older_precision.get(dtype)) or self.precision[dtype]


PEER_KINDS = {
    "transformers": PeerKind(
        ("plain", "generate_batch", "draft_model", "lookup"),
        shares_process=True,
        only_batch_1=frozenset({"draft_model", "lookup"}),
    ),
    "vllm": PeerKind(("plain", "lookup", "draft_model"), shares_process=False, base_gib=1.8),
    "openvino": PeerKind(
        ("plain", "lookup", "draft_model"),
        shares_process=False,
        weight_copies=2,
        precision={**_AS_ASKED, "bfloat16": _BFLOAT16._replace(weights="float16")},
        older_precision={"bfloat16": _FLOAT32._replace(weights="float16")},
    ),
    "llama_cpp": PeerKind(
        ("plain", "lookup"),
        shares_process=True,
        only_batch_1=frozenset({"lookup"}),
        base_gib=0.2,
        precision={
            **_AS_ASKED,
            "bfloat16": Precision("bfloat16", _BFLOAT16_PRODUCTS, "float16"),
        },
    ),
    "llama_cpp_q4_1": PeerKind(
        ("plain", "lookup"),
        shares_process=True,
        only_batch_1=frozenset({"lookup"}),
        base_gib=0.2,
        engine="llama_cpp",
        only_checkpoint="smollm2",
        precision={
            dtype: Precision("Q4_1, output Q8_0", "float32, products of 8 bits", kv)
            for dtype, kv in (("float32", "float32"), ("bfloat16", "float16"))
        },
    ),
}
FOLOSPEC_KIND = PeerKind(
    (),
    shares_process=False,
    precision={**_AS_ASKED, "bfloat16": _BFLOAT16._replace(activations=_BFLOAT16_PRODUCTS)},
)
