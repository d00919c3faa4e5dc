"""The trace's file: its lines are what the schema says, and it is whole whatever happens."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import re
from pathlib import Path
from typing import Any, get_args

import harness
import pytest
from harness import make_llm, run

from folospec import LLM
from folospec.trace import records as schema
from folospec.trace.records import StepTrace, TraceHeader, from_dict, read_trace

pytestmark = pytest.mark.usefixtures("oracle")

DOC = (Path(__file__).parents[2] / "docs" / "trace.md").read_text()
CLASSES = [value for value in vars(schema).values() if dataclasses.is_dataclass(value)]
NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 4}
TREE = {"method": "oracle_tree", "num_speculative_tokens": 12}


def test_the_header_says_what_ran(models: Any, tmp_path: Path) -> None:
    drafters = [NGRAM, {"method": "ngram", "num_speculative_tokens": 2}]
    speculative = {"drafters": drafters, "merge": True, "acceptance": "rejection"}
    make_llm(models.target, speculative, trace=tmp_path / "t", num_blocks=40, block_size=4)
    header, steps = read_trace(tmp_path / "t")
    assert list(steps) == []
    assert (header.model, header.vocab_size) == (models.target, harness.VOCAB_SIZE)
    assert (header.block_size, header.num_blocks) == (4, 40)
    assert (header.acceptance, header.merge, header.adaptive) == ("rejection", True, False)
    [one, two] = header.drafters
    assert one.name != two.name
    assert one.options == {"prompt_lookup_min": 1}
    assert [d.num_speculative_tokens for d in header.drafters] == [4, 2]
    make_llm(models.target, trace=tmp_path / "t")
    header, _ = read_trace(tmp_path / "t")
    assert (header.drafters, header.acceptance) == ([], None)


def test_a_file_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    models: Any, tmp_path: Path
) -> None:
    for path in (tmp_path, tmp_path / "no" / "such" / "folder", str(tmp_path / "no" / "t")):
        with pytest.raises(ValueError, match="trace must be a file that can be written, got"):
            LLM("/no/such/model", trace=path)
    for wrong in ("", 3, b"t"):
        with pytest.raises(ValueError, match="trace must be None or the path of a file"):
            LLM(models.target, trace=wrong)


def test_an_old_file_stays_until_the_engine_is_made_and_is_replaced_then(
    models: Any, tmp_path: Path
) -> None:
    path = tmp_path / "t"
    path.write_text("what was there\n")
    with pytest.raises(ValueError, match="neither a folder"):
        LLM("/no/such/model", trace=path)
    assert path.read_text() == "what was there\n"
    make_llm(models.target, trace=path)
    assert read_trace(path)[0].model == models.target


def test_a_run_that_ends_with_an_exception_leaves_whole_lines(models: Any, tmp_path: Path) -> None:
    path = tmp_path / "t"
    llm = make_llm(models.target, {"method": "irregular"}, trace=path)
    with pytest.raises(RuntimeError, match="not in the mood"):
        run(llm)
    _, steps = read_trace(path)
    assert len(list(steps)) == llm.stats()["num_steps"] > 0


def test_a_step_whose_drafter_fails_to_observe_is_traced(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, outcomes: Any) -> None:
        raise RuntimeError("cannot learn")

    monkeypatch.setattr(harness.AdversarialDrafter, "observe", fail)
    llm = make_llm(models.target, {"method": "adversarial"}, trace=tmp_path / "t")
    with pytest.raises(RuntimeError, match="cannot learn"):
        run(llm)
    steps = list(read_trace(tmp_path / "t")[1])
    assert len(steps) == llm.stats()["num_steps"]
    assert any(seq.proposal is not None for seq in steps[-1].sequences)


def test_a_full_disk_ends_the_trace_and_not_the_run(
    models: Any,
    plain: harness.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    llm = make_llm(models.target, TREE, trace=tmp_path / "t")

    def fail(self: Any, record: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(schema.TraceFile, "write", fail)
    assert run(llm).tokens == plain.tokens
    assert [r.getMessage() for r in caplog.records if "No space" in r.getMessage()] == [
        "the trace ends before step 1: [Errno 28] No space left on device"
    ]


def test_the_file_is_closed_with_the_engine(models: Any, tmp_path: Path) -> None:
    llm = make_llm(models.target, trace=tmp_path / "t")
    file = llm.engine.tracer._file
    assert file is not None
    close, handle = file.close, file._file
    assert close.alive
    assert not handle.closed
    del llm, file
    gc.collect()
    assert handle.closed


def changed(value: Any, keys: list[Any], new: Any) -> Any:
    value = copy.deepcopy(value)
    *way, last = keys
    inner = value
    for key in way:
        inner = inner[key]
    if new is KeyError:
        del inner[last]
    else:
        inner[last] = new
    return value


@pytest.mark.parametrize(
    ("keys", "new", "words"),
    [
        (["step"], "1", "step must be of type int, got '1'"),
        (["step"], True, "step must be of type int, got True"),
        (["times", "draft"], None, "times.draft must be of type float"),
        (["times"], KeyError, "must be an object with"),
        (["extra"], 1, "must be an object with"),
        (["copies"], [[1, "2"]], r"copies\[0\]\[1\] must be of type int"),
        (["preempted"], "request-0-0", "preempted must be a list"),
        (["sequences", 0, "proposal", "nodes", 0, "verdict"], "maybe", "must be one of 'accepted'"),
        (["sequences", 0, "new_tokens", 0], 5, r"new_tokens\[0\] must be an object"),
        (["sequences", 0, "stop_reason"], 1.5, "stop_reason must be of type str or int"),
        (["sequences", 0, "draft_progress"], {"a": 1.5}, "draft_progress.a must be of type int"),
    ],
)
def test_a_line_that_breaks_the_schema_is_refused(
    keys: list[Any], new: Any, words: str, models: Any, tmp_path: Path
) -> None:
    path = tmp_path / "t"
    llm = make_llm(models.target, NGRAM, trace=path)
    llm.generate(harness.as_prompts([[5, 6, 5, 6, 5]]), use_tqdm=False)
    header, *lines = path.read_text().splitlines()
    number, value = next(
        (i, v) for i, v in enumerate(map(json.loads, lines)) if v["sequences"][0]["proposal"]
    )
    assert isinstance(from_dict(StepTrace, value), StepTrace)
    lines[number] = json.dumps(changed(value, keys, new))
    path.write_text("\n".join([header, *lines]))
    steps = read_trace(path)[1]
    assert [next(steps).step for _ in range(number)] == list(range(1, number + 1))
    with pytest.raises(ValueError, match=words) as caught:
        next(steps)
    assert f"line {number + 2}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a trace"),
        ("[1]\n", "is not a trace"),
        ('{"step": 1}\n', "is not a trace"),
        ("hello\n", "line 1: not JSON"),
        ('{"schema": "folospec.trace", "version": 3}\n', "version 3 of the trace schema, and only"),
        ('{"schema": "folospec.trace", "version": 2}\n', "line 1 must be an object with"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_trace(path)


def documented(name: str) -> dict[str, str]:
    """Field -> type, from the table under the heading of a class."""
    section = DOC.split(f"### {name}\n")[1].split("\n### ")[0].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", section, flags=re.MULTILINE))


def as_words(annotation: Any) -> str:
    return str(annotation).replace(" | None", " or null").replace(" | ", " or ")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_schema_is_documented_field_by_field(cls: Any) -> None:
    own = {field.name: as_words(field.type) for field in dataclasses.fields(cls)}
    assert documented(cls.__name__) == own


def test_every_word_of_the_schema_is_explained() -> None:
    for word in (*get_args(schema.NodeVerdict), *get_args(schema.NextKind)):
        assert f"| `{word}` |" in DOC
    assert {TraceHeader, StepTrace} < set(CLASSES)
    assert f"version {schema.VERSION}" in DOC
