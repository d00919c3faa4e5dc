"""The limits are what the arithmetic of a Llama model says."""

import pytest
import torch

from benchmarks.lib import limits
from benchmarks.lib.limits import Machine, Work
from folospec.models.checkpoint import read_tensors
from folospec.models.loader import resolve_model

MACHINE = Machine(100.0, {"float32": 1000.0, "bfloat16": 2000.0})
WORK = Work(layer_weights=80, output_weights=20, kv_entries=2, attention_operations=4)


def test_the_weights_are_those_of_the_checkpoint():
    folder = resolve_model("folospec-demo")
    work = Work.of_checkpoint(folder)
    matrices = {name: w.numel() for name, w in read_tensors(folder) if w.dim() == 2}
    embedding = matrices.pop("model.embed_tokens.weight")
    assert work.layer_weights == sum(matrices.values())
    assert work.output_weights == embedding
    assert work.kv_entries == 6 * 2 * 2 * 64
    assert work.attention_operations == 6 * 4 * 64 * 4  # scores and values, 2 operations each


def test_a_step_reads_the_weights_once_and_the_kv_of_every_row():
    assert WORK.step([3], "float32") == (4 * (100 + 6), 200 + 12)
    assert WORK.step([3, 5], "bfloat16") == (2 * (100 + 16), 400 + 32)


def test_prompts_have_logits_for_their_last_rows_alone():
    assert WORK.prompts([3, 1], "float32") == (400, 2 * 80 * 4 + 2 * 20 * 2 + 4 * (6 + 1))


def test_whatever_takes_longer_is_the_limit():
    assert MACHINE.seconds(100, 500, "float32") == 1.0
    assert MACHINE.seconds(100, 3000, "float32") == 3.0
    assert MACHINE.seconds(100, 3000, "bfloat16") == 1.5


def test_a_run_is_its_prompts_and_one_step_for_every_further_token():
    prompts = MACHINE.seconds(*WORK.prompts([2], "float32"), "float32")
    steps = [MACHINE.seconds(*WORK.step([c], "float32"), "float32") for c in (3, 4)]
    found = limits.run_seconds(WORK, MACHINE, [2], 3, 1, "float32")
    assert found == pytest.approx(prompts + sum(steps))
    in_two = limits.run_seconds(WORK, MACHINE, [2, 2], 3, 1, "float32")
    assert in_two == pytest.approx(2 * found)
    assert limits.run_seconds(WORK, MACHINE, [2, 2], 3, 2, "float32") < in_two


def test_this_machine_can_be_measured(monkeypatch):
    monkeypatch.setattr(limits, "ARRAY_BYTES", 1 << 22)
    monkeypatch.setattr(limits, "MATRIX_SIZES", (64,))
    found = limits.measure(1)
    assert found.bytes_per_second > 0
    assert found.operations_per_second.keys() == limits.ITEM_BYTES.keys()
    assert min(found.operations_per_second.values()) > 0


def test_bfloat16_is_no_slower_than_what_it_can_be_widened_to(monkeypatch):
    monkeypatch.setattr(limits, "ARRAY_BYTES", 1 << 16)
    monkeypatch.setattr(limits, "peak", {torch.float32: 9.0, torch.bfloat16: 2.0}.get)
    assert limits.measure(1).operations_per_second == {"float32": 9.0, "bfloat16": 9.0}


@pytest.mark.parametrize(("slow", "largest"), [(1e-9, 512), (1e-12, 2048)])
def test_matrices_grow_only_while_a_product_is_quick(monkeypatch, slow, largest):
    """On a machine that is slow at a type, minutes would go by with the largest."""
    now, sizes = [0.0], []

    class Matrix:
        def __init__(self, size):
            self.size = size

        def __matmul__(self, other):
            sizes.append(self.size)
            now[0] += slow * self.size**3

    monkeypatch.setattr(limits, "_random_matrix", lambda size, dtype: Matrix(size))
    monkeypatch.setattr(limits.time, "perf_counter", lambda: now[0])
    assert limits.peak(None) == pytest.approx(2 / slow)
    assert max(sizes) == largest
    assert now[0] < 2.0
