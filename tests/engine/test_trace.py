"""The trace of every step: complete, true to the verdicts, as its schema says, free when off."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import assert_speculated, make_llm, run

from folospec import LLM, Proposal, SamplingParams
from folospec.core.token_tree import TokenTree
from folospec.spec.verify import Verdict
from folospec.trace import tracer
from folospec.trace.records import StepTrace, read_trace
from folospec.trace.tracer import node_verdicts

pytestmark = pytest.mark.usefixtures("oracle")

NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 4}
TREE = {"method": "oracle_tree", "num_speculative_tokens": 12}
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (None, {}),
    "ngram in chunks": (NGRAM, {"max_num_batched_tokens": 7, "max_num_seqs": 5}),
    "trees": (TREE, {}),
    "trees, preempted": (TREE, {"num_blocks": 16, "block_size": 4}),
    "drafted trees": ({"method": "draft_model", "tree": [3, 2, 1]}, {}),
    "draft model": ({"method": "draft_model", "num_speculative_tokens": 4}, {}),
    "draft model, rejection": (
        {"method": "draft_model", "num_speculative_tokens": 4, "acceptance": "rejection"},
        {},
    ),
}


def traced(name: str, models: Any, path: Path) -> tuple[harness.Run, list[StepTrace], LLM]:
    """Run the mixed batch; returns what `on_step` was told, and leaves the same in the file."""
    speculative, options = RUNS[name]
    if speculative is not None and speculative["method"] == "draft_model":
        speculative = {**speculative, "model": models.near}
    llm = make_llm(models.target, speculative, trace=path, **options)
    told: list[StepTrace] = []
    llm.engine.on_step = told.append
    return run(llm), told, llm


@pytest.fixture(scope="module", params=RUNS)
def recorded(
    request: pytest.FixtureRequest,
    models: Any,
    plain: harness.Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, harness.Run, list[StepTrace], Path]:
    path = tmp_path_factory.mktemp("trace") / "steps.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.OracleTreeDrafter, "futures", harness.futures_of(plain))
        result, told, _ = traced(request.param, models, path)
    return request.param, result, told, path


def outputs_of(steps: list[StepTrace]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for step in steps:
        for seq in step.sequences:
            found[seq.seq_id] += [token.token_id for token in seq.new_tokens]
    return found


def test_the_tokens_of_all_steps_are_the_output(recorded: Any, plain: harness.Run) -> None:
    name, result, steps, _ = recorded
    assert [step.step for step in steps] == list(range(1, result.stats["num_steps"] + 1))
    assert outputs_of(steps) == harness.futures_of(result)
    if "rejection" not in name:
        assert result.tokens == plain.tokens
    if name != "plain":
        assert_speculated(result.stats, moved="trees" in name)


def test_the_counts_are_those_of_stats(recorded: Any) -> None:
    _, result, steps, _ = recorded
    drafts = [s for step in steps for s in step.sequences if s.proposal is not None]
    counts = {
        "num_drafts": len(drafts),
        "num_draft_tokens": sum(s.proposal.num_draft_tokens for s in drafts),
        "num_accepted_tokens": sum(len(s.path) for s in drafts),
        "num_output_tokens": sum(len(s.new_tokens) for step in steps for s in step.sequences),
        "num_preemptions": sum(len(step.preempted) for step in steps),
        "num_moved_rows": sum(step.num_moved_rows for step in steps),
        "num_scheduled_tokens": sum(step.num_rows for step in steps),
    }
    assert counts == {name: result.stats[name] for name in counts}
    for part in ("draft", "target", "sampling"):
        total = sum(getattr(step.times, part) for step in steps)
        assert total == pytest.approx(result.stats[f"{part}_time"])
    for step in steps:
        parts = dataclasses.asdict(step.times)
        assert min(parts.values()) >= 0.0
        assert sum(parts.values()) == pytest.approx(2 * parts["total"])


def test_rows_and_blocks_add_up_in_every_step(recorded: Any) -> None:
    _, _, steps, path = recorded
    header = read_trace(path)[0]
    for step in steps:
        ran = [s for s in step.sequences if s.forked_from is None]
        nodes = sum(len(s.proposal.nodes) for s in ran if s.proposal is not None)
        assert step.num_rows == nodes + sum(s.num_tokens for s in ran)
        assert step.blocks.held + step.blocks.free == step.blocks.total == header.num_blocks
        for seq in step.sequences:
            end = seq.start + seq.num_tokens + (len(seq.proposal.nodes) if seq.proposal else 0)
            assert seq.num_blocks * header.block_size >= end
            if seq.finish_reason is not None:
                assert (seq.num_blocks_kept, seq.draft_progress) == (0, {})


def check_verdicts(steps: list[StepTrace], *, coupled: bool) -> None:
    """Node by node, from the trace alone."""
    for step in steps:
        for seq in (s for s in step.sequences if s.proposal is not None):
            nodes = seq.proposal.nodes
            accepted = [i for i, node in enumerate(nodes) if node.verdict == "accepted"]
            assert accepted == seq.path
            assert [nodes[i].parent for i in seq.path] == [-1, *seq.path][: len(seq.path)]
            emitted = [*(nodes[i].token_id for i in seq.path), seq.next_token.token_id]
            new = [token.token_id for token in seq.new_tokens]
            assert new == emitted[: len(new)]
            assert new == emitted or seq.finish_reason is not None
            below = {-1, *seq.path}
            for node in nodes:
                assert (node.verdict == "not_reached") <= (not coupled or node.parent not in below)
                assert (node.verdict == "rejected") <= (node.parent in below)
                if coupled and node.verdict == "rejected":
                    depth = seq.path.index(node.parent) + 1 if node.parent >= 0 else 0
                    assert node.token_id != emitted[depth]
            tried = any(node.parent == (seq.path or [-1])[-1] for node in nodes)
            assert seq.next_kind == ("recovered" if tried else "bonus")


def test_the_verdict_of_every_node_follows_the_path(recorded: Any) -> None:
    name, result, steps, _ = recorded
    check_verdicts(steps, coupled="rejection" not in name)
    verdicts = {
        node.verdict
        for step in steps
        for seq in step.sequences
        for node in (seq.proposal.nodes if seq.proposal else [])
    }
    # The oracle hangs nothing below its lies.
    unreached = {"not_reached"} if "draft" in name or "ngram" in name else set()
    assert verdicts == (set() if name == "plain" else {"accepted", "rejected", *unreached})


@pytest.mark.parametrize("lie", ["accepted", "rejected", "not_reached"])
def test_a_trace_that_lies_about_a_verdict_is_noticed(
    lie: str, models: Any, plain: harness.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracer, "node_verdicts", lambda proposal, *_, **__: [lie] * len(proposal))
    _, steps, _ = traced("trees", models, tmp_path / "steps.jsonl")
    with pytest.raises(AssertionError):
        check_verdicts(steps, coupled=True)


def test_a_preempted_sequence_shows_and_comes_back(models: Any, tmp_path: Path) -> None:
    result, steps, _ = traced("trees, preempted", models, tmp_path / "steps.jsonl")
    lost = [(step, seq_id) for step in steps for seq_id in step.preempted]
    assert len(lost) == result.stats["num_preemptions"] > 0
    for step, seq_id in lost:
        assert all(seq.seq_id != seq_id for seq in step.sequences)
        later = [s for t in steps[step.step :] for s in t.sequences if s.seq_id == seq_id]
        assert later[0].num_tokens > 1  # it is computed anew


def test_siblings_are_forked_with_a_token_of_their_own(recorded: Any) -> None:
    _, result, steps, _ = recorded
    forks = [s for step in steps for s in step.sequences if s.forked_from is not None]
    assert [(s.seq_id, s.forked_from) for s in forks] == [
        ("request-2-1", "request-2-0"),
        ("request-2-2", "request-2-0"),
    ]
    assert [[t.token_id for t in s.new_tokens] for s in forks] == [
        tokens[:1] for tokens in result.tokens[2][1:]
    ]


def test_the_file_has_what_on_step_was_told(recorded: Any) -> None:
    _, _, steps, path = recorded
    header, read = read_trace(path)
    assert list(read) == steps
    assert (header.schema, header.version) == ("folospec.trace", 2)
    assert len(path.read_text().splitlines()) == 1 + len(steps)


def test_drafted_probabilities_and_confidence_are_those_of_the_nodes(
    models: Any, tmp_path: Path
) -> None:
    _, steps, _ = traced("draft model, rejection", models, tmp_path / "steps.jsonl")
    nodes = [
        n for t in steps for s in t.sequences if s.proposal is not None for n in s.proposal.nodes
    ]
    probs = [n.draft_prob for n in nodes if n.draft_prob is not None]
    assert 0 < len(probs) < len(nodes)  # greedy drafts are one-hot, and have no distribution
    assert len({round(p, 6) for p in probs}) > 10
    assert all(0.0 < p <= 1.0 for p in probs)
    assert all(n.confidence is not None and 0.0 <= n.confidence <= 1.0 for n in nodes)


def verdicts_of(
    parents: list[int],
    token_ids: list[int],
    path: list[int],
    candidate: list[bool] | None = None,
    *,
    tries_in_order: bool = False,
) -> list[str]:
    proposal = Proposal(TokenTree(token_ids, parents), candidate=candidate)
    return list(node_verdicts(proposal, Verdict(path, 9), tries_in_order=tries_in_order))


def test_verdicts_of_siblings_duplicates_and_scratch_rows() -> None:
    #  root - 0:1 - 2:5 - 4:6          path 1, 3
    #       ` 1:2 - 3:7
    #       ` 5:3
    parents, token_ids = [-1, -1, 0, 1, 2, -1], [1, 2, 5, 7, 6, 3]
    no, yes, out = "not_reached", "accepted", "rejected"
    expected = [out, yes, no, yes, no, out]
    assert verdicts_of(parents, token_ids, [1, 3]) == expected
    in_order = verdicts_of(parents, token_ids, [1, 3], tries_in_order=True)
    assert in_order == [*expected[:5], no]
    duplicate = [2, *token_ids[1:]]
    assert verdicts_of(parents, duplicate, [1, 3]) == [no, *expected[1:]]
    assert verdicts_of(parents, duplicate, [1, 3], tries_in_order=True) == in_order
    candidate = [False, True, True, True, True, False]
    scratch = verdicts_of(parents, token_ids, [1, 3], candidate)
    assert scratch == ["scratch", yes, no, yes, no, "scratch"]
    tree = Proposal(TokenTree(token_ids, parents), candidate=candidate)
    unjudged = node_verdicts(tree, None, tries_in_order=False)
    assert unjudged == ["scratch", no, no, no, no, "scratch"]


def test_off_means_no_file_and_no_calls(
    models: Any, plain: harness.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a step was recorded")

    for name in ("StepRecorder", "TraceFile"):
        monkeypatch.setattr(tracer, name, fail)
    monkeypatch.chdir(tmp_path)
    llm = make_llm(models.target, TREE)
    assert run(llm).tokens == plain.tokens
    assert list(tmp_path.iterdir()) == []
    llm.engine.on_step = lambda step: None
    with pytest.raises(AssertionError, match="a step was recorded"):
        run(llm)


def test_what_a_listener_raises_comes_out_of_step(models: Any, plain: harness.Run) -> None:
    llm = make_llm(models.target, TREE)
    seen: list[StepTrace] = []

    def listen(step: StepTrace) -> None:
        seen.append(step)
        if len(seen) == 2:
            raise KeyError("enough")

    llm.engine.on_step = listen
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    llm.engine.add_request({"prompt_token_ids": harness.PROMPTS[0]}, params)
    llm.engine.step()
    with pytest.raises(KeyError, match="enough"):
        llm.engine.step()
    llm.engine.on_step = None
    while llm.engine.has_unfinished_requests:
        [output] = llm.engine.step()
    assert output.outputs[0].token_ids == plain.tokens[0][0]
    assert len(seen) == 2


def test_a_request_that_fails_shows_its_end(models: Any, tmp_path: Path) -> None:
    def forbid_all(token_ids: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, float("-inf"))

    llm = make_llm(models.target, trace=tmp_path / "t")
    for processors in ((forbid_all,), ()):
        params = SamplingParams(temperature=0, max_tokens=3, logits_processors=processors)
        llm.engine.add_request({"prompt_token_ids": [1, 2, 3]}, params)
    llm.engine.step()
    [failed, other] = next(read_trace(tmp_path / "t")[1]).sequences
    assert (failed.finish_reason, failed.new_tokens, failed.next_token) == ("error", [], None)
    assert str(failed.stop_reason).startswith("logits_processors must leave a token possible")
    assert len(other.new_tokens) == 1


def test_a_stop_cuts_the_new_tokens_and_not_the_verdict(
    models: Any, plain: harness.Run, tmp_path: Path
) -> None:
    tokens = plain.tokens[0][0]
    stop = tokens[7]
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[stop], ignore_eos=True)
    settings = {"method": "oracle_tree", "num_speculative_tokens": 30}
    llm = make_llm(models.target, settings, trace=tmp_path / "t")
    drafter: Any = llm.engine.components.drafters[0]
    drafter.lie_rate = 0.0
    result = run(llm, harness.PROMPTS[:1], params)
    last = list(read_trace(tmp_path / "t")[1])[-1].sequences[0]
    assert result.tokens[0][0][-1] == stop
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    assert 0 < len(last.new_tokens) <= len(last.path)
    assert last.next_token is not None


def test_tokens_have_their_text_with_its_spaces(tmp_path: Path) -> None:
    settings = {"method": "ngram", "prompt_lookup_min": 1}
    llm = LLM("folospec-demo", settings, trace=tmp_path / "t", num_blocks=64)
    prompt = "class Stack:\n    def push(self, item):\n        self."
    params = SamplingParams(temperature=0, max_tokens=24)
    [output] = llm.generate(prompt, params, use_tqdm=False)
    found = [seq for step in read_trace(tmp_path / "t")[1] for seq in step.sequences]
    texts = [token.text or "" for seq in found for token in seq.new_tokens]
    assert "".join(texts) == output.outputs[0].text
    assert any(text.startswith(" ") for text in texts)
    assert any(text.startswith("\n") for text in texts)
    assert any(seq.proposal is not None and seq.proposal.nodes[0].text for seq in found)
    assert [seq.root_position for seq in found][0] == len(output.prompt_token_ids) - 1
    assert all(seq.root is not None and seq.root.text for seq in found)


def test_without_a_tokenizer_there_are_ids_and_no_text(recorded: Any) -> None:
    _, _, steps, _ = recorded
    tokens = [token for step in steps for seq in step.sequences for token in seq.new_tokens]
    assert {token.text for token in tokens} == {None}
