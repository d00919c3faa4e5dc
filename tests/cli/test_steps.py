"""The view of steps: what is drawn for a draft, and the ways to it from the command line."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from folospec.cli.steps import StepsView
from folospec.trace.records import (
    BlockCounts,
    NodeTrace,
    ProposalTrace,
    SequenceTrace,
    StepTimes,
    StepTrace,
    TokenTrace,
    read_trace,
)

DOC = (Path(__file__).parents[2] / "docs" / "trace.md").read_text()
PROMPT = "w1 w2 w3 w4 w5"
NGRAM = '{"method": "ngram", "prompt_lookup_min": 1}'
VERDICTS = {"+": "accepted", "-": "rejected", "~": "not_reached", "s": "scratch"}
GREEN, RED, BLUE, DIM = "\x1b[32m", "\x1b[31m", "\x1b[1;34m", "\x1b[2m"


def node(text, parent, verdict, confidence=None):
    token_id = ord(text[0])
    return NodeTrace(token_id, text, parent, confidence, None, VERDICTS[verdict])


def sequence(nodes=None, own="z", **changes):
    path = [i for i, one in enumerate(nodes or []) if one.verdict == "accepted"]
    own = TokenTrace(9, own) if own is not None else None
    values = {
        "request_id": "r",
        "seq_id": "r-0",
        "forked_from": None,
        "start": 7,
        "num_tokens": 1,
        "num_prompt_tokens": 4,
        "root": TokenTrace(1, "root"),
        "root_position": 7,
        "proposal": ProposalTrace("some_drafter", nodes) if nodes is not None else None,
        "undrafted_reason": None,
        "path": path,
        "next_token": own,
        "next_kind": "bonus",
        "new_tokens": [TokenTrace(1, "x")] * (len(path) + 1),
        "num_blocks": 2,
        "num_blocks_kept": 1,
        "draft_progress": {},
        "finish_reason": None,
        "stop_reason": None,
    }
    return SequenceTrace(**{**values, **changes})


def step_of(*sequences, preempted=()):
    times = StepTimes(0.001, 0.002, 0.001, 0.001, 0.0, 0.0, total=0.005)
    counts = BlockCounts(total=8, held=6, free=2)
    return StepTrace(3, 0.0, times, 9, counts, list(preempted), [], 0, list(sequences))


def drawn(*sequences, labelled=False, preempted=(), **console):
    file = io.StringIO()
    out = Console(file=file, width=40, markup=False, highlight=False, emoji=False, **console)
    StepsView(out, labelled=labelled).show(step_of(*sequences, preempted=preempted))
    return file.getvalue().splitlines()


CHAIN = [node("a", -1, "+", 0.91), node("b", 0, "-", 0.5), node("c", 1, "~", 1.0)]


def test_a_chain_is_one_line_and_the_targets_token_ends_what_was_accepted():
    assert drawn(sequence(CHAIN)) == [
        "step 3  some_drafter: 1 of 3 accepted  2 tokens  5.0 ms",
        "  'root' +'a' 91% ='z' | -'b' 50% ~'c' 100%",
    ]
    rejected = [node("a", -1, "-"), node("b", 0, "~")]
    assert drawn(sequence(rejected))[1:] == ["  'root' ='z' | -'a' ~'b'"]
    accepted = [node("a", -1, "+"), node("b", 0, "+")]
    assert drawn(sequence(accepted))[1:] == ["  'root' +'a' +'b' ='z'"]


def test_a_tree_is_a_tree_and_its_runs_are_lines():
    nodes = [
        node("a", -1, "+"),
        node("b", -1, "-"),
        node("c", 0, "+"),
        node("d", 1, "~"),
        node("e", 2, "-"),
        node("f", 3, "~"),
        node("g", 1, "~"),
    ]
    assert drawn(sequence(nodes))[1:] == [
        "  'root'",
        "  |-- +'a' +'c'",
        "  |   |-- -'e'",
        "  |   `-- ='z'",
        "  `-- -'b'",
        "      |-- ~'d' ~'f'",
        "      `-- ~'g'",
    ]


def test_scratch_rows_are_counted_and_what_hangs_below_them_too():
    nodes = [
        node("s", -1, "s"),
        node("a", -1, "+"),
        node("t", 0, "s"),
        node("b", 1, "-"),
        node("u", 2, "~"),
    ]
    assert drawn(sequence(nodes)) == [
        "step 3  some_drafter: 1 of 3 accepted  2 tokens  5.0 ms  3 scratch rows",
        "  'root' +'a' ='z' | -'b'",
    ]


def test_an_accepted_node_that_hangs_below_a_scratch_row_is_left_out():
    """No engine writes that; a file may say it."""
    nodes = [node("s", -1, "s"), node("a", -1, "-"), node("b", -1, "-"), node("t", 0, "+")]
    assert drawn(sequence(nodes))[1:] == ["  'root'", "  |-- -'a'", "  |-- -'b'", "  `-- ='z'"]
    assert drawn(sequence(nodes[:2] + nodes[3:]))[1:] == ["  'root' ='z' | -'a'"]


def test_spaces_and_line_ends_are_seen_and_ids_stand_for_missing_text():
    nodes = [node("\n    ", -1, "+"), node(" b", 0, "-"), node("\x1b[31m", 1, "~")]
    assert drawn(sequence(nodes, own="\t"))[1:] == [r"  'root' +'\n    ' ='\t' | -' b' ~'\x1b[31m'"]
    nodes = [NodeTrace(17, None, -1, None, None, "accepted")]
    unnamed = sequence(nodes, root=TokenTrace(5, None), next_token=TokenTrace(3, None))
    assert drawn(unnamed)[1:] == ["  5 +17 =3"]


def test_colours_say_what_the_marks_say():
    [title, line] = drawn(sequence(CHAIN), force_terminal=True, color_system="standard")
    assert title.startswith("\x1b[1mstep 3")
    for part in (f"{GREEN}+'a'", f"{RED}-'b'", f"{BLUE}='z'", f"{DIM}~'c'", f"{DIM}'root'"):
        assert part in line
    [_, plain] = drawn(sequence(CHAIN), force_terminal=True, color_system="standard", no_color=True)
    for colour in ("32", "31", "34"):
        assert f"[{colour}m" not in plain
    assert all(part in plain for part in ("+'a'", "-'b'", "='z'", "~'c'"))


def test_steps_without_a_draft_say_what_they_did():
    chunk = sequence(
        None, None, start=0, num_tokens=8, root=None, root_position=None, new_tokens=[]
    )
    assert drawn(chunk) == ["step 3  computes tokens 0 to 7  5.0 ms"]
    assert drawn(sequence()) == ["step 3  no draft  1 token  5.0 ms", "  'root' ='z'"]
    refused = sequence(undrafted_reason="batch_full")
    assert drawn(refused)[0] == "step 3  no draft: batch_full  1 token  5.0 ms"
    fork = sequence(forked_from="r-0", seq_id="r-1")
    assert drawn(fork)[0] == "step 3  forked from r-0  1 token  5.0 ms"
    stopped = sequence(finish_reason="stop", stop_reason="\n")
    assert drawn(stopped)[0].endswith(r"  ends: stop '\n'")
    assert drawn(sequence(finish_reason="length"))[0].endswith("  ends: length")
    nothing = sequence([node("a", -1, "+")], None, new_tokens=[TokenTrace(97, "a")])
    assert drawn(nothing)[1:] == ["  'root' +'a'"]


def test_every_line_of_a_batch_names_its_sequence():
    nodes = [node("a", -1, "-"), node("b", -1, "-")]
    lines = drawn(sequence(nodes), sequence(seq_id="other-0"), labelled=True, preempted=["third-0"])
    assert lines[0] == "step 3  preempted: third-0; 6 of 8 blocks are held"
    assert [line.split("  ")[0] for line in lines[1:]] == ["r-0"] * 5 + ["other-0"] * 2


@pytest.fixture
def options(target):
    return ("--model", target, "--max-tokens", "48", "--temperature", "0.7", "--seed", "3")


def without_times(text):
    return re.sub(r"\d+\.\d ms", "? ms", text)


def test_show_steps_prints_every_step_and_then_the_completion(folospec, options, tmp_path):
    trace = ("--trace", tmp_path / "t")
    draft = ("--speculative", NGRAM)
    result = folospec("generate", PROMPT, *options, *draft, *trace, "--show-steps")
    plain = folospec("generate", PROMPT, *options, *draft)
    assert (result.exit_code, plain.exit_code) == (0, 0)
    assert result.stdout.endswith(f"─\n{plain.stdout}")
    assert "ngram (up to 5), acceptance coupled" in result.stdout.splitlines()[0]
    steps = list(read_trace(tmp_path / "t")[1])
    titles = re.findall(r"^step (\d+) ", result.stdout, flags=re.MULTILINE)
    assert [int(number) for number in titles] == [step.step for step in steps]
    for mark in "+-~=":
        assert f" {mark}' w" in result.stdout
    shown = result.stdout[: result.stdout.index("w1 w2 w3 w4 w5 ─")]
    assert folospec("steps", tmp_path / "t").stdout == shown


def test_the_view_of_a_batch_and_of_its_file_are_the_same(folospec, options, tmp_path):
    prompts = ("w1 w2", "w7 w7 w7")
    draft = ("--speculative", NGRAM, "--trace", tmp_path / "t")
    result = folospec("generate", *prompts, *options, *draft, "--show-steps")
    seen = folospec("steps", tmp_path / "t")
    assert (result.exit_code, seen.exit_code) == (0, 0)
    assert result.stdout.startswith(seen.stdout)
    assert "request-0-0  step 1  computes tokens 0 to 1" in seen.stdout
    assert "request-1-0  step 1  computes tokens 0 to 2" in seen.stdout
    siblings = folospec("generate", "w1", *options, "-n", "2", "--show-steps")
    assert "request-0-1  step 1  forked from request-0-0" in siblings.stdout


def test_a_trace_goes_with_json(folospec, options, tmp_path):
    draft = ("--speculative", NGRAM, "--json")
    plain = folospec("generate", PROMPT, *options, *draft)
    result = folospec("generate", PROMPT, *options, *draft, "--trace", tmp_path / "t")
    [record, expected] = [json.loads(r.stdout)["outputs"] for r in (result, plain)]
    assert record == expected
    sequences = [seq for step in read_trace(tmp_path / "t")[1] for seq in step.sequences]
    token_ids = [token.token_id for seq in sequences for token in seq.new_tokens]
    assert token_ids == record[0]["token_ids"]


def test_ctrl_c_leaves_whole_steps(folospec, options, tmp_path, ctrl_c_at_step):
    ctrl_c_at_step(3)
    result = folospec("generate", PROMPT, *options, "--trace", tmp_path / "t", "--show-steps")
    assert result.exit_code == 130
    assert len(list(read_trace(tmp_path / "t")[1])) == 3
    assert len(re.findall("^step ", result.stdout, flags=re.MULTILINE)) == 3
    assert f"cut short: {PROMPT}" in result.stdout


def test_without_the_options_nothing_is_traced(folospec, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr("folospec.trace.tracer.StepRecorder")
    result = folospec("generate", PROMPT, *options)
    assert (result.exit_code, list(tmp_path.iterdir())) == (0, [])
    assert "step 1" not in result.stdout
    broken = folospec("generate", PROMPT, *options, "--show-steps")
    assert isinstance(broken.exception, NameError)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--show-steps", "--json"], "--show-steps is for reading; with --json use --trace FILE"),
        (["--show-steps", "--compare", "--speculative", "ngram"], "--show-steps would slow"),
        (["--trace", "t", "--compare", "--speculative", "ngram"], "--trace would slow"),
        (["--trace", "/no/such/folder/t"], "trace must be a file that can be written"),
        (["--trace", ""], "trace must be None or the path of a file"),
    ],
)
def test_wrong_combinations_are_one_line_and_exit_code_2(folospec, target, arguments, words):
    result = folospec("generate", PROMPT, "--model", target, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert words in line


def test_a_broken_trace_is_shown_up_to_the_broken_line(folospec, options, tmp_path):
    path = tmp_path / "t"
    folospec("generate", PROMPT, *options, "--trace", path)
    whole = folospec("steps", path).stdout
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:50])
    result = folospec("steps", path)
    assert result.exit_code == 2
    assert "line 4: not JSON" in result.stderr
    assert whole.startswith(result.stdout)
    assert len(re.findall("^step ", result.stdout, flags=re.MULTILINE)) == 2


@pytest.mark.parametrize(
    ("text", "words"), [("{}", "is not a trace"), (None, "No such file or directory")]
)
def test_what_is_no_trace_is_one_line(folospec, tmp_path, text, words):
    path = tmp_path / "t"
    if text is not None:
        path.write_text(text)
    result = folospec("steps", path)
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert words in line


def masked(text):
    """Without what depends on the machine, or on how confidence is estimated."""
    return re.sub(r" \d+%", " ?%", without_times(text))


def test_the_page_shows_what_the_commands_print(folospec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```console\n\$ folospec ([^\n]+)\n(.*?)^```$", DOC, flags=re.M | re.S)
    assert len(examples) == 4
    for command, shown in examples:
        result = folospec(*shlex.split(command))
        assert result.exit_code == 0
        rest = masked(result.stdout)
        for part in filter(None, shown.split("...\n")):
            before, found, rest = rest.partition(masked(part))
            assert found == masked(part), f"$ {command}\n{before}"
    assert "`-- " in DOC
