"""The acceptance rules on the device against the same rules on the host; and the tokens of the
device against those of a CPU.

Every step of an engine on the device is verified a second time: its logits and its proposals are
copied to the host, and verified there by torch. The verdicts may differ where rounding decides: in
float32 that is hardly ever, and how often is counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch

from folospec import LLM, SamplingParams
from folospec.core.sequence_step import SequenceStep
from folospec.models.loader import load_tokenizer
from folospec.spec.verifier import Verifier
from folospec.spec.verify_batch import verify_batch
from gpu_check.checkpoints import DEMO, demo_pair, source_prompts
from gpu_check.jobs import Context, Row
from gpu_check.ties import Parting, Referee

SEEDS, QUICK_SEEDS = 24, 1
MAX_TOKENS, QUICK_TOKENS = 32, 8
NUM_PROMPTS = 8
MOST_DIFFERING = 0.01
"""Share of verdicts that rounding may decide otherwise."""


@dataclass
class Shadow:
    """Verifies again on the host what was verified on the device, and counts."""

    rule: str
    num_seeds: int = 0
    num_verdicts: int = 0
    num_accepted: int = 0
    num_rejected: int = 0
    num_differing: int = 0
    differences: list[Row] = field(default_factory=list)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        original = Verifier.verify

        def verified(this: Verifier, steps: list[SequenceStep], result: Any) -> Any:
            shown = original(this, steps, result)
            self._verify([step for step in steps if step.verdicts], result.logits)
            return shown

        with mock.patch.object(Verifier, "verify", verified):
            yield

    def row(self) -> Row:
        """The counts; and whether they say that all is well, and anything at all."""
        share = self.num_differing / max(self.num_verdicts, 1)
        says_something = self.num_accepted > 0 and self.num_rejected > 0
        return {
            "seeds": self.num_seeds,
            "num_verdicts": self.num_verdicts,
            "num_accepted": self.num_accepted,
            "num_rejected": self.num_rejected,
            "differing_verdicts": self.num_differing,
            "differences": self.differences[:5],
            "passed": says_something and share <= MOST_DIFFERING,
        }

    def _verify(self, steps: list[SequenceStep], logits: torch.Tensor) -> None:
        copies = [_on_host(step) for step in steps]
        verify_batch(copies, logits.cpu(), self.rule)
        for step, copy in zip(steps, copies, strict=True):
            assert step.verdicts
            self.num_verdicts += 1
            accepted = step.verdicts[0].num_accepted
            self.num_accepted += accepted
            self.num_rejected += len(step.tree) - accepted
            if step.verdicts != copy.verdicts:
                self.num_differing += 1
                pair = {"device": str(step.verdicts), "host": str(copy.verdicts)}
                self.differences.append({"sequence": step.seq.seq_id, **pair})


def _on_host(step: SequenceStep) -> SequenceStep:
    proposal = step.proposal
    if proposal is not None and proposal.draft_probs is not None:
        proposal = replace(proposal, draft_probs=proposal.draft_probs.cpu())
    return replace(step, proposal=proposal, verdicts=None)


def check(context: Context, rule: str) -> Iterator[Row]:
    """A row for chains and one for trees, over as many seeds as there is time for."""
    pair = demo_pair()
    prompts = source_prompts(load_tokenizer(pair.target), NUM_PROMPTS, 40)
    shapes: dict[str, Row] = {"chain": {"num_speculative_tokens": 4}}
    if rule != "block":
        shapes["tree"] = {"tree": [3, 2, 1]}
    draft = {"method": "draft_model", "model": pair.draft, "acceptance": rule}
    engines = {
        shape: LLM(
            pair.target,
            {**draft, **settings},
            device=context.device,
            dtype="float32",
            num_blocks=256,
            max_num_seqs=NUM_PROMPTS,
            strict_drafters=True,
        )
        for shape, settings in shapes.items()
    }
    shadows = {shape: Shadow(rule) for shape in shapes}
    for seed in range(QUICK_SEEDS if context.quick else SEEDS):
        params = SamplingParams(
            temperature=0.8 if seed % 2 else 1.0,
            top_p=0.95 if seed % 2 else 1.0,
            seed=seed,
            max_tokens=QUICK_TOKENS if context.quick else MAX_TOKENS,
            ignore_eos=True,
        )
        for shape, shadow in shadows.items():
            if context.budget.allows():
                with shadow.watching():
                    engines[shape].generate(_asked(prompts), params, use_tqdm=False)
                shadow.num_seeds += 1
    for shape, shadow in shadows.items():
        if shadow.num_seeds:
            yield {"kind": "rule", "rule": rule, "shape": shape, **shadow.row()}


def check_cpu(context: Context) -> Iterator[Row]:
    """Greedy float32 tokens of the device against those of torch on the CPU; where they part, it
    must be at a near tie."""
    tokens = QUICK_TOKENS if context.quick else MAX_TOKENS
    prompts = source_prompts(load_tokenizer(DEMO), NUM_PROMPTS, 40)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    found = []
    for device, attention in (("cpu", "torch"), (context.device, "auto")):
        engine = LLM(
            DEMO,
            device=device,
            dtype="float32",
            attention_backend=attention,
            num_blocks=128,
            max_num_seqs=NUM_PROMPTS,
        )
        outputs = engine.generate(_asked(prompts), params, use_tqdm=False)
        found.append([output.outputs[0].token_ids for output in outputs])
    referee = Referee(DEMO, "float32", context.device)
    places = [
        referee.verify(Parting(prompt, expected, other, params))
        for prompt, expected, other in zip(prompts, *found, strict=True)
        if expected != other
    ]
    yield {
        "kind": "cpu tokens",
        "num_tokens": sum(map(len, found[0])),
        "differing_sequences": len(places),
        "first_differences": places,
        "passed": all(place["near_tie"] for place in places),
    }


def _asked(prompts: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in prompts]
