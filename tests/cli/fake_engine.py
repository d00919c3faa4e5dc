"""An engine without a model: a prompt's tokens are its words' lengths, one per step, and requests
of different lengths finish in another order than they came."""

from __future__ import annotations

from types import SimpleNamespace

from folospec.outputs import CompletionOutput, RequestOutput


class FakeEngine:
    tokenizer = None

    def __init__(self, max_num_seqs=2, fails=(), on_step=None):
        self.config = SimpleNamespace(max_num_seqs=max_num_seqs)
        self.fails, self.on_step = fails, on_step
        self.requests, self.num_steps, self.most_requests = {}, 0, 0
        self.params, self.num_added = {}, 0

    def stats(self):
        names = ("drafts", "draft_tokens", "accepted_tokens")
        return {"num_target_passes": self.num_steps, **{f"num_{name}": 0 for name in names}}

    def add_request(self, prompt, params):
        if "refused" in prompt:
            raise ValueError("the prompt is refused")
        request_id = f"request-{self.num_added}"
        self.num_added += 1
        self.params[prompt] = params
        self.requests[request_id] = (prompt, [len(word) for word in prompt.split()], [])
        self.most_requests = max(self.most_requests, len(self.requests))
        return request_id

    def step(self, *, finished_only=False):
        self.num_steps += 1
        if self.on_step is not None:
            self.on_step(self.num_steps)
        outputs = []
        for request_id in list(self.requests)[: self.config.max_num_seqs]:
            prompt, tokens, done = self.requests[request_id]
            done.append(tokens[len(done)])
            reason = "length" if len(done) == len(tokens) else None
            if prompt in self.fails:
                reason = "error"
            if reason:
                del self.requests[request_id]
            if reason or not finished_only:
                outputs.append(output_of(request_id, prompt, done, reason))
        return outputs

    def abort(self, request_id):
        prompt, _, done = self.requests.pop(request_id)
        return output_of(request_id, prompt, done, "abort")


def output_of(request_id, prompt, tokens, reason):
    why = "it broke" if reason == "error" else None
    completion = CompletionOutput(0, prompt.upper(), list(tokens), finish_reason=reason, error=why)
    is_finished = reason is not None
    return RequestOutput(request_id, prompt, [1], [completion], finished=is_finished, error=why)
