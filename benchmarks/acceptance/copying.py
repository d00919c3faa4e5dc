"""How far copying can go: the tokens that a drafter would save that knew every copied run.

A run is copied if it stands, with the token before it, somewhere in what the drafter looks at: the
context, which is the prompt and the output so far, or other texts such as the one that the caller
expects. The ideal copier proposes at each step the longest copied run that the output really goes
on with:

    prompt   ... for name in names : ...
    output   ... for | name in names | if ...       `for` was seen before, and with the longest
                 root  accepted run    next token   agreement before `:`; 3 accepted, 4 emitted

It is a bound for every drafter that copies after a match of at least one token, at the same
budget. No drafter can reach it for sure: which of several places goes on for longest is known
only afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class CopyCounts:
    """What the ideal copier does; counted as `SpeculationCounts` does."""

    num_tokens: int = 0
    num_passes: int = 0
    num_drafts: int = 0
    num_accepted_tokens: int = 0

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per draft, bonus included; 1.0 without drafts."""
        return 1.0 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def tokens_per_pass(self) -> float:
        return self.num_tokens / self.num_passes if self.num_passes else 0.0

    def __iadd__(self, other: CopyCounts) -> CopyCounts:
        self.num_tokens += other.num_tokens
        self.num_passes += other.num_passes
        self.num_drafts += other.num_drafts
        self.num_accepted_tokens += other.num_accepted_tokens
        return self


def ideal_copier(
    prompt: Sequence[int],
    output: Sequence[int],
    others: Sequence[Sequence[int]],
    budget: int,
    *,
    from_context: bool = True,
) -> CopyCounts:
    """Replay an output with the ideal copier.

    Args:
        output: what the target emitted.
        others: texts to copy from, beside the context.
        budget: most draft tokens per step.
        from_context: whether it copies from the prompt and the output so far.
    """
    counts = CopyCounts(num_tokens=len(output))
    if not output:
        return counts
    text = [*prompt, *output]
    counts.num_passes, done = 1, len(prompt) + 1  # the pass over the prompt emits one token
    while done < len(text):
        # The last token is never drafted, it is the bonus.
        most = min(budget, len(text) - done - 1)
        places: list[tuple[Sequence[int], int]] = []
        if from_context:
            places = [(text, i) for i in range(1, done) if text[i - 1] == text[done - 1]]
        for other in others:
            places += [(other, i) for i in range(1, len(other)) if other[i - 1] == text[done - 1]]
        longest = max((_agreement(s, i, text, done, most) for s, i in places), default=0)
        counts.num_passes += 1
        counts.num_drafts += longest > 0
        counts.num_accepted_tokens += longest
        done += longest + 1
    return counts


def _agreement(source: Sequence[int], i: int, text: Sequence[int], place: int, most: int) -> int:
    """How many tokens from `source[i]` on are those from `text[place]` on. Where the source is the
    text itself and the two overlap, the copy goes on with its own tokens."""
    length = 0
    while length < most and i + length < len(source) and source[i + length] == text[place + length]:
        length += 1
    return length
