"""Whether two commits compute the same: tokens, the bits of logprobs, and what was counted.

    python -m benchmarks.engine.same_outputs record before.json  # in a checkout of the one
    python -m benchmarks.engine.same_outputs record after.json   # in a checkout of the other
    python -m benchmarks.engine.same_outputs compare before.json after.json

`record` runs the demo model over held-out prompts, half of them greedy and half sampled, alone and
with several drafters, in a KV pool that is too small, with prompts that begin alike and requests of
two sequences. `--seed-of-first` changes the noise of one request: a comparison that calls that the
same could not fail. `compare` ends with status 1 where anything differs, or where a count that has
to occur is zero.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.lib.output import opened
from benchmarks.lib.prompts import held_out_prompts
from folospec import LLM, RequestOutput, SamplingParams
from folospec.models.loader import load_tokenizer, resolve_model

TARGET, DRAFT = "folospec-demo", "folospec-demo-draft"
RUNS: dict[str, Any] = {
    "plain": None,
    "ngram": {"method": "ngram"},
    "suffix": {"method": "suffix"},
    "chain": {"method": "draft_model", "model": DRAFT},
    "tree": {"method": "draft_model", "model": DRAFT, "tree": [2, 1, 1]},
    "rejection": {"method": "draft_model", "model": DRAFT, "acceptance": "rejection"},
    "several": {"drafters": ["ngram", {"method": "draft_model", "model": DRAFT}], "merge": True},
}
PER_STEP = ("num_steps", "num_preemptions", "num_moved_rows", "prefix_cache_hits")
PER_DRAFT = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
MUST_OCCUR = ("num_steps", "num_preemptions", "prefix_cache_hits", "num_forks")
MAX_TOKENS, MAX_NUM_SEQS, NUM_BLOCKS = 24, 24, 160


def params_of(count: int, first_seed: int) -> Iterator[SamplingParams]:
    """Greedy and sampled in turn; every eighth asks for two sequences, and every fourth for
    logprobs."""
    for index in range(count):
        is_sampled = index % 2 == 1
        yield SamplingParams(
            temperature=0.8 if is_sampled else 0.0,
            top_p=0.95 if is_sampled else 1.0,
            n=2 if index % 8 == 7 else 1,
            logprobs=1 if index % 4 in (2, 3) else None,
            seed=first_seed if index == 1 else index,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
        )


def outputs_of(output: RequestOutput) -> list[dict[str, Any]]:
    """Tokens, text and logprobs, of which every bit is shown."""
    return [
        {
            "token_ids": completion.token_ids,
            "text": completion.text,
            "logprobs": [
                {token_id: entry.logprob.hex() for token_id, entry in place.items()}
                for place in completion.logprobs or ()
            ],
        }
        for completion in output.outputs
    ]


def record(count: int, first_seed: int) -> dict[str, Any]:
    """What every run of `RUNS` gives and counts."""
    prompts = held_out_prompts(load_tokenizer(str(resolve_model(TARGET))), (count + 1) // 2)
    # Two prompts of each, the second a little longer: what they share is computed once.
    pairs = [prompt[: len(prompt) - cut] for prompt in prompts for cut in (8, 0)]
    found = {}
    for name, speculative in RUNS.items():
        llm = LLM(
            TARGET, speculative, max_num_seqs=MAX_NUM_SEQS, num_blocks=NUM_BLOCKS, dtype="float32"
        )
        asked = list(islice(params_of(count, first_seed), count))
        outputs = llm.generate(pairs[:count], asked, use_tqdm=False)
        stats = llm.stats()
        counts = {key: stats[key] for key in (*PER_STEP, *PER_DRAFT)}
        counts["num_forks"] = sum(len(output.outputs) - 1 for output in outputs)
        found[name] = {"outputs": [*map(outputs_of, outputs)], "counts": counts}
        sys.stderr.write(f"{name}: {counts}\n")
    return found


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """A line for every request and count that differs, and for counts that say nothing."""
    lines = [] if first.keys() == second.keys() else [f"runs: {[*first]} and {[*second]}"]
    for name in first.keys() & second.keys():
        one, other = first[name], second[name]
        pairs = enumerate(zip(one["outputs"], other["outputs"], strict=True))
        lines += [f"{name}: request {place} differs" for place, (a, b) in pairs if a != b]
        for key, value in one["counts"].items():
            if value != other["counts"][key]:
                lines.append(f"{name}: {key} is {value} and {other['counts'][key]}")
        needed = MUST_OCCUR if name == "plain" else (*MUST_OCCUR, *PER_DRAFT)
        lines += [f"{name}: {key} is zero" for key in needed if not one["counts"][key]]
        if one["counts"]["num_draft_tokens"] == one["counts"]["num_accepted_tokens"] > 0:
            lines.append(f"{name}: nothing was rejected")
    return sorted(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record", help="run, and write what came of it")
    one.add_argument("out", type=Path)
    one.add_argument("--prompts", type=int, default=200, help="how many (default 200)")
    one.add_argument("--seed-of-first", type=int, default=1, help="of the first sampled request")
    other = commands.add_parser("compare", help="say what differs between two records")
    other.add_argument("files", type=Path, nargs=2)
    args = parser.parse_args(argv)
    if args.command == "record":
        with opened(args.out) as out:
            json.dump(record(args.prompts, args.seed_of_first), out)
        return 0
    lines = differences(*(json.loads(path.read_text()) for path in args.files))
    sys.stdout.write("".join(f"{line}\n" for line in lines) or "the same\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
