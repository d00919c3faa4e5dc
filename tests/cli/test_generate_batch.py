"""`folospec generate` with a pile of prompts: through the command, with a tiny model."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import folospec
from folospec import LLM, SamplingParams
from folospec.cli.batch_request import derived_seed
from folospec.cli.main import app

LINES = [
    {"id": "a", "prompt": "w1 w2", "max_tokens": 3},
    {"id": "bad", "prompt": "w1", "temprature": 1},
    {"prompt_token_ids": [5, 6], "sampling_params": {"max_tokens": 9}},
    {"id": "long", "prompt": "w1 " * 8192},
    {"id": 7, "prompt": "w3\u2028w4", "temperature": 0.9, "seed": 5},
]


@pytest.fixture
def pile(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in LINES), "utf-8")
    return path


@pytest.fixture
def generate(folospec, target):
    def run(*arguments, **options):
        return folospec("generate", "--model", target, "--max-tokens", "6", *arguments, **options)

    return run


def by_index(text):
    found = [json.loads(line) for line in text.splitlines()]
    assert len({one["index"] for one in found}) == len(found)
    return {one["index"]: one for one in found}


def test_good_lines_are_served_and_bad_ones_are_named(generate, pile, target):
    result = generate("--file", pile, "--json")
    found = by_index(result.stdout)
    assert result.exit_code == 1
    assert [found[i].get("id") for i in range(5)] == ["a", "bad", None, "long", 7]
    assert found[1]["error"].startswith("unknown field 'temprature'; did you mean 'temperature'?")
    assert found[3]["error"].startswith("the prompt has 8192 tokens")
    assert [len(found[i]["outputs"][0]["token_ids"]) for i in (0, 2, 4)] == [3, 9, 6]
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=6)
    [expected] = LLM(target).generate(LINES[4]["prompt"], params, use_tqdm=False)
    assert found[4]["outputs"][0]["token_ids"] == expected.outputs[0].token_ids
    for words in (
        "line 2 (id 'bad'): unknown field",
        "line 4 (id 'long')",
        "3 prompts done, 2 fai",
    ):
        assert words in result.stderr


def test_an_output_file_is_continued_and_says_so(generate, pile, tmp_path):
    out = tmp_path / "out.jsonl"
    first = generate("--file", pile, "-o", out)
    assert (first.exit_code, first.stdout) == (1, "")
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1][:30])
    second = generate("--file", pile, "-o", out)
    assert "1 done before" in second.stderr
    expected, found = by_index(whole.decode()), by_index(out.read_text())
    assert set(found) == set(expected)
    for index, one in expected.items():
        assert found[index].get("outputs") == one.get("outputs")
    changed = generate("--file", pile, "-o", out, "--temperature", "1")
    assert changed.exit_code == 2
    assert "other options (--temperature was not given and is 1.0); use" in changed.stderr


def test_an_id_that_two_lines_have_is_refused_before_anything_runs(
    generate, pile, tmp_path, monkeypatch
):
    other, out = tmp_path / "other.jsonl", tmp_path / "out.jsonl"
    other.write_text('{"id": "b", "prompt": "w1"}\n"w2"\n{"id": "a", "prompt": "w3"}\n')
    monkeypatch.delattr("folospec.engine.llm_engine.load_components")
    result = generate("--file", pile, "--file", other, "-o", out)
    assert (result.exit_code, result.stderr) == (
        2,
        f"folospec: {other}, line 3: its id 'a' is that of {pile}, line 1, too; ids must differ\n",
    )
    assert not out.exists()


def test_an_id_that_comes_again_on_a_pipe_fails_alone_and_stays_done(generate, tmp_path):
    lines = ['{"id": 1, "prompt": "w1"}', '{"id": 1, "prompt": "w2"}', '{"id": 2, "prompt": "w3"}']
    out, pipe = tmp_path / "out.jsonl", "".join(f"{line}\n" for line in lines)
    options = ("--file", "-", "--input-format", "jsonl", "-o", out)
    first = generate(*options, input=pipe)
    whole = out.read_bytes()
    found = by_index(whole.decode())
    assert first.exit_code == 1
    assert [found[i].get("error") for i in range(3)] == [
        None,
        "its id 1 is that of stdin, line 1, too; ids must differ",
        None,
    ]
    assert [found[i]["id"] for i in range(3)] == [1, 1, 2]
    again = generate(*options, input=pipe)
    assert "3 results in" in again.stderr
    assert out.read_bytes() == whole
    mended = pipe.replace(lines[1], '{"id": 3, "prompt": "w2"}')
    assert generate(*options, "--retry-failed", input=mended).exit_code == 0
    assert by_index(out.read_text())[1]["id"] == 3


def test_a_finished_file_needs_no_model(folospec, generate, pile, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    generate("--file", pile, "-o", out)
    monkeypatch.delattr("folospec.engine.llm_engine.load_components")
    result = generate("--file", pile, "-o", out)
    assert result.exit_code == 1
    assert "5 results in" in result.stderr
    assert "2 of them failed (--retry-failed runs them again)" in result.stderr


def test_another_drafter_goes_on_with_the_same_file(generate, pile, tmp_path):
    out = tmp_path / "out.jsonl"
    ngram = json.dumps({"method": "ngram", "prompt_lookup_min": 1})
    generate("--file", pile, "-o", out, "--max-tokens", "60")
    whole = by_index(out.read_text())
    out.write_bytes(out.read_bytes().splitlines(keepends=True)[0])
    result = generate("--file", pile, "-o", out, "--max-tokens", "60", "--speculative", ngram)
    assert "1 done before" in result.stderr
    assert "acceptance length" in result.stderr
    found = by_index(out.read_text())
    assert {i: one.get("outputs") for i, one in found.items()} == {
        i: one.get("outputs") for i, one in whole.items()
    }


def test_prompts_of_one_seed_have_seeds_of_their_own(generate, target, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("w1 w2\nw1 w2\n")
    result = generate("--file", path, "--input-format", "lines", "--json", "--temperature", "1")
    tokens = [one["outputs"][0]["token_ids"] for one in by_index(result.stdout).values()]
    params = [
        SamplingParams(temperature=1, max_tokens=6, seed=derived_seed(0, index)) for index in (0, 1)
    ]
    expected = LLM(target).generate(["w1 w2"] * 2, params, use_tqdm=False)
    assert tokens == [output.outputs[0].token_ids for output in expected]
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_is_done_and_goes_on(
    generate, pile, tmp_path, ctrl_c_at_step, signum, monkeypatch
):
    out, plain = tmp_path / "out.jsonl", tmp_path / "plain.jsonl"
    generate("--file", pile, "-o", plain)
    with monkeypatch.context():
        ctrl_c_at_step(4, signum)
        result = generate("--file", pile, "-o", out)
    assert result.exit_code == 128 + signum
    assert "the same command goes on from here" in result.stderr
    assert set(by_index(out.read_text())) == {0, 1, 3}
    monkeypatch.undo()
    generate("--file", pile, "-o", out)
    found, expected = by_index(out.read_text()), by_index(plain.read_text())
    assert {i: one.get("outputs") for i, one in found.items()} == {
        i: one.get("outputs") for i, one in expected.items()
    }


@pytest.fixture
def chat_target(target, tmp_path):
    """The tiny model with a chat template."""
    for name in os.listdir(target):
        os.symlink(os.path.join(target, name), tmp_path / name)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
    tokenizer.chat_template = (
        "{% for m in messages %}w{{ m.role | length }} {{ m.content }} {% endfor %}w9"
    )
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_messages_and_chat_prompts_go_through_the_template(folospec, chat_target, target):
    messages = [{"role": "system", "content": "w2"}, {"role": "user", "content": "w1"}]
    options = ("--max-tokens", "5", "--json")
    line = json.dumps({"messages": messages})
    lines = ("--input-format", "jsonl", "--model", chat_target)
    one = folospec("generate", "--file", "-", *lines, *options, input=line + "\n")
    chat = ("--chat", "--system", "w2", "--model", chat_target)
    other = folospec("generate", "w1", *chat, *options)
    written = folospec("generate", "w6 w2 w4 w1 w9", "--model", target, *options)
    outputs = [json.loads(result.stdout)["outputs"] for result in (one, other, written)]
    assert outputs[0] == outputs[1] == outputs[2]
    refused = folospec("generate", "w1", "--chat", "--model", target)
    assert refused.exit_code == 2
    assert "chat template, and the model has none" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["w1", "--system", "x"], "--system needs --chat"),
        (["w1", "--overwrite"], "--overwrite needs --output"),
        (["w1", "--retry-failed"], "--retry-failed needs --output"),
        (["w1", "--compare", "--speculative", "ngram", "-o", "x"], "does not go with --compare"),
        (["--file", "empty.jsonl"], "no prompt in empty.jsonl"),
        (["--file", "blank.jsonl"], "no prompt in blank.jsonl"),
        (["--file", "empty.txt"], "empty.txt: the prompt is empty"),
        (["--file", "blank.jsonl", "-o", "blank.jsonl"], "no prompt in blank.jsonl"),
        (["--file", "one.jsonl", "-o", "one.jsonl", "--overwrite"], "is an input, too"),
        (["--file", "one.jsonl", "-o", "no/folder/x"], "--output no/folder/x: No such file"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(generate, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    for name, content in {"empty": "", "blank": "\n \n", "one": '"w1"\n'}.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    (tmp_path / "empty.txt").write_text("")
    result = generate(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert words in line
    assert (tmp_path / "one.jsonl").read_text() == '"w1"\n'


def test_an_encoding_that_lacks_characters_is_no_error(target):
    arguments = ["generate", "é w1", "ü w2", "--model", target, "--max-tokens", "2"]
    result = CliRunner(charset="ascii").invoke(app, arguments)
    assert result.exit_code == 0
    assert "1: \\xe9 w1 " in result.stdout


def test_a_pipe_that_is_closed_ends_the_run_quietly(generate, monkeypatch):
    def write(out, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("folospec.cli.batch_view.write", write)
    result = generate("w1", "--json")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line_in_a_process_of_its_own(generate, tmp_path):
    """What Python does with stdout when it ends is part of it."""
    generate("w1", "--trace", tmp_path / "trace.jsonl")
    command = [sys.executable, "-m", "folospec", "steps", str(tmp_path / "trace.jsonl")]
    environment = {**os.environ, "PYTHONPATH": str(Path(folospec.__file__).parents[1])}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, timeout=300
        )
    err = done.stderr.decode()
    assert (done.returncode, err) == (
        1,
        "folospec: cannot write the output: No space left on device\n",
    )


@pytest.mark.parametrize(
    ("options", "num_tokens"),
    [
        ((), 3),
        (("--max-tokens", "5"), 5),
        (("--generation-config", "folospec", "--n", "1"), 128),
    ],
)
def test_options_that_are_not_given_come_from_the_models_generation_config(
    folospec, target, tmp_path, options, num_tokens
):
    folder = tmp_path / "model"
    shutil.copytree(target, folder)
    path = folder / "generation_config.json"
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**fields, "max_new_tokens": 3, "eos_token_id": None}))
    result = folospec("generate", "w1 w2", "--json", "--model", folder, *options)
    assert result.exit_code == 0
    [found] = by_index(result.stdout).values()
    assert len(found["outputs"][0]["token_ids"]) == num_tokens
