"""The training scripts are no package: their folder goes on the path, as when one is run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))


@pytest.fixture(scope="session")
def documents():
    import corpus

    return dict(corpus.documents())


@pytest.fixture(scope="session")
def tokenizer(documents):
    """A tokenizer made as the demo models' was, from a part of their text."""
    import corpus

    train = [text for name, text in documents.items() if corpus.split(name) == "train"]
    return corpus.train_tokenizer(iter(train[:60]))
