"""The `folospec` command: options in, one call of a command's own module. torch is imported only
when a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

import folospec
from folospec.cli.runner import bad_input, ctrl_c_exits

app = typer.Typer(
    name="folospec",
    help="Complete text with a language model and speculative decoding, with the same tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"folospec {folospec.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Read the options that stand before the command."""


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What to complete. Default: stdin."),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(
            help="A file with one prompt, or a .jsonl file with one per line; - is stdin. "
            "Its last newline is left out. May be repeated."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A folder, a hub id, or a bundled name.")
    ] = "folospec-demo",
    speculative: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|JSON",
            help="auto, or auto:PATH with a draft model: drafts where they pay. Or a drafter: "
            "ngram, suffix, draft_model:PATH, ... Several with commas, or JSON. "
            "folospec-demo has a draft model of its own.",
        ),
    ] = None,
    num_speculative_tokens: Annotated[
        int | None, typer.Option(help="Most draft tokens per step. Default: the drafter's own.")
    ] = None,
    acceptance: Annotated[
        str | None, typer.Option(help="coupled (default), rejection or block.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens per completion.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus; 1 keeps all.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Most likely tokens; -1 keeps all.")] = -1,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="Completions per prompt.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends the output. May be repeated.")
    ] = None,
    dtype: Dtype = "auto",
    kv_cache_dtype: Annotated[
        str, typer.Option(help="Type of the KV: auto (the model's), float32 or bfloat16.")
    ] = "auto",
    quantization: Annotated[
        str | None,
        typer.Option(help="Round weights to int8 or fp8. Other tokens than without it."),
    ] = None,
    device: Device = "auto",
    attention_backend: Annotated[
        str, typer.Option(help="auto, or one that `folospec info` lists.")
    ] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens per KV block.")] = 16,
    deterministic: Annotated[
        bool | None,
        typer.Option(help="Demand, or waive, logits that do not depend on the batch."),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of a GPU's memory to use for everything.")
    ] = 0.9,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="No CUDA graphs on a GPU.")
    ] = False,
    run_ahead: Annotated[
        int | None, typer.Option(help="Tokens that a GPU decodes before they are shown.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and output. Default: the model's.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Run plain and speculative in turns and show both."),
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each with --compare. Default: 3.")
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="What the output is expected to be, for drafters that read it."
        ),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write what every step did to a file of JSON lines."),
    ] = None,
    show_steps: Annotated[
        bool,
        typer.Option("--show-steps", help="Show every step's draft and what became of it."),
    ] = False,
    json: Json = False,
) -> None:
    """Complete prompts.

    One prompt is streamed; several run as one batch. Completions go to stdout,
    counts and progress to stderr. Exit code 1: --compare found different tokens
    where there may be none; 2: wrong input; 130: Ctrl-C, what is done is printed.
    """
    from folospec.cli import generate as commands
    from folospec.cli.runner import make_engine
    from folospec.sampling_params import SamplingParams

    with ctrl_c_exits():
        with bad_input():
            found = commands.read_prompts(prompts or [], file or [])
            config = commands.read_speculative(
                speculative,
                num_speculative_tokens=num_speculative_tokens,
                acceptance=acceptance,
            )
            params = SamplingParams(
                n=n,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                stop=stop or (),
                prediction=commands.read_prediction(prediction),
            )
            if show_steps and json:
                raise ValueError("--show-steps is for reading; with --json use --trace FILE")
            if compare:
                commands.check_compare(config, show_steps=show_steps, trace=trace)
            elif rounds is not None:
                raise ValueError("--rounds needs --compare")
        options = {
            "speculative": config,
            "dtype": dtype,
            "kv_cache_dtype": kv_cache_dtype,
            "quantization": quantization,
            "device": device,
            "attention_backend": attention_backend,
            "block_size": block_size,
            "deterministic": deterministic,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enforce_eager": enforce_eager,
            "run_ahead": run_ahead,
            "max_model_len": max_model_len,
            "trace": trace,
        }
        engine = make_engine(model, warm_cache=not compare, **options)
        with bad_input():
            commands.check_prediction(engine, params)
        if compare:
            from folospec.cli.compare import compare as run_comparison

            code = run_comparison(engine, found, params, rounds=rounds or 3, as_json=json)
        else:
            code = commands.complete(engine, found, params, as_json=json, show_steps=show_steps)
    raise typer.Exit(code)


@app.command()
def steps(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A trace, as generate --trace writes it.")
    ],
) -> None:
    """Show the steps of a trace: every draft, and what became of it."""
    with ctrl_c_exits(), bad_input():
        from folospec.cli.steps import show_trace

        show_trace(file)
    raise typer.Exit(0)


@app.command()
def demo(
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per completion.")] = 64,
    num_speculative_tokens: Annotated[
        int, typer.Option(min=1, help="Most draft tokens per step.")
    ] = 5,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Show the claim: plain, ngram and draft_model side by side, on code held out of training.

    Takes under a minute. Exit code 1 if any token differs.
    """
    with ctrl_c_exits():
        from folospec.cli.demo import run_demo

        code = run_demo(
            max_tokens=max_tokens,
            num_speculative_tokens=num_speculative_tokens,
            dtype=dtype,
            device=device,
        )
    raise typer.Exit(code)


@app.command()
def info(json: Json = False) -> None:
    """Show versions, hardware, and what folospec chooses here and why."""
    with ctrl_c_exits():
        from folospec.cli.info import run_info

        run_info(as_json=json)


if __name__ == "__main__":
    app()
