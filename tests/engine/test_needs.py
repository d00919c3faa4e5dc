"""A drafter that needs hidden states or top tokens gets those of every committed position, once, in
order."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from harness import OracleTreeDrafter, make_llm, run
from transformers import LlamaForCausalLM

from folospec import register_drafter
from folospec.spec.drafters.base import DrafterNeeds, StepResult

pytestmark = pytest.mark.usefixtures("oracle")

LAYERS = (0, 1, 2)


class Watcher(OracleTreeDrafter):
    """Proposes trees like its parent and keeps what it is told, by sequence."""

    seen: dict[str, dict[int, list[torch.Tensor]]] = {}
    tops: dict[str, list[StepResult]] = {}

    @property
    def needs(self) -> DrafterNeeds:
        return DrafterNeeds(aux_hidden_state_layers=LAYERS, num_top_tokens=3)

    def observe(self, outcomes: list[StepResult]) -> None:
        for outcome in outcomes:
            if outcome.seq_id.startswith("request-2"):
                continue  # its siblings begin where the first sequence has computed the prompt
            aux_layers = self.seen.setdefault(outcome.seq_id, {layer: [] for layer in LAYERS})
            for layer, rows in outcome.aux_hidden_states.items():
                del aux_layers[layer][outcome.start :]
                assert len(aux_layers[layer]) == outcome.start
                aux_layers[layer].extend(rows)
            self.tops.setdefault(outcome.seq_id, []).append(outcome)


register_drafter("watcher", Watcher)


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 16}, {"deterministic": True}])
def test_aux_hidden_states_are_the_targets_hidden_states(
    options: dict[str, Any], models: Any, plain: harness.Run
) -> None:
    Watcher.seen.clear()
    settings = {"method": "watcher", "num_speculative_tokens": 12}
    llm = make_llm(models.target, settings, enable_prefix_caching=False, **options)
    result = run(llm)
    assert result.tokens == plain.tokens
    harness.assert_speculated(result.stats, moved=True)
    reference = LlamaForCausalLM.from_pretrained(models.target, dtype=torch.float64).eval()
    for number in (0, 1, 3):
        output = result.outputs[number]
        token_ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        aux_layers = Watcher.seen[f"request-{number}-0"]
        with torch.no_grad():
            states = reference(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
        for layer in (0, 1):  # the last of transformers' states is after the final norm
            seen = torch.stack(aux_layers[layer])
            assert len(token_ids) - 2 <= len(seen) < len(token_ids)
            assert torch.allclose(seen, states[layer][0, : len(seen)], atol=1e-4)
            assert not torch.allclose(seen[1:], states[layer][0, : len(seen) - 1], atol=1e-3)


def test_top_tokens_are_those_of_every_verified_row(models: Any, plain: harness.Run) -> None:
    Watcher.tops.clear()
    settings = {"method": "watcher", "num_speculative_tokens": 12}
    result = run(make_llm(models.target, settings))
    greedy = result.outputs[0].outputs[0].token_ids
    emitted: list[int] = []
    for outcome in Watcher.tops["request-0-0"]:
        if outcome.verdict is None:
            assert outcome.top_token_ids is None
            continue
        tree_size = len(outcome.proposal) if outcome.proposal else 0
        assert outcome.top_token_ids.shape == (1 + tree_size, 3)
        rows = [0, *(node + 1 for node in outcome.verdict.path)]
        emitted += outcome.top_token_ids[rows, 0].tolist()
    assert emitted[: len(greedy)] == greedy
