"""The memory benchmark on a tiny checkpoint, and controls that must fail."""

import json
import re
from importlib.metadata import version

import pytest
import torch

from benchmarks.engine import memory
from benchmarks.models import checkpoint

TINY = ["--gigabytes", "0.002", "--hidden-size", "128", "--num-blocks", "16", "--dtypes", "float32"]

pytestmark = pytest.mark.skipif(not memory.STATUS.exists(), reason="needs /proc")


@pytest.fixture(scope="module")
def measured():
    """What a fresh process measured, filled in by the first run."""
    return {}


@pytest.fixture
def run(tmp_path, measured, monkeypatch):
    """Run the benchmark; return the exit status and the only row. One process measures for all."""
    really = memory.measure_in_new_process

    def measure_once(*arguments):
        if not measured:
            measured.update(really(*arguments))
        return measured

    def run(*options):
        folder, out = tmp_path / "work", tmp_path / "rows.jsonl"
        folder.mkdir()
        monkeypatch.setattr(memory, "measure_in_new_process", measure_once)
        status = memory.main([*TINY, "--folder", str(folder), "--out", str(out), *options])
        assert list(folder.iterdir()) == []  # the checkpoint is gone
        return status, json.loads(out.read_text())

    return run


def test_a_tiny_checkpoint_loads_within_its_budget_and_the_pool_never_grows(run):
    status, row = run()
    assert status == 0
    assert row["failures"] == []
    assert row["checkpoint_bytes"] >= 2_000_000
    assert row["weights_bytes"] == 2 * row["checkpoint_bytes"]
    assert row["kv_bytes"] == [row["pool_bytes"]]
    assert row["peak_rss_loading"] > row["peak_anon_loading"] > row["anon_at_start"]
    assert row["provenance"]["torch"] == version("torch")


def test_control_the_same_measurement_fails_an_impossible_budget(run):
    status, row = run("--allowance-mb", "1")
    assert status == 1
    assert "must be below" in row["failures"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_bytes": [100, 200]}, r"must have 100 bytes throughout, got \[100, 200\]"),
        ({"kv_bytes": [99]}, "must have 100 bytes"),
        ({"peak_anon_loading": 1000}, "peak anonymous memory"),
        ({"num_output_tokens": 0}, "tokens were to be generated"),
    ],
)
def test_control_each_check_notices_what_it_is_for(change, words):
    good = {
        "budget": 1000,
        "peak_anon_loading": 999,
        "pool_bytes": 100,
        "kv_bytes": [100],
        "num_output_tokens": memory.NUM_PROMPTS * memory.NEW_TOKENS,
    }
    assert memory.failures(good) == []
    (failure,) = memory.failures({**good, **change})
    assert re.search(words, failure)


def test_the_sampler_sees_a_peak_that_is_gone_again():
    size = 300_000_000
    with memory.MemorySampler() as sampler:
        before = memory.read_status("RssAnon")
        block = torch.ones(size // 4)
        for _ in range(5):
            block.mul_(1.0)
        del block
    assert sampler.peak - before > 0.9 * size
    assert memory.read_status("RssAnon") - before < 0.5 * size


def test_a_written_checkpoint_is_sharded_and_has_the_asked_size(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1_000_000)
    shape = checkpoint.shape_of_at_least(3_000_000, 128)
    total = checkpoint.write_checkpoint(tmp_path, shape)
    assert total == 2 * shape.num_parameters >= 3_000_000
    smaller = checkpoint.Shape(128, shape.num_layers - 1)
    assert 2 * smaller.num_parameters < 3_000_000
    assert len(list(tmp_path.glob("*.safetensors"))) > 1


def test_an_unknown_dtype_is_refused(capsys):
    with pytest.raises(SystemExit):
        memory.parse_arguments(["--dtypes", "int8"])
    assert "int8" in capsys.readouterr().err
