"""The models in the package are those that training/results.json and the model cards describe."""

import hashlib
import json
from pathlib import Path

import corpus
import model_card
import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "folospec" / "demo_models"


@pytest.fixture(scope="module")
def results():
    return json.loads((ROOT / "training" / "results.json").read_text())


@pytest.mark.parametrize(("key", "name"), model_card.NAMES.items())
def test_the_bundled_weights_and_card_are_the_measured_ones(results, key, name):
    weights = (BUNDLED / name / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == results["models"][name]["weights_sha256"]
    assert (BUNDLED / name / "README.md").read_text() == model_card.card(results, key)


def test_everything_bundled_stays_under_45_mb():
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 45e6


def test_the_bundled_tokenizers_are_equal_and_round_trip_held_out_text(documents):
    folders = [BUNDLED / name for name in model_card.NAMES.values()]
    assert len({(folder / "tokenizer.json").read_bytes() for folder in folders}) == 1
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    for name, text in documents.items():
        if corpus.split(name) == "held_out":
            assert tokenizer.decode(tokenizer(text, verbose=False).input_ids) == text, name
