"""The tasks for a chat model: enough of them, all different, and an edit is an edit."""

import json
from functools import cache

import pytest

from benchmarks.engine import never_slower
from benchmarks.lib import chat_tasks, tasks
from folospec.models.loader import load_tokenizer

FRAMED = ("chat", "summary", "extraction", "translation")


@cache
def tokenizer():
    return load_tokenizer("folospec-demo")


@pytest.mark.parametrize("name", chat_tasks.CHAT_TASKS)
def test_items_differ_and_the_first_ones_do_not_depend_on_their_number(name):
    many, few = tasks.make_task(name, tokenizer(), 64), tasks.make_task(name, tokenizer(), 3)
    assert many.items[:3] == few.items
    assert len({tuple(item.prompt_token_ids) for item in many.items}) == 64
    assert all(item.max_tokens >= 32 for item in many.items)


@pytest.mark.parametrize("name", FRAMED)
def test_no_text_comes_twice_before_all_have_come(name):
    task = chat_tasks.read_prompts(name)
    frames, subjects = task["frames"], task["subjects"]
    assert min(len(subjects), len(frames) * len(subjects) // 8) >= 8
    items = chat_tasks.conversations(name, tokenizer(), 10_000)
    assert len(items) == len(frames) * len(subjects)
    for item, subject in zip(items, subjects + subjects, strict=False):
        assert subject[-20:] in tokenizer().decode(item.prompt_token_ids)


def test_conversations_go_through_the_chat_template_and_examples_stand_before():
    task = chat_tasks.read_prompts("extraction")
    (item,) = chat_tasks.conversations("extraction", tokenizer(), 1)
    (question, answer), *_ = task["shots"]
    frame, subject = task["frames"][0], task["subjects"][0]
    expected = tokenizer().apply_chat_template(
        [
            {"role": "user", "content": frame.format(question)},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": frame.format(subject)},
        ],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert tokenizer().decode(item.prompt_token_ids) == expected


def test_every_edit_changes_its_file_and_the_reply_is_begun():
    files = chat_tasks.read_prompts("file_editing")["files"]
    assert len(files) >= 8
    for file in files:
        text = "\n".join(file["lines"]) + "\n"
        for edit in file["edits"]:
            shown, rest = chat_tasks.edited(text, edit["old"], edit["new"])
            assert shown + rest == text.replace(edit["old"], edit["new"], 1) != text
            assert edit["new"] in shown
            assert shown.endswith("\n")
            assert text.endswith(rest)
            assert len(rest) > len(text) / 4
    (item,) = chat_tasks.file_edits(tokenizer(), 1)
    first = files[0]["edits"][0]
    shown, rest = chat_tasks.edited("\n".join(files[0]["lines"]) + "\n", first["old"], first["new"])
    prompt = tokenizer().decode(item.prompt_token_ids)
    assert first["instruction"] in prompt
    assert prompt.endswith(shown)
    assert tokenizer().decode(item.expected_token_ids) == rest
    assert item.prediction_token_ids == item.expected_token_ids


def test_an_edit_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="old must be in the text, got 'port'"):
        chat_tasks.edited("host = 1\n", "port", "harbour")


def test_code_ends_with_the_head_of_a_function():
    for item in tasks.make_task("code", tokenizer(), 6).items:
        assert tokenizer().decode(item.prompt_token_ids).endswith(":")


def test_too_many_items_are_refused():
    with pytest.raises(ValueError, match="items of file_editing, got count=1000"):
        tasks.make_task("file_editing", tokenizer(), 1000)


def test_never_slower_runs_on_tasks_with_their_own_lengths(tmp_path):
    chosen = ["--tasks", "chat,translation", "--temperatures", "0,0.8", "--batches", "1"]
    out = tmp_path / "rows.jsonl"
    chosen += ["--no-controls"]
    never_slower.main([*chosen, "--pairs", "1", "--max-tokens", "33", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["workload"], row["temperature"], row["max_tokens"]) for row in rows] == [
        ("chat at 0", 0.0, 33),
        ("chat at 0.8", 0.8, 33),
        ("translation at 0", 0.0, 32),
        ("translation at 0.8", 0.8, 32),
    ]
    assert all(row["tokens_equal"] for row in rows)
    assert sum(row["auto_counts"]["num_drafts"] for row in rows) > 0


def test_unknown_tasks_are_refused(capsys):
    for option, name in (("--tasks", "editing"), ("--workloads", "chat")):
        with pytest.raises(SystemExit):
            never_slower.main([option, name])
        assert f"got ['{name}']" in capsys.readouterr().err
