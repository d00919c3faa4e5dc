"""The decoder in native code equals the torch form in float64, and a token's logits and KV are the
same bits however its row came to be computed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from native_builds import ARM, NEON, X86, breakable, built_for, require_native
from tiny_checkpoints import save_random
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from folospec.attention.base import LayerKV
from folospec.attention.native_cpu import NativeAttention
from folospec.kernels.native import Native
from folospec.kernels.torch_ops import linear
from folospec.models import decoder
from folospec.models.base import Model
from folospec.models.decoder import Decoder
from folospec.models.forward import Rows
from folospec.models.loader import load_model
from folospec.models.self_draft import self_draft_of
from folospec.worker.model_runner import ModelRunner

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama, tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=70),
    "qwen2": lambda: Qwen2Config(**{**SHAPE, "hidden_size": 128}),
    "qwen3": lambda: Qwen3Config(
        **SHAPE,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
TOKENS = torch.randint(0, 101, (330,), generator=torch.Generator().manual_seed(3)).tolist()
BLOCK_SIZE, NUM_BLOCKS = 4, 256
TABLE = random.Random(0).sample(range(128), 100)
OTHERS = [(33, 1), (1, 3), (64, 2), (7, 9)]
"""Tokens before the step, and rows in it, of the sequences beside the one that is looked at."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    require_native()
    found = {name: tmp_path_factory.mktemp("model") for name in CONFIGS}
    for name, folder in found.items():
        save_random(CONFIGS[name](), folder)
    return found


@dataclass
class Seen:
    """What a pass leaves behind of some tokens: logits, and the KV of every layer."""

    logits: Tensor
    kv: Tensor

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Seen)
        return torch.equal(self.logits, other.logits) and torch.equal(self.kv, other.kv)

    def since(self, start: int, end: int | None = None) -> Seen:
        return Seen(self.logits[start:end], self.kv[:, :, start:end])


class Runs:
    """A model with KV of its own; `logical` are the tokens of one sequence, whose blocks are
    shuffled."""

    def __init__(self, model: Model) -> None:
        self.runner = ModelRunner(model, max_num_batched_tokens=512)
        self.runner.make_kv(NUM_BLOCKS, BLOCK_SIZE, torch.device("cpu"))
        self.draw = random.Random(1)
        self.table = TABLE

    def decode(self, start: int, end: int) -> Seen:
        """One token a pass."""
        rows = [self.forward([Rows([TOKENS[i]], i, TABLE)]) for i in range(start, end)]
        return Seen(torch.cat(rows), self.kv(range(start, end)))

    def chunks(self, size: int, start: int, end: int) -> Seen:
        parts = [
            self.forward([Rows(tokens, first, TABLE, len(tokens))])
            for first in range(start, end, size)
            for tokens in [TOKENS[first : min(first + size, end)]]
        ]
        return Seen(torch.cat(parts), self.kv(range(start, end)))

    def in_company(self, start: int, end: int, before: int) -> Seen:
        """The tokens as one chunk with other sequences, `before` of them before it."""
        batch, at = [], 0
        for number, (context, num_rows) in enumerate(OTHERS):
            table = list(range(128 + 30 * number, 158 + 30 * number))
            tokens = [self.draw.randrange(101) for _ in range(context + num_rows)]
            self.forward([Rows(tokens[:context], 0, table)])
            batch.append(Rows(tokens[context:], context, table, num_rows))
            at += num_rows * (number < before)
        batch.insert(before, Rows(TOKENS[start:end], start, TABLE, end - start))
        logits = self.forward(batch)
        return Seen(logits[at : at + end - start], self.kv(range(start, end)))

    def tree(self, start: int, end: int, seed: int) -> Seen:
        """The tokens as one path of a shuffled tree: the first is the root, among lies."""
        draw = random.Random(seed)
        tokens, parents, path = [TOKENS[start]], [-1], [0]
        for depth, token in enumerate(TOKENS[start + 1 : end]):
            for _ in range(draw.randint(depth == 0, 2)):
                tokens.append(draw.randrange(101))
                parents.append(draw.choice([*path, len(tokens) - 2]))
            tokens.append(token)
            parents.append(path[-1])
            path.append(len(tokens) - 1)
        assert path != list(range(len(path)))
        logits = self.forward([Rows(tokens, start, TABLE, len(tokens), parents)])
        return Seen(logits[path], self.kv([start + row for row in path]))

    def forward(self, batch: list[Rows]) -> Tensor:
        return self.runner.forward(batch).logits

    def kv(self, indices: Any) -> Tensor:
        assert self.runner.kv is not None
        slots = [TABLE[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in indices]
        layers = self.runner.kv.layers
        return torch.stack([torch.stack([tensor[slots] for tensor in kv]) for kv in layers])


def load(folder: Path, kind: str, library: Native | None = None) -> Model:
    """Load as float32 or bfloat16, or as an int8 view of one of them; "exact" is float64 in torch.

    `library` is another build of the kernels.
    """
    if kind == "exact":
        return load_model(str(folder), dtype=torch.float64, attention="torch")
    backend = NativeAttention()
    backend.library = library or backend.library
    dtype = getattr(torch, kind.removeprefix("int8 of "))
    model = load_model(str(folder), dtype=dtype, attention=backend)
    assert model.deterministic
    return self_draft_of(model, quantized=True) if kind.startswith("int8") else model


KINDS = ["float32", "bfloat16", "int8 of float32", "int8 of bfloat16"]
CASES = [
    *((name, kind) for name in ("llama", "qwen3") for kind in KINDS),
    *((name, kind) for name in ("llama, tied", "mistral", "qwen2") for kind in KINDS[:2]),
]


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_is_no_further_from_float64_than_torch_is(folders, name):
    own, torchs, exact = (
        Runs(model).chunks(100, 0, 200)
        for model in (
            load(folders[name], "float32"),
            load_model(str(folders[name]), dtype=torch.float32, attention="torch"),
            load(folders[name], "exact"),
        )
    )
    assert exact.logits.std() > 1
    assert (own.logits - exact.logits).abs().max() < 1e-4
    assert (own.kv - exact.kv).abs().max() < 1e-4
    errors = [(run.logits - exact.logits).std() for run in (own, torchs)]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_nearer_to_the_exact_function_of_its_weights_than_torch_is(folders, name):
    own = load(folders[name], "bfloat16")
    torchs = load_model(str(folders[name]), dtype=torch.bfloat16, attention="torch")
    exact = load(folders[name], "exact")
    for place, rounded in zip(_parameters(exact), _parameters(own), strict=True):
        place.copy_(rounded)
    expected = Runs(exact).chunks(100, 0, 200).logits
    errors = [(Runs(m).chunks(100, 0, 200).logits - expected).std() for m in (own, torchs)]
    assert errors[0] < errors[1] < 0.1 * expected.std()


def test_int8_weights_are_summed_as_the_floats_they_stand_for(folders):
    model = load(folders["llama"], "int8 of float32")
    exact = load(folders["llama"], "exact")
    for place, layer in zip(exact.layers, model.layers, strict=True):
        for name in ("qkv", "output", "gate_up", "down"):
            values, scale = getattr(layer, name)
            getattr(place, name).copy_(values * scale[:, None])
    exact.lm_head.copy_(model.lm_head.values * model.lm_head.scale[:, None])
    results = [Runs(m).chunks(50, 0, 100).logits.double() for m in (model, exact)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


DECODER_RULES = ["no residual", "an angle too far", "no sigmoid"]


@pytest.mark.parametrize("rule", [*DECODER_RULES, "a key too few", "the first biases for all"])
def test_a_broken_rule_is_seen(folders, rule):
    """Control of the tests above."""
    exact = Runs(load(folders["llama"], "exact")).chunks(100, 0, 200).logits
    model = load(folders["llama"], "float32", breakable().library)
    assert (Runs(model).chunks(100, 0, 200).logits - exact).abs().max() < 1e-4
    with breakable().without(rule):
        wrong = Runs(model).chunks(100, 0, 200).logits
    assert not (wrong - exact).abs().max() < 3e-4


def ways(model: Model, *, brief: bool = False) -> dict[str, bool]:
    """Every way in which the tokens of a plain decode can be computed -> whether the bits are its
    own. The KV of what is before is the plain decode's."""
    runs, results = Runs(model), {}
    plain = runs.decode(0, 150)
    for size in (64, 150) if brief else (2, 3, 4, 5, 6, 7, 8, 9, 13, 33, 63, 64, 65, 150):
        results[f"chunks of {size}"] = Runs(model).chunks(size, 0, 150) == plain
    for start in (1, 60) if brief else (1, 7, 56, 62, 63, 64, 65, 120, 126, 127, 128):
        for end in (start + 6,) if brief else (start + 2, start + 6, start + 12):
            key, expected = f"{start}..{end - 1}", plain.since(start, end)
            results[f"chain {key}"] = runs.chunks(end - start, start, end) == expected
            results[f"tree {key}"] = runs.tree(start, end, seed=start) == expected
            runs.chunks(end - start, start, end + 30 - end % 10)  # the tree has overwritten rows
            before = start % (len(OTHERS) + 1)
            results[f"in company {key}"] = runs.in_company(start, end, before) == expected
    return results


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_token_has_the_same_bits_however_its_row_was_computed(folders, name, kind):
    model = load(folders[name], kind)
    assert all(ways(model).values())


@pytest.mark.parametrize(
    ("kind", "target"), [*((kind, NEON) for kind in KINDS[:3]), ("bfloat16", ARM[0])]
)
def test_a_build_for_arm_is_as_right_and_has_the_same_bits_however_a_row_was_computed(
    folders, kind, target
):
    model = load(folders["qwen3"], kind, built_for(target))
    assert all(ways(model, brief=True).values())
    own, arm = (Runs(m).chunks(75, 0, 150).logits for m in (load(folders["qwen3"], kind), model))
    # bfloat16 activations are rounded, here and there to either side.
    torch.testing.assert_close(arm, own, rtol=0, atol=1e-4 if "bfloat16" not in kind else 0.1)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_number_of_threads_changes_no_bit(folders, kind):
    """Few passes: where cores are busy, threads wait for each other long."""
    model = load(folders["qwen3"], kind)
    plain = Runs(model).decode(0, 150)
    for count in (2, 3, 4):
        runs = Runs(model)
        with threads(count):
            assert runs.chunks(62, 0, 62) == plain.since(0, 62)
            assert runs.decode(62, 66) == plain.since(62, 66)
            assert runs.tree(66, 72, seed=count) == plain.since(66, 72)
            assert runs.in_company(66, 75, before=2) == plain.since(66, 75)
            assert Runs(model).chunks(150, 0, 150) == plain


@pytest.mark.parametrize("kind", KINDS[:2])
def test_chunks_of_hundreds_of_rows_have_the_bits_of_plain_decoding(folders, kind):
    model = load(folders["mistral"], kind)
    plain = Runs(model).decode(0, 330)
    for size in (100, 257, 330):
        assert Runs(model).chunks(size, 0, 330) == plain


def test_builds_with_the_same_instructions_have_the_same_bits(folders):
    """However they were optimised: nothing is left to the compiler. So says the bit contract, and
    so the controls here control what they seem to."""
    own, hurried = (
        Runs(load(folders["llama"], "float32", build)).chunks(50, 0, 100)
        for build in (None, breakable().library)
    )
    assert own == hurried


@pytest.mark.soak
@pytest.mark.parametrize("target", ARM)
def test_a_build_for_arm_has_the_same_bits_however_it_was_optimised(folders, target):
    builds = [built_for(target), built_for(target, "-O3")]
    for kind in KINDS:
        hurried, own = (
            Runs(load(folders["llama"], kind, build)).chunks(50, 0, 100) for build in builds
        )
        assert own == hurried


@pytest.mark.parametrize("target", X86)
@pytest.mark.parametrize("kind", KINDS)
def test_builds_for_lesser_machines_keep_the_bits_among_themselves(folders, target, kind):
    assert all(ways(load(folders["llama"], kind, built_for(target)), brief=True).values())


@pytest.mark.parametrize("rule", ["tiles up to the context", "a sum by the number of rows"])
def test_sums_whose_order_depends_on_the_step_break_the_bits(folders, rule):
    """Control: results that are as right, but not the same, as the tests above would see."""
    model = load(folders["llama"], "float32", breakable().library)
    assert all(ways(model, brief=True).values())
    with breakable().without(rule):
        plain = Runs(model).decode(0, 150)
        same = ways(model, brief=True)
        torch.testing.assert_close(
            Runs(model).chunks(64, 0, 150).logits, plain.logits, rtol=0, atol=1e-4
        )
    assert not all(same.values())


def test_torchs_own_products_break_the_bits(folders):
    """Control: what the contract would be without kernels of one's own."""
    model = load_model(str(folders["llama"]), dtype=torch.float32, attention="torch")
    assert not model.deterministic
    assert not all(ways(model, brief=True).values())


def test_aux_layers_are_those_of_torch_and_have_the_bits_of_plain_decoding(folders):
    model = load(folders["qwen3"], "float32")
    exact = load(folders["qwen3"], "exact")
    aux_layers = (0, 1, 2)
    results = []
    for each in (model, exact):
        runs = Runs(each)
        results.append(
            runs.runner.forward([Rows(TOKENS[:70], 0, TABLE)], aux_layers).aux_hidden_states
        )
    for layer in aux_layers:
        torch.testing.assert_close(
            results[0][layer].double(), results[1][layer].double(), rtol=0, atol=1e-4
        )
    runs = Runs(model)
    for i in range(70):
        alone = runs.runner.forward([Rows([TOKENS[i]], i, TABLE)], aux_layers).aux_hidden_states
        assert all(torch.equal(alone[layer][0], results[0][layer][i]) for layer in aux_layers)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_large_passes_may_take_torchs_products_over_the_same_kv(folders, monkeypatch, kind):
    rows = []
    monkeypatch.setattr(decoder, "linear", lambda x, *rest: rows.append(len(x)) or linear(x, *rest))
    model = load(folders["llama"], kind)
    assert model.deterministic
    model.torch_products_from = 40
    assert not model.deterministic
    runs = Runs(model)
    parts = [runs.chunks(40, 0, 80), runs.chunks(39, 80, 119), runs.decode(119, 130)]
    assert set(rows) == {40}
    exact = Runs(load(folders["llama"], "exact")).chunks(130, 0, 130).logits
    off = (torch.cat([part.logits for part in parts]).double() - exact).abs()
    assert off.mean() < (1e-5 if kind == "float32" else 0.1)
    aux_hidden_states = [
        runs.runner.forward([Rows(TOKENS[:n], 0, TABLE)], (1,)).aux_hidden_states[1]
        for n in (39, 40)
    ]
    assert rows[-1] == 40
    assert [one.dtype for one in aux_hidden_states] == [torch.float32] * 2
    rows.clear()
    assert self_draft_of(model, skip_mlp=frozenset({0})).deterministic
    Runs(self_draft_of(model, skip_mlp=frozenset({0}))).chunks(80, 0, 80)
    assert not rows, "a view's passes stay native"


def test_a_view_that_leaves_layers_out_is_what_it_is_in_torch(folders):
    changes = {"skip_attention": frozenset({1}), "skip_mlp": frozenset({0})}
    views = [
        self_draft_of(load(folders["llama"], kind), **changes) for kind in ("float32", "exact")
    ]
    views.append(load(folders["llama"], "exact"))
    own, exact, whole = (Runs(view).chunks(30, 0, 30).logits.double() for view in views)
    torch.testing.assert_close(own, exact, rtol=0, atol=1e-4)
    assert (own - whole).abs().max() > 0.1


def test_there_is_no_second_copy_of_the_weights(folders):
    """The kernels read the matrices of the model itself; only norms and biases are converted."""
    for kind in ("float32", "bfloat16"):
        model = load(folders["llama"], kind)
        Runs(model).decode(0, 1)
        own, described = model.native, []
        for layer, struct in zip(model.layers, own.layers, strict=True):
            for name in ("qkv", "output", "gate_up", "down"):
                described.append((getattr(struct, name).data, getattr(layer, name).data_ptr()))
        described.append((own.lm_head.data, model.lm_head.data_ptr()))
        described.append((own.model.embedding, model.embedding.data_ptr()))
        assert all(data == pointer for data, pointer in described)
        held = [value for value in vars(own).values() if isinstance(value, (Tensor, list))]
        tensors = [t for v in held for t in (v if isinstance(v, list) else [v])]
        kept = sum(t.numel() for t in tensors if isinstance(t, Tensor) and t.dim() == 1)
        assert kept < 0.2 * sum(t.numel() for t in _parameters(model))


@pytest.mark.parametrize(
    ("option", "value"),
    [("hidden_size", 104), ("intermediate_size", 100), ("head_dim", 24), ("hidden_act", "gelu")],
)
def test_what_the_kernels_cannot_run_runs_on_torch(tmp_path, option, value):
    require_native()
    save_random(LlamaConfig(**{**SHAPE, option: value}), tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float32)
    assert isinstance(model, Decoder)
    assert not model.deterministic
    result = Runs(model).chunks(64, 0, 150)
    exact = Runs(load(tmp_path, "exact")).chunks(64, 0, 150)
    assert model.native is None
    torch.testing.assert_close(result.logits.double(), exact.logits.double(), rtol=0, atol=1e-4)


def _parameters(model: Any) -> list[Tensor]:
    return list(model.destinations().values())


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_type_changes_nothing(default: torch.dtype) -> None:
    require_native()

    def logits() -> torch.Tensor:
        model = load_model("folospec-demo", attention="native")
        runner = ModelRunner(model, max_num_batched_tokens=64)
        runner.make_kv(4, 16, torch.device("cpu"))
        before = torch.get_default_dtype()
        try:
            if changed:
                torch.set_default_dtype(default)
            return runner.forward([Rows(list(range(9, 30)), 0, [0, 1], 21)]).logits
        finally:
            torch.set_default_dtype(before)

    changed = False
    expected = logits()
    changed = True
    found = logits()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([101], "input_ids must be in 0 .. 100, got 101"),
        ([5, -1], "input_ids must be in 0 .. 100, got -1"),
        ([2**40], "input_ids must be in 0 .. 100"),
        ([1.0], "input_ids must be int64"),
        ([float("nan"), 3], "input_ids must be int64"),
    ],
)
def test_a_token_without_an_embedding_is_refused_and_nothing_is_written(folders, ids, reason):
    runs = Runs(load(folders["llama"], "float32"))
    with pytest.raises(ValueError, match=re.escape(reason)):
        runs.forward([Rows(ids, 0, TABLE)])
    assert not runs.kv(range(8)).any()


def test_a_position_below_0_is_refused(folders):
    runs = Runs(load(folders["llama"], "float32"))
    with pytest.raises(ValueError, match="must be"):
        runs.forward([Rows([1], -1, TABLE)])


def test_layers_of_another_pool_are_refused(folders):
    model = load(folders["llama"], "float32")
    runs = Runs(model)
    runs.decode(0, 1)
    layers = runs.runner.kv.layers
    for wrong in (layers[0].key[:8], layers[0].key.bfloat16(), layers[0].key.transpose(0, 1)):
        runs.runner.kv.layers = [layers[0], LayerKV(layers[1].key, wrong)]
        with pytest.raises(ValueError, match="values of the KV must be"):
            runs.decode(1, 2)


def test_a_weight_of_another_shape_is_refused(folders):
    model = load(folders["llama"], "float32")
    model.layers[1].down = model.layers[1].down[:, :-1].contiguous()
    with pytest.raises(ValueError, match=re.escape("a weight must be (96, 160), got (96, 159)")):
        Runs(model).decode(0, 1)
