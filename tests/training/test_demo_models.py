"""From a checkpoint of training to models that transformers loads, measured and described."""

import json
from types import SimpleNamespace

import corpus
import evaluate
import export
import model_card
import numpy as np
import pytest
import torch
import train
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    """Untrained models, saved as training saves them and exported: (models, folder)."""
    folder = tmp_path_factory.mktemp("demo")
    models = train.make_models()
    torch.save({"models": models.state_dict(), "step": 3, "seconds": 6.0}, folder / "checkpoint.pt")
    tokenizer.save(str(folder / "tokenizer.json"))
    export.export(folder / "checkpoint.pt", folder / "tokenizer.json", folder / "models")
    return models, folder


def load(folder, key):
    path = folder / "models" / export.NAMES[key]
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("key", ["target", "draft"])
def test_an_exported_model_loads_with_the_weights_that_were_trained(exported, key):
    models, folder = exported
    loaded = load(folder, key)
    trained = models[key].state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trained[name].to(torch.bfloat16).float()), name
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == 0
    assert loaded.config.bos_token_id is None
    assert getattr(loaded.config, "early_exit_layer", None) == (3 if key == "target" else None)


def test_the_stream_after_the_last_layer_gives_the_logits_of_transformers(exported):
    model = load(exported[1], "target")
    token_ids = torch.arange(1, 41)[None]
    with torch.inference_mode():
        states = train.hidden_states(model, token_ids)
        expected = model(token_ids).logits[0]
        assert torch.allclose(train.logits_of(model, states[-1]), expected, atol=1e-4)
        assert not torch.allclose(train.logits_of(model, states[-2]), expected, atol=1e-2)


def test_the_exported_tokenizer_adds_nothing_and_ends_documents(exported, documents):
    tokenizer = AutoTokenizer.from_pretrained(exported[1] / "models" / export.NAMES["draft"])
    text = documents["heapq.py"]
    token_ids = tokenizer(text, verbose=False).input_ids
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token == corpus.END_OF_TEXT
    assert tokenizer.eos_token_id not in token_ids
    assert evaluate.token_bytes(tokenizer)[token_ids].sum() == len(text.encode())
    messages = [{"role": "user", "content": "add\ntwo"}, {"role": "assistant", "content": "a + b"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "# add\n# two\na + b\n"


def test_a_tokenizer_with_another_end_token_is_refused(exported, tmp_path):
    folder = exported[1]
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"][0]["content"] = "<|other|>"
    spec["model"]["vocab"]["<|other|>"] = spec["model"]["vocab"].pop(corpus.END_OF_TEXT)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="endoftext"):
        export.export(folder / "checkpoint.pt", tmp_path / "tokenizer.json", tmp_path)


def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary():
    models = train.make_models()
    with torch.no_grad():
        for parameter in models.parameters():
            parameter.zero_()
    stream = np.arange(1, 1301).astype(np.uint16)
    num_bytes = np.full(corpus.VOCAB_SIZE, 2)
    scores = evaluate.held_out_scores(models, stream, num_bytes)
    assert scores["tokens"] == 1299
    assert scores["bytes"] == 2 * 1299
    assert scores["bits_per_byte"] == dict.fromkeys(("target", "exit", "draft"), 12 / 2)
    assert scores["greedy_agreement_with_target"] == {"exit": 1.0, "draft": 1.0}


def test_a_model_agrees_with_itself_and_an_unrelated_one_does_not(exported):
    models = {key: load(exported[1], key) for key in export.NAMES}
    stream = np.random.default_rng(0).integers(0, corpus.VOCAB_SIZE, 600).astype(np.uint16)
    same = {"target": models["draft"], "draft": models["draft"]}
    assert evaluate.chain_agreement(same, stream, 8)["agreement_per_position"] == [1.0] * 5
    other = evaluate.chain_agreement(models, stream, 8)
    assert other["agreement_per_position"][0] < 0.5
    assert other["tried_per_position"][1:] == other["equal_per_position"][:-1]


def test_a_completion_ends_where_its_function_ends():
    before, head = evaluate.function_prompt('import a\n\n\ndef f(x):\n    """Do."""\n    y\n', "f")
    assert (before, head) == ("import a\n\n\n", 'def f(x):\n    """Do."""')
    assert evaluate.body_of("\n    return x\n\n\ndef g():\n    pass") == "\n    return x\n"
    with pytest.raises(ValueError, match="'missing'"):
        evaluate.function_prompt("x = 1\n", "missing")


def test_a_model_card_is_made_of_what_was_measured(exported, documents, tmp_path, monkeypatch):
    few = {module: documents[module] for module, _ in evaluate.COMPLETED} | {"a.py": "x = 1\n" * 9}
    monkeypatch.setattr(corpus, "documents", lambda: iter(few.items()))
    monkeypatch.setattr(evaluate, "COMPLETION_TOKENS", 8)
    _, folder = exported
    args = {"models": folder / "models", "work": folder, "device": "cpu"}
    args.update(max_tokens=700, positions=2, results=tmp_path / "results.json")
    results = evaluate.evaluate(SimpleNamespace(**args))
    model_card.write_cards(results, folder / "models")
    card = (folder / "models" / export.NAMES["target"] / "README.md").read_text()
    assert f"| {results['held_out']['bits_per_byte']['draft']:.3f} |" in card
    assert f"3 steps of {train.BATCH_TOKENS:,} tokens" in card
    assert "def shorten(text, width, **kwargs):" in card
    results["held_out"]["bits_per_byte"]["draft"] = 123.456
    assert "| 123.456 |" in model_card.card(results, "target")
