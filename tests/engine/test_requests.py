"""Requests come, go, fail and repeat without harming one another."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import harness
import pytest
import torch
from harness import VOCAB_SIZE, as_prompts, make_llm, run

from folospec import LLM, Drafter, Proposal, SamplingParams, register_drafter
from folospec.core.token_tree import TokenTree


def sampled(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.9, "max_tokens": 12, "ignore_eos": True, **settings})


def test_results_come_in_the_order_of_the_prompts(models: Any) -> None:
    llm = make_llm(models.target, max_num_seqs=2)
    params = [sampled(max_tokens=n, seed=1) for n in (9, 2, 5, 1, 7, 3)]
    outputs = llm.generate(as_prompts(harness.PROMPTS), params, use_tqdm=False)
    assert [o.prompt_token_ids for o in outputs] == harness.PROMPTS
    assert [len(o.outputs[0].token_ids) for o in outputs] == [9, 2, 5, 1, 7, 3]


def test_a_seed_gives_the_same_tokens_in_any_company(models: Any) -> None:
    llm = make_llm(models.target)
    alone = run(llm, harness.PROMPTS[:1], sampled(seed=8)).tokens[0]
    crowd = run(llm, harness.PROMPTS, [sampled(seed=8), *[sampled()] * 5]).tokens[0]
    other = run(llm, harness.PROMPTS[:1], sampled(seed=9)).tokens[0]
    assert alone == crowd != other


def test_requests_without_a_seed_and_siblings_differ(models: Any) -> None:
    llm = make_llm(models.target)
    both = run(llm, [[3, 4, 5]] * 2, sampled()).tokens
    assert both[0] != both[1]
    siblings = run(llm, [[3, 4, 5]], sampled(n=4)).tokens[0]
    assert len({tuple(s) for s in siblings}) == 4
    again = run(make_llm(models.target), [[3, 4, 5]] * 2, sampled()).tokens
    assert again == both


def test_best_of_returns_the_most_likely_of_its_sequences(models: Any) -> None:
    every = run(make_llm(models.target), [[3, 4, 5]], sampled(n=5, seed=2, logprobs=0))
    best = run(make_llm(models.target), [[3, 4, 5]], sampled(n=2, best_of=5, seed=2))
    ranked = sorted(every.outputs[0].outputs, key=lambda c: -c.cumulative_logprob)
    assert best.tokens[0] == [c.token_ids for c in ranked[:2]]
    assert [c.index for c in best.outputs[0].outputs] == [0, 1]


def test_siblings_share_the_prompts_blocks_until_they_diverge(models: Any) -> None:
    held = []
    prompt = list(range(1, 41))
    llm = make_llm(models.target, block_size=4, enable_prefix_caching=False)

    def note(llm: LLM) -> None:
        manager = llm.engine.manager
        held.append(manager.num_blocks - manager.num_free_blocks)

    run(llm, [prompt], sampled(n=4, max_tokens=3), on_step=note)
    assert max(held) <= 10 + 4 * 2


def test_aborting_a_request_frees_its_blocks_and_leaves_the_others_alone(models: Any) -> None:
    expected = run(make_llm(models.target), harness.PROMPTS[:1], sampled(seed=1)).tokens[0][0]
    engine = make_llm(models.target, "ngram").engine
    kept = engine.add_request(as_prompts(harness.PROMPTS)[0], sampled(seed=1))
    gone = engine.add_request(as_prompts(harness.PROMPTS)[1], sampled(max_tokens=100, n=2))
    for _ in range(3):
        engine.step()
    output = engine.abort(gone)
    assert output is not None
    assert [c.finish_reason for c in output.outputs] == ["abort", "abort"]
    assert len(output.outputs[0].token_ids) >= 3
    assert engine.abort(gone) is None
    engine.scheduler.check_integrity()
    finished = []
    while engine.has_unfinished_requests:
        finished += [o for o in engine.step() if o.finished]
    assert [o.request_id for o in finished] == [kept]
    assert finished[0].outputs[0].token_ids == expected
    assert engine.manager.num_free_blocks == engine.manager.num_blocks


def test_a_request_without_a_possible_token_ends_alone(models: Any) -> None:
    def nothing_after_three(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits if len(token_ids) < 3 else torch.full_like(logits, -torch.inf)

    params = [sampled(seed=1), sampled(logits_processors=[nothing_after_three])]
    for speculative in (None, {"method": "draft_model", "model": models.target}):
        llm = make_llm(models.target, speculative)
        outputs = llm.generate(as_prompts(harness.PROMPTS[:2]), params, use_tqdm=False)
        assert outputs[0].outputs[0].finish_reason == "length"
        assert outputs[1].outputs[0].finish_reason == "error"
        assert outputs[1].outputs[0].stop_reason is None
        assert "logits_processors" in outputs[1].outputs[0].error
        assert outputs[1].error == outputs[1].outputs[0].error
        assert len(outputs[1].outputs[0].token_ids) == 3
        assert llm.engine.manager.num_free_blocks == llm.engine.manager.num_blocks


def test_a_stream_yields_every_token_once(models: Any) -> None:
    settings = {"method": "draft_model", "model": models.target}
    expected = run(make_llm(models.target), harness.PROMPTS[:1], sampled(seed=1, n=2)).tokens[0]
    seen: dict[int, list[int]] = {0: [], 1: []}
    reasons = []
    engine = make_llm(models.target, settings).engine
    for delta in engine.stream(as_prompts(harness.PROMPTS)[0], sampled(seed=1, n=2)):
        seen[delta.index] += delta.token_ids
        reasons.append(delta.finish_reason)
    assert list(seen.values()) == expected
    assert reasons.count("length") == 2


def test_two_streams_and_a_batch_may_take_turns(models: Any) -> None:
    prompts, params = as_prompts(harness.PROMPTS), [sampled(seed=s) for s in (1, 2, 3)]
    expected = run(make_llm(models.target), harness.PROMPTS[:3], params).tokens
    llm = make_llm(models.target)
    streams = [llm.engine.stream(p, q) for p, q in zip(prompts[:2], params[:2], strict=True)]
    seen: list[list[int]] = [[], []]
    for number in (0, 1, 0, 0):
        seen[number] += next(streams[number]).token_ids
    batch = llm.generate(prompts[2:3], params[2:], use_tqdm=False)
    for number, stream in enumerate(streams):
        for delta in stream:
            seen[number] += delta.token_ids
        assert delta.finish_reason == "length"
    assert [[tokens] for tokens in seen] == expected[:2]
    assert [batch[0].outputs[0].token_ids] == expected[2]


def test_a_snapshot_does_not_change(models: Any) -> None:
    engine = make_llm(models.target).engine
    engine.add_request(as_prompts(harness.PROMPTS)[0], sampled())
    first = engine.step()[0]
    engine.step()
    assert first.metrics.num_target_passes == 1
    assert len(first.outputs[0].token_ids) == 1


def test_a_stream_that_is_closed_aborts_its_request(models: Any) -> None:
    engine = make_llm(models.target).engine
    stream = engine.stream(as_prompts(harness.PROMPTS)[0], sampled(max_tokens=50))
    next(stream)
    stream.close()
    assert not engine.has_unfinished_requests
    assert engine.manager.num_free_blocks == engine.manager.num_blocks


class Forgetless(harness.AdversarialDrafter):
    """Fails at everything but proposing."""

    def observe(self, outcomes: list[Any]) -> None:
        raise RuntimeError("cannot learn")

    def drop(self, seq_id: str) -> None:
        raise RuntimeError("cannot forget")


register_drafter("forgetless", Forgetless)


@pytest.mark.usefixtures("oracle")
def test_a_drafter_that_cannot_learn_or_forget_harms_nobody(
    models: Any, plain: harness.Run
) -> None:
    llm = make_llm(models.target, "forgetless", strict_drafters=False, num_blocks=16, block_size=4)
    for _ in range(2):
        llm.engine.open.num_admitted = 0
        result = run(llm)
        assert result.tokens == plain.tokens
    assert result.stats["num_preemptions"] > 0
    assert result.stats["num_drafter_errors"] > 0


def test_a_strict_failure_to_learn_loses_no_finish(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step ends with the drafter's exception, and every request is as it should be."""
    engine = make_llm(models.target, {"method": "forgetless"}).engine
    short = engine.add_request([3, 4], sampled(max_tokens=3, num_speculative_tokens=0))
    engine.add_request([5, 6, 7], sampled(max_tokens=9, seed=1))
    futures = {"request-1-0": [1] * 9, "request-0-0": [1] * 9}
    monkeypatch.setattr(Forgetless, "futures", futures)
    short_group, long_group = (engine.requests[i] for i in (short, "request-1"))
    for _ in range(20):
        if engine.has_unfinished_requests:
            with suppress(RuntimeError):
                engine.step()
            engine.scheduler.check_integrity()
    assert not engine.has_unfinished_requests
    assert [g.sequences[0].num_output_tokens for g in (short_group, long_group)] == [3, 9]


def test_a_stream_of_best_of_is_the_best(models: Any) -> None:
    params = sampled(n=1, best_of=4, seed=3)
    expected = run(make_llm(models.target), [[5, 6, 7, 8]], params).tokens[0]
    stream = make_llm(models.target).engine.stream({"prompt_token_ids": [5, 6, 7, 8]}, params)
    assert [delta.token_ids for delta in stream] == expected


def test_a_request_without_an_id_gets_a_free_one(models: Any) -> None:
    engine = make_llm(models.target).engine
    engine.add_request([1], sampled(), request_id="request-1")
    assert engine.add_request([1], sampled()) not in ("request-0", "request-1")
    assert len(engine.requests) == 2


def test_a_stream_says_so_when_its_request_ends_with_an_error(models: Any) -> None:
    def nothing_after_two(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits if len(token_ids) < 2 else torch.full_like(logits, -torch.inf)

    engine = make_llm(models.target).engine
    params = sampled(logits_processors=[nothing_after_two])
    reasons = [i.finish_reason for i in engine.stream(as_prompts(harness.PROMPTS)[0], params)]
    assert reasons == [None, None, "error"]


def test_prompt_logprobs_are_the_same_in_chunks_and_after_preemption(models: Any) -> None:
    params = sampled(prompt_logprobs=2, max_tokens=30, seed=3)
    runs = [
        run(make_llm(models.target, speculative, **options), params=params)
        for speculative, options in (
            (None, {}),
            ("ngram", {"max_num_batched_tokens": 5}),
            ("ngram", {"num_blocks": 18, "block_size": 4}),
        )
    ]
    assert runs[2].stats["num_preemptions"] > 0
    for result in runs:
        for output, expected in zip(result.outputs, runs[0].outputs, strict=True):
            rows, wanted = output.prompt_logprobs, expected.prompt_logprobs
            assert rows is not None
            assert wanted is not None
            assert rows[0] is None
            assert len(rows) == len(output.prompt_token_ids)
            for token_id, row, same in zip(
                output.prompt_token_ids[1:], rows[1:], wanted[1:], strict=True
            ):
                assert token_id in row
                assert len(row) >= 2
                assert {k: v.rank for k, v in row.items()} == {k: v.rank for k, v in same.items()}
                assert row[token_id].logprob == pytest.approx(same[token_id].logprob, abs=1e-9)


def test_logits_processors_see_the_nodes_own_history(models: Any) -> None:
    """A processor that forbids the last token: wrong histories would let repeats through."""
    histories = []

    def no_repeat(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        histories.append(tuple(token_ids))
        logits = logits.clone()
        if token_ids:
            logits[token_ids[-1]] = -torch.inf
        return logits

    params = sampled(temperature=0, logits_processors=[no_repeat], max_tokens=16)
    expected = run(make_llm(models.target), params=params)
    settings = {"method": "draft_model", "model": models.near, "num_speculative_tokens": 4}
    result = run(make_llm(models.target, settings), params=params)
    assert result.tokens == expected.tokens
    harness.assert_speculated(result.stats)
    for tokens in result.tokens:
        assert all(a != b for a, b in zip(tokens[0], tokens[0][1:], strict=False))
        assert all(tuple(tokens[0][:n]) in histories for n in range(len(tokens[0])))


@pytest.mark.parametrize(
    ("proposal", "acceptance", "message"),
    [
        (Proposal(TokenTree.chain([1] * 9)), "coupled", "at most 4 draft tokens"),
        (Proposal(TokenTree.chain([VOCAB_SIZE])), "coupled", "below 61, got 61"),
        (Proposal(TokenTree([1, 2], [-1, -1])), "block", "verifies chains"),
        (Proposal(TokenTree.chain([1]), torch.ones(1, 7) / 7), "rejection", r"must be \[1, 61\]"),
        (Proposal(TokenTree.chain([1]), torch.full((1, 61), -1.0)), "rejection", "at least 0"),
        (Proposal(TokenTree.chain([1]), draft_slots={"mine": [99]}), "coupled", "got 'mine'"),
    ],
)
def test_a_proposal_that_may_not_be_is_the_drafters_failure(
    proposal: Proposal, acceptance: str, message: str, models: Any, plain: harness.Run
) -> None:
    class Stubborn(Drafter):
        def propose(self, rows: list[Any]) -> list[Proposal | None]:
            return [proposal for _ in rows]

    name = f"stubborn-{message}"
    register_drafter(name, Stubborn)
    settings = {"method": name, "num_speculative_tokens": 4, "acceptance": acceptance}
    result = run(make_llm(models.target, settings, strict_drafters=False))
    if acceptance == "coupled":
        assert result.tokens == plain.tokens
    assert result.stats["num_drafter_errors"] > 0
    with pytest.raises(ValueError, match=message):
        run(make_llm(models.target, settings))


@pytest.mark.parametrize("acceptance", ["coupled", "rejection", "block"])
def test_one_seed_is_one_noise_only_where_drafts_may_know_it(acceptance: str, models: Any) -> None:
    """Drafters remember what other requests said. Under a ratio rule they must not learn from a
    request with the same noise, or what they say depends on the coins that verify it."""
    llm = make_llm(models.target, {"method": "ngram", "acceptance": acceptance})
    params = SamplingParams(seed=7, max_tokens=12, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": [5, 6, 7]}] * 2, params, use_tqdm=False)
    first, second = (output.outputs[0].token_ids for output in outputs)
    assert (first == second) == (acceptance == "coupled")
    again = make_llm(models.target, {"method": "ngram", "acceptance": acceptance})
    repeated = again.generate([{"prompt_token_ids": [5, 6, 7]}] * 2, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in repeated] == [first, second]
