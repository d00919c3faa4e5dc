from __future__ import annotations

import json

import pytest
from native_builds import require_native


def test_every_op_is_measured_beside_its_limit(tmp_path, monkeypatch):
    from benchmarks.engine import micro

    require_native()
    tiny = micro.Shape(hidden=64, layers=1, heads=4, kv_heads=2, inner=96)
    monkeypatch.setitem(micro.SHAPES, "tiny", tiny)
    monkeypatch.setattr(micro, "MATRIX", (96, 64))
    monkeypatch.setattr(micro, "BEYOND_CACHE", 1 << 16)
    monkeypatch.setattr(micro, "STEPS", {"decode 2 at 20": (2, 1, 20), "8 nodes at 9": (1, 8, 9)})
    for name, value in {"ARRAY_BYTES": 1 << 16, "MATRIX_SIZES": (64,), "TRIES": 2}.items():
        monkeypatch.setattr(micro.limits, name, value)
    out = tmp_path / "rows.jsonl"
    micro.main(["--models", "tiny", "--rows", "1,9", "--seconds", "0", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    ops = [row["op"] for row in rows]
    assert [ops.count(op) for op in ("linear", "attention", "rms_norm", "rotate", "silu_mul")] == [
        *(12, 4, 1, 1, 1)
    ]
    assert all(row["native_ms"] > 0 and row["limit_ms"] > 0 for row in rows)
    assert rows[0]["provenance"]["bandwidth_gb_per_s"] > 0


def test_an_unknown_op_is_refused(capsys):
    from benchmarks.engine import micro

    with pytest.raises(SystemExit):
        micro.parse_arguments(["--ops", "linear,conv"])
    assert "must be of linear, matrix, attention, rowwise, got ['conv']" in capsys.readouterr().err
