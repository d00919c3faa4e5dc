"""The decoder's pass by GPU kernels, interpreted, equals the torch form in float64; and where it is
deterministic, a token has the same bits however its row came to be computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from gpu_mutants import mutant
from tiny_checkpoints import save_random
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from folospec.attention.paged import PagedBackend
from folospec.attention.torch_reference import TorchAttention
from folospec.attention.triton_paged import TritonAttention
from folospec.kernels.gpu import launch
from folospec.models import gpu_decoder
from folospec.models.base import Model
from folospec.models.decoder import Decoder
from folospec.models.forward import Rows
from folospec.models.loader import load_model
from folospec.models.self_draft import self_draft_of
from folospec.worker.model_runner import ModelRunner

pytestmark = pytest.mark.skipif(
    not launch.is_interpreted(), reason="the interpreter is for machines without a GPU"
)
SHAPE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LAYER_TYPES = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama, tied, gelu": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True, hidden_act="gelu"),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=7),
    "qwen2": lambda: Qwen2Config(**{**SHAPE, "hidden_size": 64}),
    "qwen3": lambda: Qwen3Config(
        **SHAPE, use_sliding_window=True, sliding_window=5, layer_types=LAYER_TYPES
    ),
}
BLOCK_SIZE, NUM_BLOCKS = 4, 24
TABLES = [[7, 2, 19, 5, 11], [3, 21, 8, 1], [17, 4, 23, 9]]
TOKENS = torch.randint(0, 101, (16,), generator=torch.Generator().manual_seed(3)).tolist()
TREE = [-1, 0, 0, 1, 2, 4, 0]
"""Parents: the path through nodes 0, 2, 4 and 5 is the text that goes on."""


class Gathering(PagedBackend):
    """The torch form of looking at keys that are written already: it writes them again."""

    name = "gathering"
    devices = ("cpu",)

    def __init__(self) -> None:
        self.torch_form = TorchAttention()

    def supports(self, dtype, head_size, block_size):
        return None

    def attend(self, query, kv, metadata, **options):
        written = (tensor[metadata.slot_mapping].to(query.dtype) for tensor in kv)
        return self.torch_form.forward(query, *written, kv, metadata, **options)


BACKENDS: dict[str, Callable[[], Any]] = {
    "gathering": Gathering,
    "triton": TritonAttention,
    "deterministic": lambda: TritonAttention(deterministic=True),
    "torch": lambda: "torch",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp("model") for name in CONFIGS}
    for name, folder in found.items():
        save_random(CONFIGS[name](), folder)
    return found


def load(folder: Path, backend: str, dtype: torch.dtype = torch.float32) -> Decoder:
    model = load_model(str(folder), dtype=dtype, attention=BACKENDS[backend]())
    assert isinstance(model, Decoder)
    return model


class Runs:
    """A model with KV of its own."""

    def __init__(self, model: Model) -> None:
        self.runner = ModelRunner(model, max_num_batched_tokens=64)
        self.runner.make_kv(NUM_BLOCKS, BLOCK_SIZE, torch.device("cpu"))

    def forward(self, *batch: Rows, aux_layers: tuple[int, ...] = ()) -> Any:
        return self.runner.forward(list(batch), aux_layers)

    def text(self, start: int, end: int, seq: int = 0) -> Rows:
        return Rows(TOKENS[start:end], start, TABLES[seq], end - start)

    def kv(self, count: int) -> Tensor:
        """Of the first tokens of sequence 0: [layers, 2, count, heads, size]."""
        slots = [TABLES[0][i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(count)]
        layers = self.runner.kv.layers
        return torch.stack([torch.stack([tensor[slots] for tensor in kv]) for kv in layers])


def tree(start: int, seq: int) -> Rows:
    tokens = [TOKENS[start], 1, TOKENS[start + 1], 2, TOKENS[start + 2], TOKENS[start + 3], 3]
    return Rows(tokens, start, TABLES[seq], len(tokens), TREE)


def results(model: Model) -> Tensor:
    """Logits of prompts, chunks, single tokens and trees, side by side."""
    runs = Runs(model)
    passes = [
        (runs.text(0, 7), runs.text(0, 2, seq=1)),
        (runs.text(7, 10), runs.text(2, 3, seq=1), runs.text(0, 1, seq=2)),
        (tree(10, seq=0), runs.text(3, 4, seq=1)),
    ]
    return torch.cat([runs.forward(*batch).logits for batch in passes])


def prompts(model: Model) -> Tensor:
    """Logits of two prompts: what a broken rule shows in soon."""
    runs = Runs(model)
    return runs.forward(runs.text(0, 7), runs.text(0, 2, seq=1)).logits


def off_by(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).abs().max())


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "gathering") for name in CONFIGS),
        ("mistral", "triton"),
        ("qwen3", "deterministic"),
    ],
)
def test_float32_equals_the_torch_form_in_float64(folders, name, backend):
    model = load(folders[name], backend)
    exact = results(load(folders[name], "torch", torch.float64))
    assert exact.std() > 1
    assert off_by(results(model), exact) < 1e-4
    assert isinstance(model.gpu, gpu_decoder.GpuDecoder)


@pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    [
        ("llama", "gathering", torch.bfloat16),
        ("qwen3", "gathering", torch.float16),
        ("qwen3", "deterministic", torch.bfloat16),
    ],
)
def test_half_precision_is_no_further_from_exact_than_torch_is(folders, name, backend, dtype):
    own, torchs = (load(folders[name], b, dtype) for b in (backend, "torch"))
    exact = load(folders[name], "torch", torch.float64)
    places, rounded = (list(m.destinations().values()) for m in (exact, own))
    for place, weight in zip(places, rounded, strict=True):
        place.copy_(weight)
    expected = results(exact)
    errors = [(results(model) - expected).std() for model in (own, torchs)]
    assert errors[0] < 1.05 * errors[1] < 0.1 * expected.std()


RULES = [
    ("layer.qk_norm,", "None,"),
    ("delta, layer.post_norm", "delta, layer.input_norm"),
    ("delta, layer.input_norm", "None, layer.input_norm"),
    ("delta, layer.post_norm", "None, layer.post_norm"),
    ("delta, decoder.final_norm", "None, decoder.final_norm"),
    ("sliding_window=decoder.config.sliding_windows[index]", "sliding_window=5"),
    ("scale=decoder.head_size**-0.5", "scale=0.2"),
    ("metadata.positions,", "metadata.positions // 2,"),
    ("metadata.slot_mapping,", "metadata.slot_mapping.flip(0),"),
    ("if decoder.has_silu:", "if not decoder.has_silu:"),
]


@pytest.mark.parametrize(("old", "new"), RULES)
def test_a_broken_rule_is_seen(folders, old, new, tmp_path):
    model = load(folders["qwen3"], "gathering")
    broken = mutant(gpu_decoder, old, new, tmp_path)
    model.activation = torch.tanh  # what it has without SiLU
    model.gpu = broken.GpuDecoder(model, model.attention, False)
    exact = prompts(load(folders["qwen3"], "torch", torch.float64))
    assert not off_by(prompts(model), exact) < 3e-4


@pytest.mark.parametrize("bias", ["qkv_bias", "output_bias", "gate_up_bias", "down_bias"])
def test_a_bias_that_is_left_out_is_seen(folders, bias, tmp_path):
    model = load(folders["llama"], "gathering")
    broken = mutant(gpu_decoder, f"layer.{bias}", "None", tmp_path)
    model.gpu = broken.GpuDecoder(model, model.attention, False)
    exact = prompts(load(folders["llama"], "torch", torch.float64))
    assert not off_by(prompts(model), exact) < 3e-4


def test_only_a_deterministic_attention_makes_a_deterministic_model(folders):
    for backend in BACKENDS:
        model = load(folders["llama"], backend)
        assert model.deterministic == (backend == "deterministic")
    model = load(folders["llama"], "deterministic")
    assert not self_draft_of(model, quantized=True).deterministic
    model.quantization = "int8"
    assert not model.deterministic


def in_every_way(model: Model) -> bool:
    """Whether logits and KV of 8 tokens are those of plain decoding, to the bit: as a prompt, in
    chunks beside others, and as the path of a tree."""
    plain, whole, company = (Runs(model) for _ in range(3))
    logits = torch.cat([plain.forward(plain.text(i, i + 1)).logits for i in range(8)])
    prompt = whole.forward(whole.text(0, 8)).logits
    parts = [
        company.forward(company.text(0, 2, seq=1), company.text(0, 4)).logits[2:],
        company.forward(company.text(0, 1, seq=2), tree(4, seq=0)).logits[1:][[0, 2, 4, 5]],
    ]
    return (
        torch.equal(prompt, logits)
        and torch.equal(torch.cat(parts), logits)
        and torch.equal(whole.kv(8), plain.kv(8))
        and torch.equal(company.kv(4), plain.kv(4))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_however_its_row_was_computed(folders, dtype):
    """In the interpreter; what a card does is a card's to show."""
    assert in_every_way(load(folders["qwen3"], "deterministic", dtype))


def test_library_products_break_the_bits(folders):
    """Control."""
    model = load(folders["qwen3"], "deterministic")
    model.gpu = gpu_decoder.GpuDecoder(model, model.attention, deterministic=False)
    assert not in_every_way(model)


@pytest.mark.parametrize("skipped", [frozenset(), frozenset({1})])
@pytest.mark.parametrize("old", [None, ".clone()", "_settled(stream, delta), None"])
def test_aux_layers_are_those_of_torch(folders, skipped, old, tmp_path):
    """The rules broken are controls: a auxiliary layer that goes on being added to, or lacks a
    half."""
    views = []
    for backend, dtype in (("gathering", torch.float32), ("torch", torch.float64)):
        model = load(folders["llama"], backend, dtype)
        views.append(self_draft_of(model, skip_attention=skipped, skip_mlp=skipped - {1}))
    if old is not None:
        new = "" if old == ".clone()" else "stream, delta"
        broken = mutant(gpu_decoder, old, new, tmp_path)
        views[0].gpu = broken.GpuDecoder(views[0], views[0].attention, False)
    aux_layers, found = (0, 1, 2), []
    for view in views:
        runs = Runs(view)
        found.append(runs.forward(runs.text(0, 9), aux_layers=aux_layers).aux_hidden_states)
    assert found[0].keys() == set(aux_layers)
    right = all(off_by(found[0][layer], found[1][layer]) < 1e-4 for layer in aux_layers)
    assert right == (old is None)


@pytest.mark.parametrize(
    ("attention", "mlp"),
    [({1}, {0}), ({0}, {0}), ({1}, {1}), ({0, 1}, {0, 1})],
)
def test_a_view_that_leaves_layers_out_is_what_it_is_in_torch(folders, attention, mlp):
    changes = {"skip_attention": frozenset(attention), "skip_mlp": frozenset(mlp)}
    model = load(folders["llama"], "gathering")
    unchanged = prompts(model)
    own = self_draft_of(model, **changes)
    exact = self_draft_of(load(folders["llama"], "torch", torch.float64), **changes)
    logits, expected = prompts(own), prompts(exact)
    assert off_by(logits, expected) < 1e-4
    assert off_by(logits, unchanged) > 0.1
    assert own.angles is model.angles


def test_an_int8_view_is_summed_as_in_torch(folders):
    own = self_draft_of(load(folders["llama"], "deterministic"), quantized=True)
    torchs = self_draft_of(load(folders["llama"], "torch"), quantized=True)
    assert off_by(prompts(own), prompts(torchs)) < 1e-4


def test_float64_stays_on_torch(folders):
    model = load(folders["llama"], "gathering", torch.float64)
    prompts(model)
    assert model.gpu is None


def test_the_kv_may_be_of_another_type(folders):
    """Keys and values are rounded to it, a row's own ones too."""
    found = []
    for backend, dtype in (("gathering", torch.float32), ("torch", torch.float64)):
        model = load(folders["qwen3"], backend, dtype)
        runs = Runs(model)
        runs.runner = ModelRunner(model, max_num_batched_tokens=64, kv_dtype=torch.bfloat16)
        runs.runner.make_kv(NUM_BLOCKS, BLOCK_SIZE, torch.device("cpu"))
        found.append(runs.forward(runs.text(0, 7)).logits)
    exact = prompts(load(folders["qwen3"], "torch", torch.float64))
    assert off_by(*found) < 0.05
    assert off_by(found[0], exact[:7]) > 1e-4
