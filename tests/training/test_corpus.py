"""What is held out stays out, text survives tokenization, and batches can be repeated."""

import corpus
import numpy as np
import pytest
import torch
import train


@pytest.mark.parametrize(
    "name",
    ["heapq.py", "json/decoder.py", "test/test_heapq.py", "test/test_json/a.py"],
)
def test_a_held_out_module_is_held_out_with_its_package_and_tests(name):
    assert corpus.split(name) == "held_out"


@pytest.mark.parametrize("name", ["copyreg.py", "asyncio/queues.py", "test/test_cmd_line.py"])
def test_a_module_that_only_resembles_a_held_out_name_is_trained_on(name):
    assert corpus.split(name) == "train"


def test_no_held_out_text_is_trained_on_under_another_name(documents):
    sides = {"train": set(), "held_out": set()}
    for name, text in documents.items():
        sides[corpus.split(name)].add(text.strip())
    assert len(sides["held_out"]) >= len(corpus.HELD_OUT)
    assert not sides["train"] & sides["held_out"]


def test_every_held_out_name_is_a_module_of_the_library(documents):
    stems = {name.split("/")[0].removesuffix(".py") for name in documents}
    assert stems >= corpus.HELD_OUT


def test_the_held_out_stream_is_the_held_out_documents_in_order(tmp_path, monkeypatch):
    texts = {"a.py": "x = 1\n" * 50, "heapq.py": "held = 'out'\n" * 50, "test/test_heapq.py": "t\n"}
    monkeypatch.setattr(corpus, "documents", lambda: iter(texts.items()))
    tokenizer, streams, num_bytes = corpus.prepare(tmp_path)
    end = corpus.END_OF_TEXT
    text = tokenizer.decode(streams["held_out"].tolist(), skip_special_tokens=False)
    assert text == texts["heapq.py"] + end + texts["test/test_heapq.py"] + end
    assert num_bytes == {"train": 300, "held_out": 13 * 50 + 2}
    again = corpus.prepare(tmp_path)[1]
    assert all(np.array_equal(streams[side], again[side]) for side in streams)


def test_the_tokenizer_round_trips_held_out_text_exactly(documents, tokenizer):
    texts = [text for name, text in documents.items() if corpus.split(name) == "held_out"]
    texts.append("caf\u00e9 \U0001f600\t\r\n  \x00 \u200b")
    encodings = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(e.ids, skip_special_tokens=False) for e in encodings] == texts


def test_batches_are_a_function_of_the_step_alone():
    stream = np.arange(50_000).astype(np.uint16)
    device = torch.device("cpu")
    first = train.batch_of(stream, 7, 256, device)
    torch.manual_seed(1)
    np.random.default_rng(1).random(10)
    other = train.batch_of(stream, 8, 256, device)
    assert first.shape == (train.BATCH_TOKENS // 256, 257)
    assert torch.equal(first, train.batch_of(stream, 7, 256, device))
    assert not torch.equal(first, other)
    assert torch.equal(first[:, 1:], first[:, :-1] + 1)  # each row is one stretch of the stream
