import json
import os
import signal
import subprocess
import sys

import pytest

PROMPT = "w1 w2 w3"


def test_ctrl_c_keeps_the_text_so_far(folospec, target, ctrl_c_at_step):
    whole = folospec("generate", PROMPT, "--model", target, "--max-tokens", "20")
    ctrl_c_at_step(5)
    result = folospec("generate", PROMPT, "--model", target, "--max-tokens", "20")
    assert result.exit_code == 130
    assert len(result.stdout.split()) == 5
    assert whole.stdout.startswith(result.stdout.rstrip("\n"))
    assert "interrupted: 5 tokens" in result.stderr


def test_ctrl_c_keeps_every_prompt_of_a_batch(folospec, target, ctrl_c_at_step):
    ctrl_c_at_step(4)
    options = ("--model", target, "--max-tokens", "20", "--stop", "never")
    result = folospec("generate", PROMPT, "w9", *options)
    assert result.exit_code == 130
    assert result.stdout.count("cut short") == 2
    assert "interrupted: 8 tokens" in result.stderr


def test_ctrl_c_leaves_valid_json(folospec, target, ctrl_c_at_step):
    ctrl_c_at_step(3)
    result = folospec("generate", PROMPT, "--model", target, "--json")
    [completion] = json.loads(result.stdout)["outputs"]
    assert result.exit_code == 130
    assert completion["finish_reason"] == "abort"
    assert len(completion["token_ids"]) == 3


@pytest.mark.parametrize(
    ("step", "words"), [(25, "interrupted before both"), (200, "interrupted\ntokens/s")]
)
def test_ctrl_c_keeps_the_finished_rounds(folospec, target, ctrl_c_at_step, step, words):
    ctrl_c_at_step(step)
    options = ("--speculative", "ngram", "--compare", "--rounds", "9", "--max-tokens", "40")
    result = folospec("generate", PROMPT, "--model", target, *options)
    assert result.exit_code == 130
    assert words in result.stdout + result.stderr


def test_a_second_ctrl_c_does_not_wait(folospec, target, monkeypatch):
    def step(self, **options):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("folospec.engine.llm_engine.LLMEngine.step", step)
    result = folospec("generate", PROMPT, "--model", target)
    assert result.exit_code == 130
    assert result.stderr == "folospec: interrupted\n"


@pytest.fixture
def heeded_sigint():
    """A process that was started in the background may ignore SIGINT, and so do its tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_sigint")
def test_ctrl_c_while_loading_ends_cleanly(folospec, target, monkeypatch):
    monkeypatch.setattr(
        "folospec.engine.llm_engine.load_components",
        lambda config: signal.raise_signal(signal.SIGINT),
    )
    result = folospec("generate", PROMPT, "--model", target)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "folospec: interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to a child on Windows")
def test_sigint_ends_the_real_command_with_130(target):
    command = [sys.executable, "-m", "folospec.cli.main", "generate", PROMPT, "--model", target]
    process = subprocess.Popen(
        [*command, "--max-tokens", "8000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err.decode()
    assert 1 <= len((first + out).split()) < 8000
    assert "Traceback" not in err.decode()
    told = err.decode().splitlines()[-1]  # after a warning, where there is no compiler
    assert told.startswith("interrupted: ")


@pytest.mark.parametrize("is_pressed", [True, False])
def test_a_ctrl_c_that_a_library_turns_into_a_value_error_stays_one(
    folospec, target, monkeypatch, is_pressed
):
    def load(self, config):
        try:
            if is_pressed:
                signal.raise_signal(signal.SIGINT)
        finally:
            raise ValueError("could not determine the shape of an object")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("folospec.engine.llm_engine.LLMEngine.__init__", load)
    result = folospec("generate", PROMPT, "--model", target)
    words = "interrupted" if is_pressed else "could not determine the shape of an object"
    assert result.exit_code == (130 if is_pressed else 2)
    assert result.stderr == f"folospec: {words}\n"
    assert signal.getsignal(signal.SIGINT) is before
