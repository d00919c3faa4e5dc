"""The moves of a step are made at once: no sequence's touch those of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from harness import OracleTreeDrafter, assert_speculated, futures_of, make_llm, run

from folospec.core.kv_moves import KVMoves
from folospec.worker.worker import TARGET, Worker


class Watch:
    """Looks at every step's moves before they are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_steps = 0
        self._touched: list[set[tuple[str, int]]] = []
        add, apply = KVMoves.add, Worker.apply

        def watched_add(
            moves: KVMoves, owner: str, sources: Sequence[int], targets: Sequence[int]
        ) -> None:
            self._touched.append({(owner, slot) for slot in (*sources, *targets)})
            add(moves, owner, sources, targets)

        def watched_apply(worker: Worker, copies: Any = (), moves: KVMoves | None = None) -> None:
            if moves is not None:
                self.check()
            apply(worker, copies, moves)

        monkeypatch.setattr(KVMoves, "add", watched_add)
        monkeypatch.setattr(Worker, "apply", watched_apply)

    def check(self) -> None:
        self.num_steps += len(self._touched) > 1
        assert sum(map(len, self._touched)) == len(set().union(*self._touched))
        self._touched.clear()


def test_sequences_never_touch_the_rows_of_each_other(
    monkeypatch: pytest.MonkeyPatch, models: Any
) -> None:
    monkeypatch.setattr(OracleTreeDrafter, "futures", futures_of(run(make_llm(models.target))))
    watch = Watch(monkeypatch)
    speculative = {"method": "oracle_tree", "num_speculative_tokens": 12}
    result = run(make_llm(models.target, speculative=speculative))
    assert_speculated(result.stats, moved=True)
    assert watch.num_steps > 3, "several sequences moved rows in one step"


def test_moves_that_touch_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    moves = KVMoves()
    moves.add(TARGET, [5], [2])
    moves.add(TARGET, [7], [5])
    with pytest.raises(AssertionError):
        watch.check()
