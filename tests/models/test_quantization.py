"""Quantized weights: rounded by no more than half a step, small, and never without being asked."""

from __future__ import annotations

import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
import transformers as hf
from paged_runner import PagedRunner, all_logits
from tiny_checkpoints import SHAPE, load, random_prompts, save_random
from torch import Tensor

from folospec.attention.native_cpu import NativeAttention
from folospec.kernels import native
from folospec.models import quantization
from folospec.models.decoder import Decoder
from folospec.models.loader import load_model
from folospec.models.quantization import check_quantization, quantize
from folospec.models.self_draft import self_draft_of

MATRICES = ("qkv", "output", "gate_up", "down")
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
LOGIT_BOUNDS = {"int8": 0.05, "fp8": 0.2}
"""Of the differences of logits, over the plain logits, both as root mean squares."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Qwen3 with biases, widths that the native kernels take, and an output matrix of its own."""
    shape = {**SHAPE, "hidden_size": 64, "intermediate_size": 96}
    folder = tmp_path_factory.mktemp("target")
    save_random(hf.Qwen3Config(**shape, head_dim=32, attention_bias=True), folder)
    return folder


def quantized(folder: Any, method: str, **options: Any) -> Decoder:
    """fp8 is for GPUs because of what they are fast at; a CPU computes the same."""
    model = load(folder, **options)
    assert isinstance(model, Decoder)
    quantize(model, method)
    return model


def logits_of(model: Any) -> Tensor:
    return torch.cat(all_logits(PagedRunner(model), random_prompts(), 4)).float()


def matrices(model: Decoder) -> list[Any]:
    return [getattr(layer, name) for layer in model.layers for name in MATRICES]


def num_bytes(tensor: Any) -> int:
    """Of a plain tensor, or of the tensors that a subclass is made of."""
    if type(tensor) is Tensor:
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(getattr(tensor, name).nbytes for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_int8_entry_is_off_by_half_a_step_at_most(folder: Any, dtype: torch.dtype) -> None:
    plain, rounded = load(folder, dtype=dtype), quantized(folder, "int8", dtype=dtype)
    for before, after in zip(matrices(plain), matrices(rounded), strict=True):
        step = before.float().abs().amax(dim=1, keepdim=True) / 127
        off = (after.dequantize().float() - before.float()).abs()
        # torchao takes a 127.5th; then the last entry is cut off by half a step.
        narrow = torch.finfo(dtype).eps * before.float().abs()
        assert (off <= 0.51 * step + narrow).all()
        assert (off > 0.2 * step).any(), "nothing was rounded"


@pytest.mark.parametrize("method", LOGIT_BOUNDS)
def test_logits_differ_and_stay_close(folder: Any, method: str) -> None:
    plain, rounded = logits_of(load(folder)), logits_of(quantized(folder, method))
    off = float((rounded - plain).norm() / plain.norm())
    assert 1e-3 < off < LOGIT_BOUNDS[method]
    broken = quantized(folder, method)
    layer = broken.layers[1]
    layer.gate_up = layer.gate_up.dequantize().roll(1, 0)  # control: one matrix is wrong
    assert (logits_of(broken) - plain).norm() / plain.norm() > LOGIT_BOUNDS[method]


@pytest.mark.parametrize("method", LOGIT_BOUNDS)
def test_a_matrix_takes_a_quarter_of_its_float32_bytes(folder: Any, method: str) -> None:
    plain, rounded = load(folder), quantized(folder, method)
    before = sum(map(num_bytes, matrices(plain)))
    after = sum(map(num_bytes, matrices(rounded)))
    outputs = sum(len(matrix) for matrix in matrices(plain))
    # A scale of 4 bytes per output channel; torchao keeps a zero point of 1 byte for int8 too.
    assert after == before // 4 + outputs * (5 if method == "int8" else 4)
    for name in ("embedding", "lm_head", "final_norm"):
        torch.testing.assert_close(getattr(rounded, name), getattr(plain, name), rtol=0, atol=0)


def test_a_matrix_is_gone_before_the_next_is_rounded(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    assert isinstance(model, Decoder)
    floats = [weakref.ref(matrix) for matrix in matrices(model)]
    alive, plain_rounding = [], quantization._rounded

    def counting(weight: Tensor, config: Any) -> Tensor:
        alive.append(sum(ref() is not None for ref in floats))
        return plain_rounding(weight, config)

    monkeypatch.setattr(quantization, "_rounded", counting)
    quantize(model, "int8")
    assert alive == list(range(len(floats), 0, -1))


def test_it_runs_in_torch_on_native_attention_too(folder: Any) -> None:
    if native.load() is None:
        pytest.skip(str(native.why_not()))
    model = load_model(str(folder), attention="native", quantization="int8")
    assert isinstance(model, Decoder)
    assert isinstance(model.attention, NativeAttention)
    plain = load_model(str(folder), attention="native")
    assert isinstance(plain, Decoder)
    assert plain.runs_natively, "control: these widths do run natively"
    assert not model.runs_natively
    assert not model.deterministic
    on_torch = logits_of(load(folder, quantization="int8"))
    torch.testing.assert_close(logits_of(model), on_torch, rtol=0, atol=1e-4)
    assert model.native is None


def test_it_runs_between_gpu_kernels_and_promises_no_bits(folder: Any) -> None:
    """Their own product reads weights by their address: of these, the output matrix alone."""
    triton_paged = pytest.importorskip("folospec.attention.triton_paged")
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are not interpreted")
    prompts = random_prompts(lengths=(5, 3))
    plain, rounded = (
        load_model(
            str(folder),
            attention=triton_paged.TritonAttention(deterministic=True),
            quantization=method,
        )
        for method in (None, "int8")
    )
    assert plain.deterministic, "control: this is what is given up"
    assert not rounded.deterministic
    found = all_logits(PagedRunner(rounded), prompts, 4)
    expected = all_logits(PagedRunner(load(folder, quantization="int8")), prompts, 4)
    assert isinstance(rounded, Decoder)
    assert rounded.gpu is not None
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_layers_can_be_skipped_but_not_rounded_twice(folder: Any) -> None:
    skipped = {"skip_attention": frozenset({1}), "skip_mlp": frozenset({0})}
    model = quantized(folder, "int8")
    off = logits_of(self_draft_of(model, **skipped)) - logits_of(
        self_draft_of(load(folder), **skipped)
    )
    assert 1e-3 < off.abs().max() < 1.0
    assert (logits_of(self_draft_of(model, **skipped)) - logits_of(model)).abs().max() > 0.1
    with pytest.raises(ValueError, match="rounded already, by quantization='int8'"):
        self_draft_of(model, quantized=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "int4"}, "quantization must be one of int8, fp8, got 'int4'"),
        ({"dtype": torch.float64}, "dtype must be one of float32, bfloat16, float16 with quant"),
        ({"architecture": "OPTForCausalLM"}, "quantization needs one of Llama.*, got OPTFor"),
        ({"method": "fp8"}, "needs a CUDA device of compute capability 8.9 or more, got cpu"),
    ],
)
def test_what_cannot_be_quantized_is_refused(changes: dict[str, Any], words: str) -> None:
    asked = {"method": "int8", "architecture": "LlamaForCausalLM", "dtype": torch.float32}
    check_quantization(**asked, device=CPU)
    with pytest.raises(ValueError, match=words):
        check_quantization(**{**asked, **changes}, device=CPU)


def test_fp8_needs_a_card_that_has_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        check_quantization("fp8", "LlamaForCausalLM", torch.bfloat16, CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match=r"capability 8\.9 or more, and cuda:0 has 8\.6"):
        check_quantization("fp8", "LlamaForCausalLM", torch.bfloat16, CUDA)


def test_a_model_of_transformers_is_refused_before_its_weights_are_read(tmp_path: Any) -> None:
    hf.OPTConfig(architectures=["OPTForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization needs one of .*, got OPTForCausalLM"):
        load(tmp_path, quantization="int8")


def test_without_torchao_the_message_says_what_to_install(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r'pip install "folospec\[quantization\]"'):
        load(folder, quantization="int8")


def test_torchao_is_imported_only_when_asked_for(folder: Any) -> None:
    script = (
        "import sys; from folospec.models.loader import load_model\n"
        "for method in (None, 'int8'):\n"
        "    load_model(sys.argv[1], attention='torch', quantization=method)\n"
        "    print('torchao' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
