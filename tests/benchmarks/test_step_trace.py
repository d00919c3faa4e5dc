"""What a step passes through is counted by file, and reading a property is no call."""

from __future__ import annotations

from benchmarks.engine.step_trace import traced
from folospec.core.sequence import Sequence
from folospec.core.token_tree import TokenTree


def test_calls_are_counted_by_file_and_property_reads_are_not() -> None:
    seq = Sequence("a", [1, 2])

    def step() -> None:
        assert seq.num_tokens == 2
        seq.add_token_id(3)
        TokenTree.chain([1])

    found = traced(step).summary("plain")
    assert set(found["calls_by_file"]) == {"core/sequence.py", "core/token_tree.py"}
    assert found["calls_by_file"]["core/sequence.py"] == 2  # its own check of the status
    assert found["cross_file_calls"] == 0
    assert found["mutual"] == []
