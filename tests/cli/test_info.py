import json
import subprocess
import sys
from types import SimpleNamespace

import torch
from native_builds import require_native

import folospec as package
from folospec.cli import info
from folospec.kernels import native


def test_version_is_printed(folospec):
    result = folospec("--version")
    assert (result.exit_code, result.stdout) == (0, f"folospec {package.__version__}\n")


def test_help_of_every_command_needs_no_torch():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from folospec.cli.main import app\n"
        "for command in [], ['generate'], ['demo'], ['info']:\n"
        "    assert CliRunner().invoke(app, [*command, '--help']).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_info_names_what_there_is_and_why_it_is_chosen(folospec):
    result = folospec("info")
    assert result.exit_code == 0
    for words in (
        *("CPU", "memory", "GPUs", "bfloat16", "torch threads", "chosen: ", "draft_model"),
        *("ngram", "coupled, rejection, block", "cc:", "triton:", "folospec-demo-draft:"),
    ):
        assert words in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_info_is_there_as_json(folospec):
    facts = json.loads(folospec("info", "--json").stdout)
    assert facts["versions"]["folospec"] == package.__version__
    assert facts["cpu"]["usable_cores"] >= 1
    assert facts["attention_backend_chosen"]["name"] in facts["attention_backends"]
    assert facts["attention_backend_chosen"]["device"] in ("cpu", "cuda")


def test_info_says_what_the_native_kernels_were_built_for_and_where_they_are(folospec):
    library = require_native()
    facts = json.loads(folospec("info", "--json").stdout)
    assert facts["native_kernels"] == {
        "state": "available",
        "instructions": library.instructions,
        "origin": library.origin,
        "library": str(library.path),
    }
    lines = folospec("info").stdout
    assert f"native, built for {library.instructions}" in lines
    assert ("prebuilt:" if library.origin == "prebuilt" else "compiled here:") in lines
    assert "chosen: native" in lines


def test_info_says_why_there_are_no_native_kernels(folospec, monkeypatch):
    monkeypatch.setattr(native, "_loaded", lambda: (None, "there is no C++ compiler"))
    lines = " ".join(folospec("info").stdout.split())
    assert "torch's own; native CPU kernels: there is no C++ compiler" in lines
    assert "chosen: torch" in lines


GPU_ORDER = ("triton", "flash_attn", "xformers", "torch")


def known_on_a_gpu(chosen, backends, passed_over):
    return SimpleNamespace(
        auto_attention_backend=chosen,
        attention_backends={"native": None, "torch": None, **backends},
        considered=GPU_ORDER,
        passed_over=passed_over,
        device="cuda",
        block_size=16,
    )


def test_the_reason_follows_from_the_backends():
    missing = "not installed"
    backends = {"triton": None, "flash_attn": missing, "xformers": None}
    known = known_on_a_gpu("triton", backends, {})
    assert info._why(known) == "'auto' prefers it to xformers, torch"
    backends = dict.fromkeys(GPU_ORDER[:3], missing)
    known = known_on_a_gpu("torch", backends, backends)
    assert info._why(known) == "the only one for cuda with blocks of 16"
    backends |= {"xformers": None}
    known = known_on_a_gpu("torch", backends, backends | {"xformers": "block_size must be ..."})
    assert info._why(known) == (
        "the only one for cuda with blocks of 16; not xformers: block_size must be ..."
    )


def test_info_says_which_block_size_would_do(folospec):
    words = " ".join(folospec("info").stdout.split())
    assert "block_size: multiples of 256 (default 16)" in words
    facts = json.loads(folospec("info", "--json").stdout)
    assert facts["attention_block_sizes"] == {
        "flash_attn": "multiples of 256 (default 16)",
        "xformers": "multiples of 64 (default 16)",
    }


def test_info_says_what_the_gpu_is(folospec, monkeypatch):
    gpu = {
        "name": "A Card",
        "compute_capability": "9.0",
        "processors": 132,
        "memory_free_bytes": 70 * 2**30,
        "memory_total_bytes": 80 * 2**30,
    }
    monkeypatch.setattr(info, "_gpus", lambda: [gpu])
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(info, "package_version", lambda name: f"1.2.{len(name)}")
    words = " ".join(folospec("info").stdout.split())
    assert "A Card, compute capability 9.0 132 multiprocessors, 70.0 of 80.0 GiB free" in words
    assert "torch made for CUDA 12.8, triton 1.2.6" in words
    facts = json.loads(folospec("info", "--json").stdout)
    assert (facts["gpus"], facts["cuda"]) == ([gpu], "12.8")


def test_a_gpu_is_asked_for_what_it_is(monkeypatch):
    card = SimpleNamespace(name="A Card", major=8, minor=9, multi_processor_count=58)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 + index, 20))
    first, second = info._gpus()
    assert first == {
        "name": "A Card",
        "compute_capability": "8.9",
        "processors": 58,
        "memory_free_bytes": 10,
        "memory_total_bytes": 20,
    }
    assert second["memory_free_bytes"] == 11


def test_what_is_not_installed_is_none():
    assert info.package_version("folospec-no-such-package") is None
    assert info.compiler_version("folospec-no-such-compiler") is None
