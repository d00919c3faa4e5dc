"""A drafter of your own: registered from outside, batched, and unable to change the output.

It remembers, over all requests, which tokens followed each token, and proposes a tree with a
branch for each of the last two.

Run: python examples/05_custom_drafter.py
"""

from folospec import LLM, Drafter, Proposal, SamplingParams, register_drafter
from folospec.core import TokenTree
from folospec.spec.drafters.base import DrafterContext, DraftRow


class FollowerDrafter(Drafter):
    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        self.followers: dict[int, list[int]] = {}  # token -> what followed it, latest first
        self.num_read: dict[str, int] = {}

    def propose(self, rows: list[DraftRow]) -> list[Proposal | None]:
        return [self._propose(row) for row in rows]

    def _read(self, row: DraftRow) -> None:
        for i in range(self.num_read.get(row.seq_id, 0) + 1, len(row.token_ids)):
            before, after = row.token_ids[i - 1 : i + 1]
            others = [t for t in self.followers.get(before, []) if t != after]
            self.followers[before] = [after, *others[:1]]
        self.num_read[row.seq_id] = len(row.token_ids) - 1

    def _propose(self, row: DraftRow) -> Proposal | None:
        self._read(row)
        token_ids, parents = [], []
        for token in self.followers.get(row.token_ids[-1], []):
            parent = -1  # the root: the last committed token
            for _ in range(row.max_draft_tokens // 2):
                token_ids.append(token)
                parents.append(parent)
                parent = len(token_ids) - 1
                if token not in self.followers:
                    break
                token = self.followers[token][0]
        return Proposal(TokenTree(token_ids, parents)) if token_ids else None

    def drop(self, seq_id: str) -> None:
        self.num_read.pop(seq_id, None)


if __name__ == "__main__":
    register_drafter("followers", FollowerDrafter)
    prompts = ["class A:\n    def get(self):\n        return self.", "import os, sys\nimport"]
    params = SamplingParams(temperature=0.5, seed=3, max_tokens=48)
    settings = {"method": "followers", "num_speculative_tokens": 8}
    plain = LLM("folospec-demo", dtype="float64", num_blocks=64)
    drafting = LLM("folospec-demo", settings, dtype="float64", num_blocks=64)
    expected = plain.generate(prompts, params, use_tqdm=False)
    found = drafting.generate(prompts, params, use_tqdm=False)
    for a, b in zip(expected, found, strict=True):
        equal = "yes" if a.outputs[0].token_ids == b.outputs[0].token_ids else "no"
        print(f"tokens equal: {equal}, acceptance length {b.metrics.acceptance_length:.2f}")
