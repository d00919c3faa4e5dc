"""A drafter that learns from hidden states while it serves; it cannot change the output."""

import torch

from folospec import LLM, Drafter, Needs, Proposal, SamplingParams, TokenTree, register_drafter

LAYER = 5  # the hidden states before this layer


class LearningDrafter(Drafter):
    """From the target's state at a position and the token after it: the token after that."""

    needs = Needs(taps=(LAYER,))

    def __init__(self, context):
        super().__init__(context)
        hidden, vocab = context.target.hidden_size, context.vocab_size
        self.embed, self.head = torch.nn.Embedding(vocab, hidden), torch.nn.Linear(hidden, vocab)
        parameters = [*self.embed.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=2e-3)
        self.states, self.token_ids = {}, {}  # by sequence

    def scores(self, states, token_ids):
        states = torch.nn.functional.layer_norm(states, states.shape[-1:])
        return self.head(states + self.embed(torch.tensor(token_ids)))

    def propose(self, rows):
        return [self.guess(row) for row in rows]

    def guess(self, row):
        self.token_ids[row.seq_id] = row.token_ids  # a view, which grows
        scores = self.scores(self.states[row.seq_id][-1:], row.token_ids[-1:])
        return Proposal(TokenTree.chain([int(scores.argmax())]))

    def observe(self, outcomes):
        for outcome in outcomes:
            new = outcome.taps[LAYER].float()
            before = self.states.get(outcome.seq_id, new)[: outcome.start]
            self.states[outcome.seq_id] = states = torch.cat([before, new])
            if token_ids := self.token_ids.get(outcome.seq_id):
                last = min(32, len(states) - 1)
                self.learn(states[-last - 1 : -1], token_ids[-last - 1 : -1], token_ids[-last:])

    def learn(self, states, token_ids, next_token_ids):
        scores = self.scores(states, token_ids)
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores, torch.tensor(next_token_ids)).backward()
        self.optimizer.step()


if __name__ == "__main__":
    torch.manual_seed(0)
    register_drafter("learning", LearningDrafter)
    llm = LLM("folospec-demo", speculative="learning", enable_prefix_caching=False)
    params = SamplingParams(temperature=0.5, seed=1, max_tokens=64)
    for name in ("Stack", "Queue", "Graph", "Point", "Matrix", "Server"):
        prompt = f"class {name}:\n    def __init__(self, name, value=None):\n        "
        metrics = llm.generate(prompt, params, use_tqdm=False)[0].metrics
        print(f"{metrics.num_accepted_tokens} of {metrics.num_draft_tokens} drafts accepted")
