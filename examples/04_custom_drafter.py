"""A drafter of your own, registered from outside: it says what followed each token last time."""

from folospec import LLM, Drafter, Proposal, SamplingParams, register_drafter
from folospec.core import TokenTree


class FollowerDrafter(Drafter):
    def __init__(self, context):
        super().__init__(context)
        self.follower, self.num_read = {}, {}

    def propose(self, requests):
        return [self.chain(request) for request in requests]

    def chain(self, request):
        for i in range(self.num_read.get(request.seq_id, 1), len(request.token_ids)):
            self.follower[request.token_ids[i - 1]] = request.token_ids[i]
        self.num_read[request.seq_id] = len(request.token_ids)
        draft, token = [], request.token_ids[-1]
        while token in self.follower and len(draft) < request.max_draft_tokens:
            token = self.follower[token]
            draft.append(token)
        return Proposal(TokenTree.chain(draft)) if draft else None

    def drop(self, seq_id):  # finished or preempted
        self.num_read.pop(seq_id, None)


if __name__ == "__main__":
    register_drafter("followers", FollowerDrafter)
    prompts = ["class A:\n    def get(self):\n        return self.", "import os, sys\nimport"]
    params = SamplingParams(temperature=0.5, seed=3, max_tokens=48)
    plain = LLM("folospec-demo", dtype="float64").generate(prompts, params, use_tqdm=False)
    drafting = LLM("folospec-demo", speculative="followers", dtype="float64")
    for a, b in zip(plain, drafting.generate(prompts, params, use_tqdm=False), strict=True):
        equal = "yes" if a.outputs[0].token_ids == b.outputs[0].token_ids else "no"
        print(f"tokens equal: {equal}, acceptance length {b.metrics.acceptance_length:.2f}")
