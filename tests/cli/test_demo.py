import importlib.util
from pathlib import Path

import pytest

from folospec.cli import demo
from folospec.cli.render import Measurement
from folospec.cli.runner import Counts, make_engine


@pytest.fixture(autouse=True)
def tiny(monkeypatch, target, draft):
    """The demo on tiny models, for two short prompts, however busy the machine is."""
    monkeypatch.setattr(demo, "TIME_LIMIT", float("inf"))
    monkeypatch.setattr(demo, "TARGET", target)
    monkeypatch.setattr(demo, "DRAFT", draft)
    monkeypatch.setattr(
        demo, "held_out_prompts", lambda: [("a.one", "w1 w2 w3"), ("b.two", "w5 w6 w5 w6")]
    )


TIMES = [("plain", 4), ("a", 3), ("b", 2), ("auto", 1)]


def measurement(method, seconds, equal=True):
    return Measurement(method, 100, seconds, Counts(), None if method == "plain" else equal)


def test_the_demo_shows_plain_the_fastest_drafter_by_name_and_auto(folospec):
    result = folospec("demo", "--max-tokens", "100")
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.split()}
    assert result.exit_code == 0
    assert rows["plain"][2:] == ["1.00x", "200", "1.00", "-", "-"]
    assert rows["auto"][-1] == "yes"  # how much it drafts is a matter of the machine
    [method] = {"ngram", "draft_model"} & set(rows)
    assert rows[method][-1] == "yes"
    assert int(rows[method][3]) < 200
    assert float(rows[method][5]) > 1
    assert f"plain, with {method} (the fastest of the drafters ngram, draft_model)" in result.stdout
    assert result.stdout.endswith("tokens equal: yes\n")
    for words in ("batch 1, temperature 0", "5 draft tokens", "float32", "medians of 3 runs"):
        assert words in result.stdout


def test_the_fastest_by_name_stands_between_plain_and_auto():
    rows = [measurement(name, seconds) for name, seconds in TIMES]
    assert [row.method for row in demo.shown_rows(rows)] == ["plain", "b", "auto"]
    assert "three times: plain, with b (the fastest of the drafters a, b)" in demo.sentence(rows)
    rows[1] = measurement("a", 1)
    assert [row.method for row in demo.shown_rows(rows)] == ["plain", "a", "auto"]


def test_a_slower_drafter_that_writes_other_tokens_is_shown_too():
    rows = [measurement("plain", 2), measurement("a", 3, equal=False), measurement("b", 1)]
    rows.append(measurement("auto", 1))
    assert [row.method for row in demo.shown_rows(rows)] == ["plain", "b", "auto", "a"]


def test_only_auto_plans_its_drafts(folospec, monkeypatch):
    real, made = demo._engines, {}
    monkeypatch.setattr(demo, "_engines", lambda *given: made.update(real(*given)) or made)
    assert folospec("demo", "--max-tokens", "24").exit_code == 0
    planned = {name: engine.stats()["planner"] is not None for name, engine in made.items()}
    assert planned == {"plain": False, "ngram": False, "draft_model": False, "auto": True}


def test_other_tokens_are_exit_code_1(folospec, monkeypatch, stranger):
    real = demo._engines

    def engines(*arguments):
        found = real(*arguments)
        found["ngram"] = make_engine(stranger, speculative=None, max_num_seqs=1)
        return found

    monkeypatch.setattr(demo, "_engines", engines)
    result = folospec("demo", "--max-tokens", "12")
    assert result.exit_code == 1
    assert result.stdout.endswith("tokens equal: no\n")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [words[-1] for words in lines if words[:1] == ["ngram"]] == ["no"]


def test_the_time_limit_ends_the_measuring_and_is_said(folospec, monkeypatch):
    monkeypatch.setattr(demo, "TIME_LIMIT", 0.0)
    result = folospec("demo", "--max-tokens", "8")
    assert result.exit_code == 0
    assert "1 of 2 held-out functions" in result.stdout


def test_ctrl_c_shows_what_was_done(folospec, ctrl_c_at_step):
    ctrl_c_at_step(3 * demo.WARM_UP_TOKENS + 100)
    result = folospec("demo", "--max-tokens", "24")
    assert result.exit_code == 130
    assert "interrupted: the table has what was done" in result.stdout


def test_wrong_options_are_one_line(folospec):
    result = folospec("demo", "--dtype", "float8")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_prompts_are_functions_of_modules_held_out_of_training(monkeypatch):
    monkeypatch.undo()
    path = Path(__file__).parents[2] / "training" / "corpus.py"
    spec = importlib.util.spec_from_file_location("demo_corpus", path)
    corpus = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(corpus)
    prompts = demo.held_out_prompts()
    assert [name for name, _ in prompts] == [".".join(pair) for pair in demo.FUNCTIONS]
    assert {name.split(".")[0] for name, _ in prompts} <= corpus.HELD_OUT
    for name, prompt in prompts:
        assert prompt.startswith(f"def {name.split('.')[1]}(")
        assert prompt.endswith(('"""', "'''"))
