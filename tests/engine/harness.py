"""Runs of the real engine on tiny float64 models, drafters that lie, and what makes a proof
vacuous.

Nothing here excuses a difference: float64 leaves no near ties on these models, so speculative and
plain runs must agree to the last token, and to the last bit of every count that they share.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from folospec import LLM, Drafter, Proposal, RequestOutput, SamplingParams, register_drafter
from folospec.core.token_tree import TokenTree
from folospec.spec.verify import Verdict

VOCAB_SIZE = 61
MAX_LEN = 192

PROMPTS = [
    [5, 6, 7, 8, 5, 6, 7],
    [10, 20, 30],
    [1] * 9,
    [3, 4, 5, 3, 4, 5, 3, 4],
    [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57],
    [9],
]


def save_tiny_llama(folder: Path, *, layers: int, hidden: int, seed: int) -> str:
    """Write a random Llama whose greedy output varies."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LEN,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1.3 * parameter.shape[1] ** -0.5)
        model.model.embed_tokens.weight.normal_(0.0, 0.35)
    model.save_pretrained(folder)
    return str(folder)


def perturbed_copy(source: str, folder: Path, *, scale: float, seed: int) -> str:
    """A draft model that mostly agrees with its target: the same weights, and noise on top."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter += torch.randn_like(parameter) * parameter.std() * scale
    model.save_pretrained(folder)
    return str(folder)


def mixed_params(max_tokens: int = 20) -> list[SamplingParams]:
    """One for each prompt: greedy and sampled, filters, penalties, bias, siblings, side by side."""
    common: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": True}
    return [
        SamplingParams(temperature=0, logprobs=2, **common),
        SamplingParams(temperature=0.8, top_k=12, seed=3, **common),
        SamplingParams(temperature=1.0, n=3, seed=4, logprobs=0, **common),
        SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.4, **common),
        SamplingParams(temperature=1.2, top_p=0.8, min_p=0.02, presence_penalty=0.5, **common),
        SamplingParams(
            temperature=0.7, logit_bias={7: 2.0, 8: -3.0}, seed=9, min_tokens=5, **common
        ),
    ]


def make_llm(model: str, speculative: Any = None, **options: Any) -> LLM:
    settings = {"dtype": "float64", "skip_tokenizer_init": True, "strict_drafters": True}
    return LLM(model, speculative=speculative, **{**settings, **options})


def as_prompts(token_ids: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in token_ids]


@dataclass
class Run:
    """The outputs of a run, in the order of the prompts, and the engine's stats after it."""

    outputs: list[RequestOutput]
    stats: dict[str, Any]

    @property
    def tokens(self) -> list[list[list[int]]]:
        return [[c.token_ids for c in o.outputs] for o in self.outputs]

    @property
    def logprobs(self) -> list[float]:
        """Every logprob of the run, flattened."""
        return [
            entry.logprob
            for output in self.outputs
            for completion in output.outputs
            for row in completion.logprobs or []
            for _, entry in sorted(row.items())
        ]


def run(
    llm: LLM,
    prompts: list[list[int]] | None = None,
    params: Any = None,
    on_step: Callable[[LLM], None] | None = None,
) -> Run:
    """Run all prompts to the end, with every block accounted for after every step."""
    prompts = PROMPTS if prompts is None else prompts
    params = mixed_params() if params is None else params
    if isinstance(params, SamplingParams):
        params = [params] * len(prompts)
    engine = llm.engine
    ids = [engine.add_request(p, q) for p, q in zip(as_prompts(prompts), params, strict=True)]
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests:
        if on_step is not None:
            on_step(llm)
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        engine.scheduler.check_integrity()
    assert engine.manager.num_free_blocks == engine.manager.num_blocks
    return Run([done[i] for i in ids], llm.stats())


def assert_speculated(stats: dict[str, Any], *, rejected: bool = True, moved: bool = False) -> None:
    """The run proves something only if there were drafts, accepted ones and rejected ones."""
    assert stats["num_drafts"] > 0
    assert stats["num_accepted_tokens"] > 0
    if rejected:
        assert stats["num_accepted_tokens"] < stats["num_draft_tokens"]
    if moved:
        assert stats["num_moved_rows"] > 0


class OracleTreeDrafter(Drafter):
    """Knows what the target will say, and hides it at random places of random trees among lies.

    `futures` maps a sequence id to its plain output; the fixture `oracle` sets it for a test. One
    node in five on the true path is a lie that ends it; every node has up to three siblings; rows
    are shuffled as far as parents allow.
    """

    futures: dict[str, list[int]] = {}
    lie_rate = 0.2

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._random = random.Random(11)

    def propose(self, rows: list[Any]) -> list[Proposal | None]:
        return [self._tree(row) for row in rows]

    def _tree(self, row: Any) -> Proposal | None:
        done = len(row.token_ids) - row.num_prompt_tokens
        future = self.futures[row.seq_id][done:]
        token_ids: list[int] = []
        parents: list[int] = []
        spine = -1
        for true_token in future:
            level = self._random.sample(range(VOCAB_SIZE), self._random.randint(0, 3))
            if self._random.random() > self.lie_rate:
                level = [t for t in level if t != true_token]
                level.insert(self._random.randint(0, len(level)), true_token)
            if not level or len(token_ids) + len(level) > row.max_draft_tokens:
                break
            parent, spine = spine, -2
            for token in level:
                token_ids.append(token)
                parents.append(parent)
                if token == true_token:
                    spine = len(token_ids) - 1
            if spine == -2:
                break
        return Proposal(TokenTree(token_ids, parents)) if token_ids else None


class AdversarialDrafter(OracleTreeDrafter):
    """Always says the token after the one that is right: nothing is ever accepted."""

    def _tree(self, row: Any) -> Proposal | None:
        done = len(row.token_ids) - row.num_prompt_tokens
        future = self.futures[row.seq_id][done : done + row.max_draft_tokens]
        lies = [(token + 1) % VOCAB_SIZE for token in future]
        return Proposal(TokenTree.chain(lies)) if lies else None


class IrregularDrafter(OracleTreeDrafter):
    """Knows the future and fails on every third row it is asked for."""

    asked = 0

    def _tree(self, row: Any) -> Proposal | None:
        self.asked += 1
        if self.asked % 3 == 0:
            raise RuntimeError("not in the mood")
        return super()._tree(row)


def trusting(tree: TokenTree, target_token_ids: Any, candidate: Any = None) -> Verdict:
    """A wrong rule for controls, in the place of `verify_coupled`: it believes the first node
    unseen."""
    path = [0] if len(tree) and (candidate is None or candidate[0]) else []
    return Verdict(path, target_token_ids[len(path)])


def futures_of(plain: Run) -> dict[str, list[int]]:
    """The oracle's knowledge: request numbers count up from 0 in a fresh engine."""
    return {
        f"request-{number}-{index}": tokens
        for number, completions in enumerate(plain.tokens)
        for index, tokens in enumerate(completions)
    }


for _name, _drafter in (
    ("oracle_tree", OracleTreeDrafter),
    ("adversarial", AdversarialDrafter),
    ("irregular", IrregularDrafter),
):
    register_drafter(_name, _drafter)
