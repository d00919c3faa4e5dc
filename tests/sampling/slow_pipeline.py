"""The sampling pipeline once more, one row at a time, in plain Python: slow, and easy to check."""

import math

NEAR = 1e-9


class NearTie(Exception):
    """A threshold was met so closely that rounding decides; nothing can be compared."""


def slow_distribution(logits, row):
    """Probabilities, a list of floats, 0.0 where the token is excluded."""
    p = row.params
    z = constrained(list(logits), row)
    ids = range(len(z))
    if p.temperature == 0:
        best = max(ids, key=lambda t: (z[t], -t))
        return [1.0 if t == best else 0.0 for t in ids]
    peak = max(z)
    probs = normalised([math.exp((value - peak) / p.temperature) for value in z])
    order = sorted(ids, key=lambda t: (-z[t], t))
    if p.top_k > 0:
        probs = normalised([probs[t] if t in order[: p.top_k] else 0.0 for t in ids])
    if p.top_p < 1:
        probs = top_p_filtered(probs, order, p.top_p)
    if p.min_p > 0:
        floor = p.min_p * max(probs)
        if any(abs(q - floor) < NEAR and q != max(probs) for q in probs):
            raise NearTie
        probs = normalised([q if q >= floor - NEAR else 0.0 for q in probs])
    return probs


def top_p_filtered(probs, order, top_p):
    kept, reached = set(), 0.0
    for token in order:
        if abs(reached - top_p) < NEAR:
            raise NearTie
        if reached < top_p:
            kept.add(token)
        reached += probs[token]
    return normalised([q if t in kept else 0.0 for t, q in enumerate(probs)])


def normalised(weights):
    total = math.fsum(weights)
    return [w / total for w in weights]


def constrained(z, row):
    p = row.params
    output = [*row.output_token_ids, *row.draft_token_ids]
    if p.allowed_token_ids is not None:
        z = [v if t in p.allowed_token_ids else -math.inf for t, v in enumerate(z)]
    for word in row.bad_words_token_ids:
        head, last = list(word[:-1]), word[-1]
        if len(output) >= len(head) and output[len(output) - len(head) :] == head:
            z[last] = -math.inf
    if len(output) < p.min_tokens:
        for token in row.stop_ids:
            z[token] = -math.inf
    for token, bias in (p.logit_bias or {}).items():
        z[token] += bias
    for token in set(row.prompt_token_ids) | set(output):
        z[token] = (
            z[token] / p.repetition_penalty if z[token] > 0 else z[token] * p.repetition_penalty
        )
    for token in set(output):
        z[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    return z
