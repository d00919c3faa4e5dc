from __future__ import annotations

import json

from native_builds import require_native


def test_turns_are_measured_beside_what_both_cost_alone(tmp_path, monkeypatch):
    from benchmarks.engine import turns

    require_native()
    monkeypatch.setattr(turns, "ROUNDS", 1)
    out = tmp_path / "rows.jsonl"
    turns.main(["--tries", "2", "--threads", "1", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["turns"] > 0 and row["provenance"] for row in rows)
    for row in rows:
        assert row["ratio"] == row["turns"] / (row["torch"] + row["native"])
