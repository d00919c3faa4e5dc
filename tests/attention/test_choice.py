"""Which backend is taken, and what is said of those that are not."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

from folospec.attention import base
from folospec.attention.base import (
    AUTO_ORDER,
    AttentionBackend,
    choose_backend,
    considered,
    get_backend,
    known_backends,
    passed_over,
    refusal,
)
from folospec.kernels.gpu import launch

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALF = torch.bfloat16
MODEL = (HALF, [64, 128])


class Fake(AttentionBackend):
    """A backend that is never run."""

    def __init__(self, name, deterministic=False, block_step=1):
        self.name, self.deterministic, self.block_step = name, deterministic, block_step
        self.devices = ("cuda",)

    def supports(self, dtype, head_size, block_size):
        return None if block_size % self.block_step == 0 else f"wants {self.block_step}"

    def forward(self, *args, **kwargs):
        raise AssertionError


@pytest.fixture
def made(monkeypatch):
    """A machine with a GPU, as far as the registry can tell; the names of what was made."""
    names = []

    def factory(name, block_step=1):
        def make(deterministic):
            names.append(name)
            return Fake(name, deterministic and name == "triton", block_step)

        return make

    steps = {"triton": 1, **base.BLOCK_STEPS}
    for name, step in steps.items():
        monkeypatch.setitem(base._FACTORIES, name, factory(name, step))
    monkeypatch.setattr(base, "default_device", lambda: GPU)
    return names


@pytest.fixture
def without_triton(made, monkeypatch):
    def fail(deterministic):
        raise RuntimeError("triton is not installed")

    monkeypatch.setitem(base._FACTORIES, "triton", fail)


def test_every_backend_is_known_and_has_its_place():
    assert list(known_backends()) == list(AUTO_ORDER)


def test_a_gpu_gets_triton_and_nothing_else_is_even_made(made):
    assert choose_backend("auto", *MODEL, 16, GPU).name == "triton"
    assert get_backend().name == "triton"
    assert made == ["triton", "triton"]
    assert passed_over(*MODEL, 16, GPU) == {}


def test_each_device_has_its_own():
    assert considered(GPU) == ["triton", "flash_attn", "xformers", "torch"]
    assert considered(CPU) == ["native", "torch"]
    assert considered(torch.device("mps")) == ["torch"]


@pytest.mark.parametrize(
    ("block_size", "name"),
    [(16, "torch"), (64, "xformers"), (128, "xformers"), (256, "flash_attn")],
)
def test_auto_never_takes_what_the_block_size_excludes(without_triton, block_size, name):
    assert choose_backend("auto", *MODEL, block_size, GPU).name == name


def test_it_is_said_why_each_was_passed_over(without_triton):
    assert passed_over(*MODEL, 16, GPU) == {
        "triton": "triton is not installed",
        "flash_attn": "wants 256",
        "xformers": "wants 64",
    }


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_a_cpu_gets_no_gpu_backend_even_where_one_is_interpreted(made, monkeypatch, interpreted):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    # No native kernel takes such heads, so all that follow are asked for.
    assert choose_backend("auto", torch.float32, [80], 16, CPU).name == "torch"
    assert choose_backend("auto", torch.float32, [64], 16, CPU).name in ("native", "torch")
    assert made == []


def test_triton_can_be_named_on_a_cpu_where_it_is_interpreted(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", torch.float32, [64], 16, CPU).name == "triton"
    assert choose_backend("triton", *MODEL, 16, CPU, deterministic=True).deterministic
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'triton' cannot run here: there is no CUDA device"):
        choose_backend("triton", torch.float32, [64], 16, CPU)


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_named_libraries_say_what_they_cannot_do(made, name):
    step = base.BLOCK_STEPS[name]
    assert choose_backend(name, *MODEL, step, GPU).name == name
    with pytest.raises(ValueError, match=f"{name!r} cannot serve this: wants {step}"):
        choose_backend(name, *MODEL, 16, GPU)
    with pytest.raises(ValueError, match="runs on cuda, and the device is cpu"):
        choose_backend(name, *MODEL, step, CPU)


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="auto, native, triton, flash_attn, xformers, torch, got"):
        choose_backend("flashinfer", *MODEL, 16, GPU)


def test_deterministic_takes_what_can_promise_it(made, monkeypatch):
    chosen = choose_backend("auto", *MODEL, 256, GPU, deterministic=True)
    assert (chosen.name, chosen.deterministic) == ("triton", True)
    assert not choose_backend("auto", *MODEL, 256, GPU).deterministic
    assert choose_backend("torch", *MODEL, 256, GPU, deterministic=True).name == "torch"


def test_deterministic_passes_over_the_libraries(without_triton):
    assert choose_backend("auto", *MODEL, 256, GPU, deterministic=True).name == "torch"


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_a_library_cannot_be_named_where_bits_count(made, name):
    with pytest.raises(ValueError, match="deterministic must not be True: .* log-sum-exp"):
        choose_backend(name, *MODEL, 256, GPU, deterministic=True)


def test_torch_may_run_rows_alone_where_bits_count():
    torch_backend = get_backend("torch")
    assert not torch_backend.deterministic
    assert refusal(torch_backend, *MODEL, 16, CPU, deterministic=True) is None
    assert refusal(Fake("x"), *MODEL, 16, GPU, deterministic=True) is not None


def test_a_type_that_none_takes_is_refused_with_all_reasons():
    with pytest.raises(ValueError, match="no attention backend .*torch.*must be a floating type"):
        choose_backend("auto", torch.int8, [64], 16, CPU)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, and the versions of libraries that the test puts into the dict."""
    versions = {}

    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "why_not", lambda: None)
    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions


def test_a_missing_or_old_library_is_named(gpu):
    assert known_backends()["flash_attn"] == "flash-attn is not installed"
    assert known_backends()["xformers"] == "xformers is not installed"
    gpu |= {"flash-attn": "2.5.9.post1", "xformers": "0.0.27"}
    assert known_backends()["flash_attn"] == "flash-attn must be 2.6 or newer, got 2.5.9.post1"
    assert known_backends()["xformers"] == "xformers must be 0.0.28 or newer, got 0.0.27"


@pytest.mark.parametrize("version", ["2.6.0.post1", "2.8.3", "3.0", "10.1"])
def test_a_new_enough_library_is_imported(gpu, version, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # fails to import, wherever the test runs
    gpu["flash-attn"] = version
    assert "import of flash_attn halted" in known_backends()["flash_attn"]


def test_an_old_card_is_refused_before_any_import(gpu, monkeypatch):
    reason = "compute capability must be at least 8.0, got 7.5"
    monkeypatch.setattr(launch, "why_not", lambda: reason)
    reasons = known_backends()
    assert [reasons[name] for name in ("triton", "flash_attn", "xformers")] == [reason] * 3


def test_the_extras_ask_for_what_the_registry_does():
    lines = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for package, oldest in base.OLDEST.items():
        assert f'["{package}>={".".join(map(str, oldest))}"]' in lines
