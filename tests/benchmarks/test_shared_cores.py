from __future__ import annotations

import json


def test_the_share_is_that_of_runs_in_turns(tmp_path, monkeypatch):
    from benchmarks.engine import shared_cores

    speeds = iter([7.0, 8.0, 4.0, 10.0, 3.0, 6.0, 3.0])
    loops = []
    monkeypatch.setattr(shared_cores, "tokens_per_second", lambda llm, tokens: next(speeds))
    monkeypatch.setattr(shared_cores, "SETTLING_SECONDS", 0.0)
    monkeypatch.setattr(shared_cores, "start_loop", lambda: loops.append(Loop()) or loops[-1])
    out = tmp_path / "rows.jsonl"
    shared_cores.main(["--rounds", "3", "--loops", "2", "--threads", "1", "--out", str(out)])
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["quiet"], row["shared"], row["share"]) == (8.0, 3.0, 0.5)
    assert len(loops) == 6
    assert all(loop.ended == ["kill", "wait"] for loop in loops)


class Loop:
    """A process that never was."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def kill(self) -> None:
        self.ended.append("kill")

    def wait(self) -> None:
        self.ended.append("wait")
