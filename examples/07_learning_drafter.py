"""A drafter that learns from hidden states while it serves; it cannot change the output."""

import torch

import folospec
from folospec import LLM, Drafter, DrafterNeeds, Proposal, SamplingParams, TokenTree


class LearningDrafter(Drafter):
    """From the target's state at a position and the token after it: the token after that."""

    layer = 5  # the hidden states before it
    needs = DrafterNeeds(aux_hidden_state_layers=(layer,))

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

    def propose(self, requests):
        return [self.guess(request.seq_id, request.token_ids) for request in requests]

    def guess(self, seq_id, token_ids):
        self.token_ids[seq_id] = token_ids  # a view, which grows
        scores = self.scores(self.states[seq_id][-1:], token_ids[-1:])
        return Proposal(TokenTree.chain([int(scores.argmax())]))

    def observe(self, results):
        for result in results:
            new = result.aux_hidden_states[self.layer].float()
            before = self.states.get(result.seq_id, new)[: result.start]
            self.states[result.seq_id] = states = torch.cat([before, new])
            if token_ids := self.token_ids.get(result.seq_id):
                last = min(32, len(states) - 1)
                self.learn(states[-last - 1 : -1], token_ids[-last - 1 : -1], token_ids[-last:])

    def learn(self, states, token_ids, next_token_ids):
        scores = self.scores(states, token_ids)
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores, torch.tensor(next_token_ids)).backward()
        self.optimizer.step()


if __name__ == "__main__":
    torch.manual_seed(0)
    folospec.register_drafter("learning", LearningDrafter)
    llm = LLM("folospec-demo", speculative="learning", enable_prefix_caching=False)
    params = SamplingParams(temperature=0.5, seed=1, max_tokens=64)
    for name in ("Stack", "Queue", "Graph", "Point", "Matrix", "Server"):
        prompt = f"class {name}:\n    def __init__(self, name, value=None):\n        "
        metrics = llm.generate(prompt, params, use_tqdm=False)[0].metrics
        print(f"{metrics.num_accepted_tokens} of {metrics.num_draft_tokens} drafts accepted")
