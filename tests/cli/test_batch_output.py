"""The file of results: whatever a killed run leaves of it, the next run makes whole."""

from __future__ import annotations

import errno
import json
import os
import threading

import pytest
from fake_engine import FakeEngine, output_of

from folospec.cli import batch_result
from folospec.cli.batch import Batch
from folospec.cli.batch_input import find_sources, read_records
from folospec.cli.batch_output import Journal
from folospec.cli.batch_request import RequestTemplate
from folospec.cli.batch_result import Result
from folospec.cli.runner import Interrupt
from folospec.outputs import Logprob

NO_TIMES = {"first_token_time": None, "finished_time": None}
SETTINGS = {"model": "m", "seed": 0, "chat": False}
LINES = ['"a bb ccc"', '{"id": "x", "prompt": "dddd"}', "broken", '"e f"']


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return str(path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def run(prompts, out, journal_class=Journal, **options):
    """One run of the command, with an engine that has no model."""
    journal = journal_class(str(out), SETTINGS, **options)
    engine = FakeEngine()
    try:
        records = journal.missing(read_records(find_sources([], [prompts])))
        Batch(engine, RequestTemplate(), journal.write).run(records, Interrupt())
        journal.finish()
    finally:
        journal.close()
    return engine


def results(out):
    """What the file says, without the times."""
    found = [json.loads(line) for line in out.read_text().splitlines()]
    return {one["index"]: (one["id"], one.get("outputs"), one.get("error")) for one in found}


def is_complete(out, expected):
    try:
        return results(out) == expected and len(out.read_text().splitlines()) == len(expected)
    except ValueError:
        return False


def faults_of_resuming(prompts, out, journal_class, stride=1):
    """Cut the file of a whole run at every byte, resume, and count what is wrong afterwards."""
    run(prompts, out)
    whole, expected = out.read_bytes(), results(out)
    assert len(expected) == len(LINES)
    assert len(whole) > 500
    faults = 0
    for size in range(0, len(whole) + 1, stride):
        out.write_bytes(whole[:size])
        try:
            run(prompts, out, journal_class)
        except ValueError:
            faults += 1
        else:
            faults += not is_complete(out, expected)
    return faults


@pytest.fixture
def quick(monkeypatch):
    """Thousands of runs in a second: nothing goes to the disk, and metrics are left out."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(batch_result, "asdict", lambda metrics: {"arrival_time": 0.0, **NO_TIMES})


@pytest.mark.usefixtures("quick")
def test_a_file_cut_at_any_byte_is_made_whole(prompts, out):
    assert faults_of_resuming(prompts, out, Journal) == 0


@pytest.mark.usefixtures("quick")
def test_a_writer_that_leaves_torn_lines_fails_that_test(prompts, out):
    class Careless(Journal):
        """Takes a torn line for a record without a result, and writes behind it."""

        def _prepare(self, overwrite, retry_failed):
            self._read()

    assert faults_of_resuming(prompts, out, Careless, stride=5) > len(LINES)


def test_a_second_run_computes_only_what_is_missing(prompts, out):
    assert run(prompts, out).num_steps > 0
    before = out.read_bytes()
    assert run(prompts, out).params == {}
    lines = before.splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[2])
    assert len(run(prompts, out).params) <= 2
    assert set(results(out)) == {0, 1, 2, 3}


def test_a_record_says_where_it_comes_from(prompts, out):
    run(prompts, out)
    found = {one["index"]: one for one in map(json.loads, out.read_text().splitlines())}
    assert [found[i]["line"] for i in range(4)] == [1, 2, 3, 4]
    assert [found[i]["id"] for i in range(4)] == [None, "x", None, None]
    assert {one["file"] for one in found.values()} == {prompts}
    assert found[2]["error"].startswith("not JSON")
    assert found[1]["outputs"][0]["token_ids"] == [4]


def test_failed_records_run_again_if_asked(prompts, out):
    run(prompts, out)
    first = results(out)
    content = out.read_bytes()
    with open(prompts, "w") as file:
        file.write("\n".join(LINES).replace("broken", '"mended"'))
    run(prompts, out, retry_failed=True)
    assert results(out)[2][2] is None
    assert {i: one for i, one in results(out).items() if i != 2} == {
        i: one for i, one in first.items() if i != 2
    }
    assert len(out.read_bytes().splitlines()) == len(LINES)
    assert out.read_bytes() != content
    assert not out.with_name("out.jsonl.tmp").exists()


def test_changed_input_and_changed_settings_are_refused(prompts, out):
    run(prompts, out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="line 1: was computed with another model"):
        Journal(str(out), {**SETTINGS, "model": "other"})
    with open(prompts, "w") as file:
        file.write("\n".join(reversed(LINES)))
    journal = Journal(str(out), SETTINGS)
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 1 is not what result 0"):
        list(journal.missing(read_records(find_sources([], [prompts]))))
    journal.close()
    assert out.read_bytes() == before
    run(prompts, out, overwrite=True)
    assert results(out)[0][1][0]["text"] == "E F"


def test_settings_that_differ_are_named_with_both_values(prompts, out):
    run(prompts, out)
    with pytest.raises(ValueError, match="line 1: was computed with another model") as caught:
        Journal(str(out), {"model": "other", "seed": 0, "chat": True, "max_tokens": 5})
    assert (
        "other options (--model was 'm' and is 'other', --chat was not given and is True, "
        "--max-tokens was not given and is 5); use --overwrite"
    ) in str(caught.value)
    with pytest.raises(ValueError, match=r"\(--seed was 0 and is 7\)"):
        Journal(str(out), {**SETTINGS, "seed": 7})


def lines_with_settings(out):
    found = map(json.loads, out.read_text().splitlines())
    return [one["index"] for one in found if "settings" in one]


def test_one_line_has_the_settings_whatever_becomes_of_the_others(prompts, out):
    run(prompts, out)
    assert lines_with_settings(out) == [2]
    with open(prompts, "w") as file:
        file.write("\n".join(LINES).replace("broken", '"mended"'))
    run(prompts, out, retry_failed=True)
    assert lines_with_settings(out) == [2]
    lines = out.read_bytes().splitlines(keepends=True)
    assert b'"settings"' in lines[-1]
    with pytest.raises(ValueError, match=r"line 1: was .* \(--seed was 0 and is 7"):
        Journal(str(out), {**SETTINGS, "seed": 7})
    out.write_bytes(lines[0])
    with pytest.raises(ValueError, match="or other options; use --overwrite"):
        Journal(str(out), {**SETTINGS, "seed": 7})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"some text", "line 1: is no result"),
        (b'"a prompt"\n', "line 1: is no result"),
        (b'{"prompt": "a"}\n{"prompt"', "line 1: is no result"),
        (b"\0\0\0\0", "line 1: is no result"),
        (b'{"key": "x", "index": 0}\n', "line 1: is no result"),
        (b'{"key": "x-y", "index": 0}\n', "another model"),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(out, content, words):
    out.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        Journal(str(out), SETTINGS)
    assert out.read_bytes() == content


def test_a_result_that_is_there_twice_is_refused(prompts, out):
    run(prompts, out)
    out.write_bytes(out.read_bytes() + out.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="is there twice"):
        Journal(str(out), SETTINGS)


def test_two_runs_do_not_write_to_one_file(out):
    pytest.importorskip("fcntl")
    journal = Journal(str(out), SETTINGS)
    with pytest.raises(ValueError, match="another run is writing to it"):
        Journal(str(out), SETTINGS)
    journal.close()
    Journal(str(out), SETTINGS).close()


@pytest.mark.parametrize("name", ["no/such/folder/out", ".", "a\0b"])
def test_a_file_that_cannot_be_written_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="--output"):
        Journal(str(tmp_path / name), SETTINGS)


def a_result(prompts, text="abc"):
    [record, *_] = read_records(find_sources([], [prompts]))
    return Result(record, output_of("r", text, [1], "length"))


def test_a_full_disk_leaves_whole_lines(prompts, out, monkeypatch):
    journal = Journal(str(out), SETTINGS)
    journal.write(a_result(prompts))
    before, real = out.read_bytes(), os.write

    def write(fd, data):
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "full")
        return real(fd, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left on device") as caught:
        journal.write(a_result(prompts))
    journal.close()
    assert caught.value.filename == str(out)
    assert out.read_bytes() == before


def test_a_pipe_is_written_to_without_resuming(prompts, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    run(prompts, pipe)
    reader.join(30)
    assert len(read[0].splitlines()) == len(LINES)


def test_any_text_is_one_line_of_ascii_and_any_logprob_is_json(prompts, out):
    result = a_result(prompts)
    completion = result.output.outputs[0]
    completion.text = text = "\u2028\n\ud800 é\x00"
    completion.logprobs = [{5: Logprob(float("-inf"), 1, "x")}]
    journal = Journal(str(out), SETTINGS)
    journal.write(result)
    journal.close()
    [line] = out.read_bytes().splitlines()

    def refuse(constant):
        raise AssertionError(constant)

    [written] = json.loads(line.decode("ascii"), parse_constant=refuse)["outputs"]
    assert written["text"] == text
    assert written["logprobs"] == [{"5": {"logprob": None, "rank": 1, "decoded_token": "x"}}]
