"""The options of `folospec generate` as the command line has them, in the groups of its help.

An option that was not given is None, unless the help shows a default. The names of values are
short, so that the names of options fit 80 columns.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

INPUT = "Input"
OUTPUT = "Output"
SAMPLING = "Sampling: what a line does not say itself"
SPECULATION = "Proposer"
ENGINE = "Model and engine"
GPU = "GPU"
CLOSER = "A closer look"


def _option(panel: str, *names: str, value: str | None = None, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, metavar=value, **settings)


Prompts = Annotated[
    list[str] | None,
    typer.Argument(metavar="PROMPT", help="Texts to complete; - is stdin. Default: stdin."),
]
Files = Annotated[
    list[str] | None,
    _option(
        INPUT,
        "--file",
        "-f",
        value="FILE",
        help="Prompts: .jsonl has one per line, .json a list, another file is one text; "
        "- is stdin. May be repeated.",
    ),
]
InputFormat = Annotated[
    str,
    _option(
        INPUT,
        "--input-format",
        value="FORMAT",
        help="Of files and stdin: auto (by the name), jsonl, json, text, or lines (a text each).",
    ),
]
Chat = Annotated[
    bool, _option(INPUT, "--chat", help="Prompts are user messages for the chat template.")
]
System = Annotated[
    str | None, _option(INPUT, "--system", value="TEXT", help="System message, with --chat.")
]
Prediction = Annotated[
    str | None,
    _option(
        INPUT, "--prediction", value="FILE", help="The expected output, for drafters that use it."
    ),
]

Output = Annotated[
    str | None,
    _option(
        OUTPUT,
        "--output",
        "-o",
        value="FILE",
        help="Append results as lines of JSON as they finish; a second run adds what is missing.",
    ),
]
Overwrite = Annotated[bool, _option(OUTPUT, "--overwrite", help="Replace the output file.")]
RetryFailed = Annotated[
    bool, _option(OUTPUT, "--retry-failed", help="Run the failed prompts of the file again.")
]
JsonLines = Annotated[
    bool, _option(OUTPUT, "--json", help="Print results as lines of JSON as they finish.")
]

MaxTokens = Annotated[
    int | None,
    _option(
        SAMPLING,
        "--max-tokens",
        value="INT",
        help="Most tokens each. Default: the model's, or 128.",
    ),
]
Temperature = Annotated[
    float | None,
    _option(
        SAMPLING,
        "--temperature",
        value="FLOAT",
        help="0 takes the most likely token. Default: the model's, or 0.",
    ),
]
TopP = Annotated[
    float | None, _option(SAMPLING, "--top-p", value="FLOAT", help="Nucleus; 1 keeps all.")
]
TopK = Annotated[
    int | None, _option(SAMPLING, "--top-k", value="INT", help="Most likely tokens; -1 keeps all.")
]
Seed = Annotated[
    int | None,
    _option(
        SAMPLING,
        "--seed",
        value="INT",
        help="Same seed, same tokens. Each prompt gets a seed of its own, derived from this one "
        "and its id, or its position if it has no id. Default: 0.",
    ),
]
N = Annotated[int | None, _option(SAMPLING, "--n", "-n", value="INT", help="Completions each.")]
Stop = Annotated[
    list[str] | None,
    _option(SAMPLING, "--stop", value="TEXT", help="Ends the output. May be repeated."),
]

GenerationConfig = Annotated[
    str,
    _option(
        SAMPLING,
        "--generation-config",
        value="NAME",
        help="Where defaults come from: auto is the model's generation_config.json; folospec "
        "leaves it out.",
    ),
]

Speculative = Annotated[
    str | None,
    _option(
        SPECULATION,
        "--speculative",
        value="DRAFTER",
        help="auto drafts where it pays. Or ngram, suffix, draft_model:PATH, ...; several with "
        "commas between them; or JSON. folospec-demo has a draft model of its own.",
    ),
]
NumSpeculativeTokens = Annotated[
    int | None,
    _option(
        SPECULATION,
        "--num-speculative-tokens",
        value="INT",
        help="Most draft tokens per step. Default: the drafter's own.",
    ),
]
Acceptance = Annotated[
    str | None,
    _option(
        SPECULATION,
        "--acceptance",
        value="RULE",
        help="coupled (the same tokens as without drafts; default), rejection or block.",
    ),
]

Model = Annotated[
    str, _option(ENGINE, "--model", value="MODEL", help="A folder, a hub id, or a bundled name.")
]
Dtype = Annotated[
    str,
    _option(ENGINE, "--dtype", value="TYPE", help="auto, float32, bfloat16, float16 or float64."),
]
KvCacheDtype = Annotated[
    str,
    _option(
        ENGINE,
        "--kv-cache-dtype",
        value="TYPE",
        help="Of the KV: auto (the model's), float32 or bfloat16.",
    ),
]
Quantization = Annotated[
    str | None,
    _option(
        ENGINE,
        "--quantization",
        value="TYPE",
        help="Round weights to int8 or fp8; the tokens change.",
    ),
]
Device = Annotated[
    str, _option(ENGINE, "--device", value="DEVICE", help="auto, cpu, cuda, cuda:1, ...")
]
AttentionBackend = Annotated[
    str,
    _option(
        ENGINE,
        "--attention-backend",
        value="NAME",
        help="auto, or one that `folospec info` lists.",
    ),
]
BlockSize = Annotated[
    int, _option(ENGINE, "--block-size", value="INT", help="Tokens per KV block.")
]
MaxNumSeqs = Annotated[
    int, _option(ENGINE, "--max-num-seqs", value="INT", help="Most completions that run at once.")
]
MaxModelLen = Annotated[
    int | None,
    _option(
        ENGINE,
        "--max-model-len",
        value="INT",
        help="Most tokens of prompt and output. Default: the model's.",
    ),
]
Deterministic = Annotated[
    bool | None,
    _option(
        ENGINE,
        "--deterministic/--no-deterministic",
        help="Demand, or waive for speed, logits that do not depend on the batch.",
    ),
]
GpuMemoryUtilization = Annotated[
    float,
    _option(
        GPU,
        "--gpu-memory-utilization",
        value="FLOAT",
        help="Share of a GPU's memory to use for everything.",
    ),
]
EnforceEager = Annotated[bool, _option(GPU, "--enforce-eager", help="No CUDA graphs on a GPU.")]
MultiStep = Annotated[
    int | None,
    _option(
        GPU,
        "--multi-step",
        value="INT",
        help="Tokens that a GPU decodes before they are shown.",
    ),
]

Compare = Annotated[
    bool,
    _option(CLOSER, "--compare", help="Run plain and speculative in turns and show both."),
]
Rounds = Annotated[
    int | None,
    _option(CLOSER, "--rounds", value="INT", help="Runs of each with --compare. Default: 3."),
]
ShowSteps = Annotated[
    bool,
    _option(CLOSER, "--show-steps", help="Show every step's draft and what became of it."),
]
Trace = Annotated[
    str | None,
    _option(CLOSER, "--trace", value="FILE", help="Write what every step did as lines of JSON."),
]
