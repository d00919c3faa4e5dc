"""Complete a few prompts in one batch, greedily.

Run: python examples/01_generate.py
"""

from folospec import LLM, SamplingParams

PROMPTS = [
    "def read_lines(path):\n",
    "class Stack:\n    def __init__(self",
    "import os\nimport",
]


def main() -> None:
    llm = LLM("folospec-demo")
    params = SamplingParams(temperature=0, max_tokens=40, stop="\n\n\n")
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        completion = output.outputs[0]
        print(f"--- {len(completion.token_ids)} tokens, ended by {completion.finish_reason}")
        print(f"{output.prompt}{completion.text}")


if __name__ == "__main__":
    main()
