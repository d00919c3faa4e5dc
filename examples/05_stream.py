"""Print text as it is generated; an accepted draft arrives as one increment of several tokens.

Run: python examples/05_stream.py
"""

from folospec import LLM, SamplingParams

DRAFT_MODEL = {"method": "draft_model", "model": "folospec-demo-draft"}


def main() -> None:
    prompt = "def count_words(text):\n"
    print(prompt, end="")
    sizes = []
    with LLM("folospec-demo", speculative=DRAFT_MODEL) as llm:
        for delta in llm.stream(prompt, SamplingParams(temperature=0, max_tokens=48)):
            print(delta.text, end="", flush=True)
            sizes.append(len(delta.token_ids))
    print(f"\n--- tokens per increment: {sizes}")


if __name__ == "__main__":
    main()
