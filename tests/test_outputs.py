"""What is printed of an output is one short line."""

from __future__ import annotations

from typing import Any

from folospec import CompletionOutput, RequestMetrics, RequestOutput


def completion(**changes: Any) -> CompletionOutput:
    fields = {"index": 0, "text": "ab", "token_ids": [7] * 200, "finish_reason": "length"}
    return CompletionOutput(**{**fields, **changes})


def test_a_completion_shows_its_text_and_the_number_of_its_tokens() -> None:
    assert repr(completion()) == (
        "CompletionOutput(index=0, text='ab', num_tokens=200, finish_reason='length')"
    )


def test_a_completion_shows_why_it_ended() -> None:
    assert "finish_reason='stop', stop_reason=5)" in repr(
        completion(finish_reason="stop", stop_reason=5)
    )
    assert "error='no such row'" in repr(completion(finish_reason="error", error="no such row"))


def test_a_long_text_is_shown_from_both_ends_in_one_line() -> None:
    shown = repr(completion(text="begin\n" + "x" * 1000 + "end"))
    assert "'begin\\nxxx" in shown
    assert "xxxend'" in shown
    assert len(shown) < 160
    assert "\n" not in shown


def test_a_request_shows_its_prompt_and_completions() -> None:
    output = RequestOutput("request-3", "def f", [1] * 9, [completion()], finished=True)
    assert repr(output) == (
        f"RequestOutput(request_id='request-3', prompt='def f', outputs=[{completion()}], "
        "finished=True)"
    )
    output.prompt, output.error = None, "no such row"
    assert "prompt_token_ids=[1, 1, 1, 1, ...], " in repr(output)
    assert repr(output).endswith("finished=True, error='no such row')")
    output.outputs = [completion(text="x" * 1000, logprobs=[{}] * 200)] * 64
    assert len(repr(output)) < 1000


def test_metrics_show_what_was_counted() -> None:
    assert repr(RequestMetrics()) == "RequestMetrics()"
    metrics = RequestMetrics(
        num_target_passes=4,
        num_drafts=2,
        num_draft_tokens=8,
        num_accepted_tokens=3,
        num_accepted_tokens_per_pos=[2, 1] * 50,
        arrival_time=1.0,
        finished_time=1.25,
    )
    assert repr(metrics) == (
        "RequestMetrics(num_target_passes=4, num_drafts=2, num_draft_tokens=8, "
        "num_accepted_tokens=3, acceptance_length=2.5, seconds=0.25)"
    )
