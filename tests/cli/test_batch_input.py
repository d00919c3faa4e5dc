"""Prompts are read as they were written: one record per line, and nothing else ends a line."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest

from folospec.cli.batch_input import count_records, find_sources, read_records

SEPARATORS = "\u2028 \u2029 \x85 \x0b \x0c \x1c"


@pytest.fixture
def records(tmp_path):
    def read(content: bytes, name="prompts.jsonl", input_format="auto"):
        path = tmp_path / name
        path.write_bytes(content)
        sources = find_sources([], [str(path)], input_format)
        found = list(read_records(sources))
        assert count_records(sources) in (None, len(found))
        return found

    return read


@pytest.fixture
def stdin(monkeypatch):
    def arrange(content: bytes, is_terminal=False):
        stream = SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: is_terminal)
        monkeypatch.setattr(sys, "stdin", stream)

    return arrange


def test_only_a_newline_ends_a_line(records):
    values = [{"prompt": f"a{SEPARATORS}b"}, SEPARATORS]
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    content = "\n".join(lines).encode()
    assert len(content.decode().splitlines()) > 2  # what would cut them
    assert [record.value for record in records(content)] == values


def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_a_line(records):
    found = records(b'\xef\xbb\xbf"a"\r\n\r\n  \r\n{"prompt": "b"}\r\n')
    assert [(record.line, record.value) for record in found] == [(1, "a"), (4, {"prompt": "b"})]
    assert [record.value for record in records(b"\xef\xbb\xbfa\r\nb", "p.txt", "lines")] == [
        "a",
        "b",
    ]


def test_records_are_numbered_over_all_sources_and_lines_within_theirs(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('"x"\n\n"y"\n')
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    found = list(read_records(find_sources(["first"], files)))
    assert [record.index for record in found] == [0, 1, 2, 3, 4]
    assert [record.line for record in found] == [None, 1, 3, 1, 3]
    assert found[4].place == f"{files[1]}, line 3"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"not json", "not JSON: Expecting value"),
        (b'{"prompt": "x"', "not JSON"),
        (b"\xff\xfe", "not UTF-8: 'utf-8' codec can't decode byte 0xff"),
        (b'"\xe9"', "not UTF-8"),
        (b'{"prompt": "x", "n": 1, "prompt": "y"}', "an object has the key 'prompt' twice"),
        (b'{"prompt": "x", "sampling_params": {"n": 1, "n": 1}}', "has the key 'n' twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "not JSON: Exceeds the limit"),
    ],
)
def test_a_line_that_cannot_be_read_is_a_record_with_an_error(records, line, words):
    before, bad, after = records(b'"a"\n' + line + b'\n"b"\n')
    assert (before.value, after.value) == ("a", "b")
    assert words in bad.error
    assert (bad.index, bad.line, bad.value) == (1, 2, None)


def test_a_json_list_is_many_prompts_and_another_value_one(records):
    values = ["a", {"prompt": "b"}, 3]
    found = records(json.dumps(values).encode(), "prompts.json")
    assert [record.value for record in found] == values
    assert found[1].place.endswith("prompts.json, item 2")
    assert [record.value for record in records(b'{"prompt": "a"}', "p.json")] == [{"prompt": "a"}]


def test_a_text_file_is_one_prompt_without_the_editors_newline(records):
    [record] = records(b"two\nlines\r\n", "prompt.txt")
    assert (record.value, record.line, record.is_one_of_many) == ("two\nlines", None, False)
    [record] = records(b"a\n\n", "prompt.txt")
    assert record.value == "a\n"


def test_stdin_is_read_by_its_dash_or_without_any_prompt(stdin):
    stdin(b'"a"\n"b"\n')
    found = read_records(find_sources(["x", "-"], [], "jsonl"))
    assert [record.value for record in found] == ["x", "a", "b"]
    stdin(b"whole\ntext")
    [record] = read_records(find_sources([], []))
    assert (record.value, record.place) == ("whole\ntext", "stdin")


def test_lines_are_read_no_further_than_asked(stdin):
    class Endless(io.RawIOBase):
        num_lines = 0

        def __iter__(self):
            while True:
                self.num_lines += 1
                yield b'"x"\n'

    stdin(b"")
    sys.stdin.buffer = endless = Endless()
    records = read_records(find_sources([], ["-"], "jsonl"))
    assert [next(records).index for _ in range(3)] == [0, 1, 2]
    assert endless.num_lines == 3


def test_objects_of_one_line_may_have_keys_in_common(records):
    [record] = records(b'{"messages": [{"role": "user"}, {"role": "user"}]}')
    assert (record.error, len(record.value["messages"])) == (None, 2)


def test_equal_digests_are_equal_bytes(records):
    one, same, other = records(b'"a"\n"a"\n "a"\n')
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("prompts", "files", "words"),
    [
        ([], ["/no/such/file"], "--file /no/such/file: No such file"),
        ([], ["."], "--file .: is a folder"),
        ([], ["a\0b"], "embedded null"),
        (["-"], ["-"], "stdin can be read once"),
        ([""], [], "argument 1: the prompt is empty"),
        (["a", "\udcff"], [], "argument 2: not UTF-8"),
        (["-"], [], "stdin: the prompt is empty"),
    ],
)
def test_what_cannot_be_read_at_all_is_refused(stdin, prompts, files, words):
    stdin(b"")
    with pytest.raises(ValueError, match=words):
        list(read_records(find_sources(prompts, files)))


def test_a_terminal_is_not_waited_for(stdin):
    stdin(b"", is_terminal=True)
    with pytest.raises(ValueError, match="no prompt: give one"):
        find_sources([], [])


def test_unknown_formats_and_texts_that_are_not_utf8_are_refused(records):
    with pytest.raises(ValueError, match="one of auto, jsonl, json, lines, text"):
        records(b"a", input_format="csv")
    for name in ("p.txt", "p.json"):
        with pytest.raises(ValueError, match=f"{name}: not UTF-8"):
            records(b"\xff", name)
    with pytest.raises(ValueError, match=r"p.json: not JSON"):
        records(b"[1, 2", "p.json")
    with pytest.raises(ValueError, match=r"p.json: an object has the key 'id' twice"):
        records(b'[{"id": 1, "id": 2}]', "p.json")
