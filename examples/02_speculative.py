"""The same completion three times: plain, by prompt lookup, and with a draft model.

Run: python examples/02_speculative.py
"""

from typing import Any

from folospec import LLM, RequestOutput, SamplingParams

PROMPT = """class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __eq__(self, other):
"""

WAYS = {
    "plain": None,
    "ngram": "ngram",
    "draft_model": {
        "method": "draft_model",
        "model": "folospec-demo-draft",
        "num_speculative_tokens": 5,
    },
}


def run(speculative: Any) -> RequestOutput:
    llm = LLM("folospec-demo", speculative=speculative)
    return llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=64), use_tqdm=False)[0]


def main() -> None:
    outputs = {name: run(speculative) for name, speculative in WAYS.items()}
    plain_token_ids = outputs["plain"].outputs[0].token_ids
    print(PROMPT + outputs["plain"].outputs[0].text)
    print(f"{'':12} passes  drafts  accepted  length  tokens equal")
    for name, output in outputs.items():
        m = output.metrics
        equal = "yes" if output.outputs[0].token_ids == plain_token_ids else "no"
        print(
            f"{name:12} {m.num_target_passes:6}  {m.num_drafts:6}  "
            f"{m.num_accepted_tokens:8}  {m.acceptance_length:6.2f}  {equal}"
        )


if __name__ == "__main__":
    main()
