"""Judging by Triton's kernels gives the tokens that are drawn without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from harness import (  # noqa: E402
    PROMPTS,
    OracleTreeDrafter,
    assert_speculated,
    futures_of,
    make_llm,
    mixed_params,
    run,
)

from folospec import SamplingParams  # noqa: E402
from folospec.kernels import native_sampling  # noqa: E402
from folospec.kernels.gpu.sampling import DeviceSampling  # noqa: E402
from folospec.spec import verify_batch  # noqa: E402
from folospec.spec.trees import drawing

NEG_INF = float("-inf")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid|divide):RuntimeWarning"),
]


FEW = (1, 2, 5)
"""Of the mixed requests: filters, siblings, and constraints. Interpreting takes long."""


def few(indices: tuple[int, ...] = FEW) -> dict[str, Any]:
    params = mixed_params(5)
    return {
        "prompts": [PROMPTS[index] for index in indices],
        "params": [params[index] for index in indices],
    }


def run_on_device(
    monkeypatch: pytest.MonkeyPatch, model: str, **settings: Any
) -> tuple[Any, dict[str, int]]:
    """A run whose sampling is interpreted Triton, and how often each of its doors was used."""
    asked = {name: settings.pop(name) for name in ("prompts", "params")}
    calls = dict.fromkeys(("draw_and_verify", "distribution", "draw"), 0)

    def counted(owner: Any, name: str, door: str) -> None:
        plain = getattr(owner, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            calls[door] += 1
            return plain(*args, **kwargs)

        patch.setattr(owner, name, count)

    with monkeypatch.context() as patch:
        patch.setenv("FOLOSPEC_KERNELS", "triton")
        patch.setattr(native_sampling, "load", lambda: None)
        patch.setattr(drawing, "load", lambda: None)
        counted(DeviceSampling, "draw_and_verify", "draw_and_verify")
        counted(verify_batch, "_verify_on_device", "distribution")
        counted(DeviceSampling, "draw", "draw")
        return run(make_llm(model, dtype="float32", **settings), **asked), calls


def run_on_host(model: str, **settings: Any) -> Any:
    asked = {name: settings.pop(name) for name in ("prompts", "params")}
    return run(make_llm(model, dtype="float32", **settings), **asked)


def test_plain_tokens_are_the_same(monkeypatch: pytest.MonkeyPatch, models: Any) -> None:
    """Greedy and sampled, filters, penalties, bias, siblings, side by side."""
    device, calls = run_on_device(monkeypatch, models.target, **few())
    assert device.tokens == run_on_host(models.target, **few()).tokens
    assert calls["draw_and_verify"] > 3
    assert calls["distribution"] == 0


def test_the_distribution_that_is_asked_for_is_the_one_that_was_drawn_from(
    monkeypatch: pytest.MonkeyPatch, models: Any
) -> None:
    settings = {
        "prompts": PROMPTS[:2],
        "params": SamplingParams(temperature=0.7, top_k=5, seed=3, logprobs=3, max_tokens=4),
        "logprobs_mode": "processed_logprobs",
    }
    device, calls = run_on_device(monkeypatch, models.target, **settings)
    host = run_on_host(models.target, **settings)
    assert device.tokens == host.tokens
    assert device.logprobs == pytest.approx(host.logprobs, rel=1e-5)
    assert calls["distribution"] > 3


def test_tokens_of_trees_are_the_same(monkeypatch: pytest.MonkeyPatch, models: Any) -> None:
    plain = run_on_host(models.target, **few())
    monkeypatch.setattr(OracleTreeDrafter, "futures", futures_of(plain))
    speculative = {"method": "oracle_tree", "num_speculative_tokens": 6}
    device, calls = run_on_device(monkeypatch, models.target, speculative=speculative, **few())
    assert device.tokens == plain.tokens
    assert calls["draw_and_verify"] > 0
    assert_speculated(device.stats, moved=True)


@pytest.mark.parametrize(
    ("acceptance", "indices"), [("coupled", FEW[:2]), ("rejection", FEW[:2]), ("block", FEW[1:])]
)
def test_every_rule_verifies_as_on_the_host(
    monkeypatch: pytest.MonkeyPatch, models: Any, acceptance: str, indices: tuple[int, ...]
) -> None:
    settings = {
        **few(indices),
        "speculative": {
            "method": "draft_model",
            "model": models.near,
            "num_speculative_tokens": 3,
            "acceptance": acceptance,
        },
    }
    device, calls = run_on_device(monkeypatch, models.target, **settings)
    host = run_on_host(models.target, **settings)
    assert device.tokens == host.tokens
    assert_speculated(device.stats)
    assert calls["draw_and_verify" if acceptance == "coupled" else "distribution"] > 0
    if acceptance == "coupled":
        assert calls["draw"] > 0


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
def test_a_request_without_a_token_ends_alone(
    monkeypatch: pytest.MonkeyPatch, models: Any, acceptance: str
) -> None:
    def nothing_third(output_token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, NEG_INF) if len(output_token_ids) == 2 else logits

    asked = few((0, 1, 4))
    asked["params"][2] = SamplingParams(
        temperature=0, max_tokens=4, logits_processors=[nothing_third]
    )
    settings = {**asked, "speculative": {"method": "ngram", "acceptance": acceptance}}
    device, calls = run_on_device(monkeypatch, models.target, **settings)
    host = run_on_host(models.target, **settings)
    assert device.tokens == host.tokens
    failed = device.outputs[2].outputs[0]
    assert failed.finish_reason == "error"
    assert len(failed.token_ids) == 2
    assert failed.error == host.outputs[2].outputs[0].error
    assert calls["draw_and_verify" if acceptance == "coupled" else "distribution"] > 0


def test_another_draw_would_be_seen(monkeypatch: pytest.MonkeyPatch, models: Any) -> None:
    plain = DeviceSampling.run_verify

    def shifted(self: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        plain(self, logits.roll(1, -1), *args, **kwargs)

    monkeypatch.setattr(DeviceSampling, "run_verify", shifted)
    device, _ = run_on_device(monkeypatch, models.target, **few((1,)))
    assert device.tokens != run_on_host(models.target, **few((1,))).tokens
