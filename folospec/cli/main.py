"""The `folospec` command: options in, one call of a command's own module. torch is imported only
when a command runs."""

from __future__ import annotations

import shutil
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import folospec
from folospec.cli import options
from folospec.cli.runner import bad_input, ends_quietly, write_any_text

app = typer.Typer(
    name="folospec",
    help="Complete text with a language model and speculative decoding, with the same tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

PANEL_WIDTH = 80
"""Columns that the widest panel of the help takes."""

Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


class _Command(TyperCommand):
    """A command whose help is in panels where they fit; narrower ones would cut names of options
    off."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if shutil.get_terminal_size().columns < PANEL_WIDTH:
            self.rich_markup_mode = None
        super().format_help(ctx, formatter)


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
    write_any_text()


@app.command(cls=_Command)
def generate(
    ctx: typer.Context,
    prompts: options.Prompts = None,
    file: options.Files = None,
    input_format: options.InputFormat = "auto",
    chat: options.Chat = False,
    system: options.System = None,
    prediction: options.Prediction = None,
    output: options.Output = None,
    overwrite: options.Overwrite = False,
    retry_failed: options.RetryFailed = False,
    json: options.JsonLines = False,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    n: options.N = None,
    stop: options.Stop = None,
    generation_config: options.GenerationConfig = "auto",
    speculative: options.Speculative = None,
    num_speculative_tokens: options.NumSpeculativeTokens = None,
    acceptance: options.Acceptance = None,
    model: options.Model = "folospec-demo",
    dtype: options.Dtype = "auto",
    kv_cache_dtype: options.KvCacheDtype = "auto",
    quantization: options.Quantization = None,
    device: options.Device = "auto",
    attention_backend: options.AttentionBackend = "auto",
    block_size: options.BlockSize = 16,
    max_num_seqs: options.MaxNumSeqs = 64,
    max_model_len: options.MaxModelLen = None,
    deterministic: options.Deterministic = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    enforce_eager: options.EnforceEager = False,
    multi_step: options.MultiStep = None,
    compare: options.Compare = False,
    rounds: options.Rounds = None,
    show_steps: options.ShowSteps = False,
    trace: options.Trace = None,
) -> None:
    """Complete prompts: one, or a pile of them.

    A line of a .jsonl file is a text, or an object with prompt, messages or
    prompt_token_ids, and with an id and sampling parameters if you like.
    A single text is streamed. Results go to stdout or to --output; progress,
    errors and a summary go to stderr.

    Exit code 0: all done. 1: some prompts failed, the disk is full, or
    --compare found other tokens. 2: wrong input. 130: Ctrl-C; what is done
    is kept.
    """
    from folospec.cli.generate import GenerateOptions, run_generate

    with ends_quietly():
        with bad_input():
            wanted = GenerateOptions.of(ctx.params, prediction)
        code = run_generate(wanted)
    raise typer.Exit(code)


@app.command(cls=_Command)
def steps(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A trace, as generate --trace writes it.")
    ],
) -> None:
    """Show the steps of a trace: every draft, and what became of it."""
    with ends_quietly(), bad_input():
        from folospec.cli.steps import show_trace

        show_trace(file)
    raise typer.Exit(0)


@app.command(cls=_Command)
def demo(
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per completion.")] = 64,
    num_speculative_tokens: Annotated[
        int, typer.Option(min=1, help="Most draft tokens per step.")
    ] = 5,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Compare plain decoding, the fastest drafter by name and auto on code held out of training.

    Takes under a minute. Exit code 1 if any token differs.
    """
    with ends_quietly():
        from folospec.cli.demo import run_demo

        code = run_demo(
            max_tokens=max_tokens,
            num_speculative_tokens=num_speculative_tokens,
            dtype=dtype,
            device=device,
        )
    raise typer.Exit(code)


@app.command(cls=_Command)
def info(json: Json = False) -> None:
    """Show versions, hardware, and what folospec chooses here and why."""
    with ends_quietly():
        from folospec.cli.info import run_info

        run_info(as_json=json)


if __name__ == "__main__":
    app()
