"""Which causal model classes of transformers run, checked against transformers itself.

python -m benchmarks.engine.architectures --out architectures.jsonl
python -m docs.update architectures.jsonl

Every class gets a tiny random checkpoint. "right": the logits of ragged prompts in chunks are
within 1e-4 of transformers', and the greedy tokens are those of its `generate`. "refused": loading
raises ValueError with the reason. "wrong" and "crash" are faults. "no checkpoint": transformers
itself cannot make, save or run it tiny.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.engine.tiny_configs import VOCAB_SIZE, save_sharp, tiny_config
from benchmarks.lib.output import begin, write_rows
from folospec import LLM, SamplingParams
from folospec.models.transformers_backend import check_class

BENCHMARK = "architectures"
LENGTHS = (5, 23, 1, 12)
NUM_NEW_TOKENS = 10
NUM_DISTINCT = 4
NUM_SEEDS = 8
TOLERANCE = 1e-4
SECONDS = 180

Row = dict[str, Any]


def prompts() -> list[list[int]]:
    """Ragged prompts, without the ids that a tiny config has for padding."""
    draws = torch.Generator().manual_seed(7)
    return [torch.randint(2, VOCAB_SIZE, (n,), generator=draws).tolist() for n in LENGTHS]


def run_class(model_type: str, folder: Path, **options: Any) -> Row:
    """Make a checkpoint of a class, run it, and compare; `options` are the engine's."""
    row = {"model_type": model_type, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}
    try:
        if reason := _refused_unread(model_type):
            return {**row, "result": "refused", "reason": reason}
        config = tiny_config(model_type)
        reference, expected = _varied(config, folder)
        texts = [prompt + output for prompt, output in zip(prompts(), expected, strict=True)]
        logprobs = [_last_logprobs(reference, text) for text in texts]
    except Exception as error:
        return {**row, "result": "no checkpoint", "reason": _line(error)}
    try:
        llm = LLM(
            str(folder),
            skip_tokenizer_init=True,
            max_num_batched_tokens=16,
            max_model_len=128,
            kv_cache_memory=1 << 24,
            **options,
        )
    except ValueError as error:
        return {**row, "result": "refused", "reason": _line(error).partition("supported: ")[2]}
    except Exception as error:
        return {**row, "result": "crash", "reason": _line(error)}
    try:
        return {**row, **_compare(llm, expected, logprobs)}
    except Exception as error:
        return {**row, "result": "crash", "reason": _line(error)}


def _varied(config: Any, folder: Path) -> tuple[Any, list[list[int]]]:
    """A model and what it generates, with the first seed that gives several tokens."""
    for seed in range(NUM_SEEDS):
        reference = save_sharp(config, folder, seed)
        expected = [_generate(reference, prompt) for prompt in prompts()]
        if len({token for tokens in expected for token in tokens}) >= NUM_DISTINCT:
            return reference, expected
    raise ValueError(f"fewer than {NUM_DISTINCT} tokens with every seed below {NUM_SEEDS}")


def _refused_unread(model_type: str) -> str | None:
    """The reason for which a class is refused before there is any weight; None if it is not."""
    try:
        config = CONFIG_MAPPING[model_type]()
    except ValueError:  # its own defaults do not pass its checks
        config = tiny_config(model_type)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    try:
        check_class(config, config.architectures[0], trust_remote_code=False)
    except ValueError as error:
        return _line(error).partition("supported: ")[2]
    return None


def _compare(llm: LLM, expected: list[list[int]], logprobs: list[list[float]]) -> Row:
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, logprobs=1, ignore_eos=True)
    outputs = llm.generate(prompts(), params, use_tqdm=False)
    found = [output.outputs[0].token_ids for output in outputs]
    error = 0.0
    for output, tokens, wanted in zip(outputs, expected, logprobs, strict=True):
        for place, token, value in zip(output.outputs[0].logprobs, tokens, wanted, strict=True):
            error = max(error, abs(place[token].logprob - value) if token in place else 99.0)
    right = found == expected and error <= TOLERANCE
    stats = llm.stats()
    return {
        "result": "right" if right else "wrong",
        "reason": f"error {error:.1e}",
        "backend": type(llm.engine.components.target.model).__name__,
        "drafts": stats["num_draft_tokens"],
        "accepted": stats["num_accepted_tokens"],
    }


def _generate(reference: Any, prompt: list[int]) -> list[int]:
    reference.generation_config.eos_token_id = None
    output = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def _last_logprobs(reference: Any, tokens: list[int]) -> list[float]:
    """The log probabilities of the generated tokens by the plain forward of the whole text."""
    with torch.no_grad():
        logits = reference(torch.tensor([tokens]), use_cache=False).logits[0]
    own = tokens[-NUM_NEW_TOKENS:]
    rows = logits[-NUM_NEW_TOKENS - 1 : -1].double().log_softmax(-1)
    return [float(row[token]) for row, token in zip(rows, own, strict=True)]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _in_a_process(model_type: str) -> Row:
    """Run a class in a process of its own, which ends with it."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            sender.send(run_class(model_type, Path(folder)))

    process = context.Process(target=run)
    process.start()
    sender.close()
    row = {"model_type": model_type, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}
    row.update(result="crash", reason=f"nothing after {SECONDS} s, or its process died")
    try:
        if receiver.poll(SECONDS):
            row = receiver.recv()
    except EOFError:
        pass
    process.kill()
    process.join()
    return row


def run_all(model_types: list[str], source: dict[str, Any]) -> Iterator[Row]:
    """One row per class."""
    for model_type in model_types:
        yield {"benchmark": BENCHMARK, **_in_a_process(model_type), "provenance": source}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="file for the rows; default: stdout")
    parser.add_argument("--only", nargs="*", help="model types; default: all")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    importlib.import_module("transformers.models.llama.modeling_llama")  # once, not in each process
    source = begin(argv, __file__)
    names = args.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    write_rows(run_all(names, source), args.out)


if __name__ == "__main__":
    main()
