"""No two records of a run have one id; where an input can be read twice, that is seen at once."""

from __future__ import annotations

import json

import pytest

from folospec.cli.batch_ids import check_ids, refuse_repeated_ids
from folospec.cli.batch_input import find_sources, read_records


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(**files):
        """`write(a=[...])` is a.jsonl, a line for each value."""
        for name, values in files.items():
            lines = "".join(json.dumps(value) + "\n" for value in values)
            (tmp_path / f"{name}.jsonl").write_text(lines)
        return find_sources(["id"], [f"{name}.jsonl" for name in files])

    return write


def test_ids_that_differ_and_records_without_ids_pass(sources):
    values = [{"id": 1}, {"id": "1"}, {"id": None}, {"id": None}, {}, "text", "text", {"id": True}]
    found = sources(a=values, b=[{"id": 2}, {"id": True}])
    check_ids(found)
    records = list(read_records(found))
    assert list(refuse_repeated_ids(records)) == records


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a": [{"id": 1}, "x", {"id": 1}]},
            "a.jsonl, line 3: its id 1 is that of a.jsonl, line 1",
        ),
        (
            {"a": [{"id": 1}], "b": [{"id": 1}]},
            "b.jsonl, line 1: its id 1 is that of a.jsonl, line",
        ),
    ],
)
def test_an_id_that_is_there_twice_is_refused_with_both_places(sources, files, message):
    found = sources(**files)
    with pytest.raises(ValueError, match=message):
        check_ids(found)
    *_, last = refuse_repeated_ids(read_records(found))
    assert f"{last.place}: {last.error}".startswith(message)
    assert last.value == {"id": 1}


def test_a_list_of_json_is_checked_by_its_items(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('[{"id": "a"}, {"id": "a"}]')
    with pytest.raises(ValueError, match="item 2: its id 'a' is that of .*p.json, item 1, too"):
        check_ids(find_sources([], [str(path)]))
