"""Sampled at temperature 0.8, with and without a draft model: the same seed gives the same tokens.

Plain decoding and verification draw the target's token with the same keyed noise. In float64 no
two candidates are ever close enough for rounding to decide; in float32 that can happen, rarely.

Run: python examples/06_sampling_seeded.py
"""

from typing import Any

from folospec import LLM, SamplingParams

PROMPTS = ["def parse(text):\n", "class Queue:\n    def "]
OPTIONS: dict[str, Any] = {"dtype": "float64", "num_blocks": 64}
PARAMS = SamplingParams(temperature=0.8, top_p=0.95, seed=7, n=2, max_tokens=24)


def main() -> None:
    plain = LLM("folospec-demo", **OPTIONS)
    speculative = LLM(
        "folospec-demo",
        speculative={"method": "draft_model", "model": "folospec-demo-draft"},
        **OPTIONS,
    )
    expected = plain.generate(PROMPTS, PARAMS, use_tqdm=False)
    # One request alone, the other way round: what else is in the batch does not matter either.
    found = [speculative.generate(p, PARAMS, use_tqdm=False)[0] for p in reversed(PROMPTS)][::-1]
    for one, other in zip(expected, found, strict=True):
        for a, b in zip(one.outputs, other.outputs, strict=True):
            equal = "yes" if a.token_ids == b.token_ids else "no"
            print(f"tokens equal: {equal} | {b.text[:60]!r}")
        m = other.metrics
        print(f"{m.num_accepted_tokens} of {m.num_draft_tokens} draft tokens were accepted")


if __name__ == "__main__":
    main()
