"""The script that runs transformers' causal classes tells right from wrong; a sample of them."""

from __future__ import annotations

import re

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.engine.architectures import run_class
from folospec.models import transformers_check
from folospec.models.transformers_backend import TransformersModel

RIGHT = ["internlm3", "afmoe", "gemma4_text", "bert"]
REFUSED = {
    "camembert": "on plain text its logits are not those of its own forward pass",
    "doge": "it computes with its attention mask",
    "diffllama": "attend more than once",
    "gemma4_unified": "its mask depends on more than positions",
    "bloom": "does not go through transformers' interface",
    "rwkv": "recurrent state",
    "marian": "encoder",
}


@pytest.mark.parametrize("model_type", RIGHT)
def test_a_class_that_runs_has_transformers_tokens_and_logits(tmp_path, model_type):
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type}")
    assert run_class(model_type, tmp_path)["result"] == "right"


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_class_that_does_not_run_is_refused_with_the_reason(tmp_path, model_type):
    row = run_class(model_type, tmp_path)
    assert row["result"] == "refused"
    assert re.search(REFUSED[model_type], row["reason"])


def test_drafts_do_not_change_what_a_class_of_transformers_says(tmp_path):
    options = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
    row = run_class("olmo", tmp_path, speculative=options)
    assert row["result"] == "right"
    assert 0 < row["accepted"] < row["drafts"]


def shifted(plain):
    def forward(self, input_ids, metadata, kv, aux_layers=()):
        metadata.positions = metadata.positions + int(metadata.context_lens[0] > 0)
        return plain(self, input_ids, metadata, kv, aux_layers)

    return forward


def test_control_wrong_positions_are_refused_at_load_and_are_wrong_without_the_check(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(TransformersModel, "forward", shifted(TransformersModel.forward))
    row = run_class("gpt2", tmp_path)
    assert row["result"] == "refused"
    assert "earlier tokens of its sequence" in row["reason"]
    monkeypatch.setattr(transformers_check.Comparison, "check", lambda *_: None)
    assert run_class("gpt2", tmp_path)["result"] == "wrong"
