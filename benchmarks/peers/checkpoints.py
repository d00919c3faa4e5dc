"""The same model in the form that each peer reads, made once and kept in build.

    demo, draft     bundled        a copy whose config older readers understand too
    160m, 1.2b      build/grown    grown from the demo when it is first asked for
    smollm2         build/models   a chat model, brought when it is first asked for; no draft model
                        |
                        +-- build/peers/checkpoints/openvino/NAME-DTYPE       OpenVINO's own format
                        +-- build/peers/checkpoints/gguf/NAME-DTYPE.gguf      llama.cpp's

Every weight of them is exact in bfloat16, so one checkpoint serves both types.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks import ROOT
from benchmarks.models import grown, smollm2
from benchmarks.peers.venvs import PEERS, python_of, run_logged
from folospec.models.loader import resolve_model

BUNDLED = {"demo": "folospec-demo", "draft": "folospec-demo-draft"}
NAMES = ("demo", *grown.SHAPES, "smollm2")
CONVERTED = PEERS / "checkpoints"
OPENVINO_WEIGHTS = {"float32": "fp32", "bfloat16": "fp16"}
"""What the converter offers for either; it has no bfloat16."""


def checkpoint_for(peer: str, name: str, dtype: str) -> Path:
    """The folder or file of a checkpoint that a peer loads, made if need be.

    Raises:
        RuntimeError: a converter failed; the message names its log.
    """
    if peer == "llama_cpp_q4_1":
        return smollm2.bring()["gguf"]
    source = hf_checkpoint(name)
    if peer == "openvino":
        target = CONVERTED / "openvino" / f"{name}-{dtype}"
        return _made(target, source, lambda place: _export_openvino(source, place, dtype))
    if peer == "llama_cpp":
        target = CONVERTED / "gguf" / f"{name}-{dtype}.gguf"
        return _made(target, source, lambda place: _export_gguf(source, place, dtype))
    return source


def has_draft(name: str) -> bool:
    """Whether the bundled draft model drafts for a checkpoint: it has the demo's vocabulary."""
    return name != "smollm2"


def hf_checkpoint(name: str) -> Path:
    """A folder in the format of transformers, which transformers, vLLM and folospec read."""
    if name in BUNDLED:
        source = resolve_model(BUNDLED[name])
        return _made(CONVERTED / "hf" / name, source, lambda place: _readable(source, place))
    if name == "smollm2":
        return smollm2.bring()["bf16"]
    folder = ROOT / "build" / "grown" / name
    if not (folder / "config.json").is_file():
        grown.write_grown(folder, grown.SHAPES[name], "bfloat16")
    return folder


def end_token_ids(folder: Path) -> set[int]:
    """The tokens that end an output, which nobody obeys in a comparison."""
    found = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    return {found} if isinstance(found, int) else set(found or ())


def _made(target: Path, source: Path, make: Callable[[Path], None]) -> Path:
    """Make a target at another place and move it, unless it is there and not older than its
    source."""
    if target.exists() and target.stat().st_mtime >= (source / "config.json").stat().st_mtime:
        return target
    unfinished = target.with_name(f"unfinished-{target.name}")
    for old in (target, unfinished):
        if old.is_dir():
            shutil.rmtree(old)
        old.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    make(unfinished)
    unfinished.rename(target)
    target.touch()
    return target


def _readable(source: Path, place: Path) -> None:
    shutil.copytree(source, place)
    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    config = grown.with_old_names(config, config["dtype"])
    tokenizer["tokenizer_class"] = grown.TOKENIZER_CLASS
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (place / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")


def _export_openvino(source: Path, place: Path, dtype: str) -> None:
    command = [str(python_of("openvino").with_name("optimum-cli")), "export", "openvino"]
    command += ["-m", str(source), "--task", "text-generation-with-past"]
    command += ["--weight-format", OPENVINO_WEIGHTS[dtype], str(place)]
    run_logged(command, "convert-openvino", {"HF_HUB_OFFLINE": "1"})


def _export_gguf(source: Path, place: Path, dtype: str) -> None:
    script = Path(__file__).parent / "workers" / "to_gguf.py"
    command = [str(python_of("llama_cpp")), str(script), str(source), str(place), dtype]
    run_logged(command, "convert-llama_cpp")
