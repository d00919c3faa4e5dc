"""Checkpoints load whole, in the type asked for, or are refused with the name of what is wrong."""

from __future__ import annotations

import json
import logging
import weakref
from contextlib import ExitStack, contextmanager

import huggingface_hub
import pytest
import safetensors
import torch
from huggingface_hub import errors
from paged_runner import PagedRunner, all_logits
from safetensors.torch import load_file, save_file
from tiny_checkpoints import SHAPE, load, random_prompts, reference_logits, save_random
from transformers import AutoModelForCausalLM, LlamaConfig, OlmoConfig, Qwen2Config

from folospec.models.checkpoint import Checkpoint
from folospec.models.loader import load_tokenizer, resolve_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def llama(tmp_path):
    """A folder with a tiny Llama, and the reference."""
    return tmp_path, save_random(LlamaConfig(**SHAPE), tmp_path)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, **changes):
    """Replace tensors; None removes one."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    kept = {name: t for name, t in tensors.items() if t is not None}
    save_file(kept, path, metadata={"format": "pt"})


@contextmanager
def transformers_logs_reach(caplog):
    """Its loggers do not propagate to where `caplog` listens, and benchmarks silence them."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel("WARNING")
    yield
    logger.setLevel(level)
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (errors.LocalEntryNotFoundError, "the hub is not reached, and there is no copy in the"),
        (errors.RepositoryNotFoundError, "the hub has no such repository, or it is private"),
        (errors.GatedRepoError, "access to this repository must be asked for, on the hub"),
        (OSError, "what the hub says"),
    ],
)
def test_a_hub_id_that_gives_no_model_is_refused_with_a_short_reason(kind, reason, monkeypatch):
    def fail(*args, **options):
        raise kind.__new__(kind, "what the hub says\nand more\nthan that")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=reason) as caught:
        resolve_model("Owner/Nope")
    assert str(caught.value).startswith(
        "model 'Owner/Nope' is neither a folder, nor a bundled model (folospec-demo, "
        "folospec-demo-draft), nor a hub id that can be loaded: "
    )
    assert "than that" not in str(caught.value)
    assert "did you mean" not in str(caught.value)
    assert isinstance(caught.value.__cause__, kind)
    with pytest.raises(ValueError, match=r"; did you mean 'folospec-demo'\?$"):
        resolve_model("folospec-dmo")


@pytest.mark.parametrize("name", ["/no/such/folder", "./folder", "a b"])
def test_a_name_that_can_be_no_hub_id_is_not_looked_for(name):
    with pytest.raises(ValueError, match="loaded: a hub id is NAME or OWNER/NAME$"):
        resolve_model(name)


def test_shards_with_an_index_load_as_one_checkpoint(tmp_path):
    reference = save_random(LlamaConfig(**SHAPE), tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    (tokens,) = random_prompts(lengths=(9,))
    (logits,) = all_logits(PagedRunner(load(tmp_path)), [tokens], 9)
    torch.testing.assert_close(logits, reference_logits(reference, tokens), rtol=0, atol=1e-4)


def test_a_shard_that_the_index_names_but_is_not_there_is_named(tmp_path):
    save_random(LlamaConfig(**SHAPE), tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=gone.name):
        load(tmp_path)


class RecordingShards:
    """Stands in for `safe_open`: reads to the CPU, whatever it is asked for, and remembers it."""

    def __init__(self) -> None:
        self.plain, self.devices, self.alive, self.most_alive = safetensors.safe_open, [], [], 0

    def __call__(self, path, framework, device):
        self.devices.append(device)
        self.stack = ExitStack()
        self.shard = self.plain(path, framework)
        return self

    def __enter__(self):
        self.stack.enter_context(self.shard)
        return self

    def __exit__(self, *exception):
        return self.stack.__exit__(*exception)

    def keys(self):
        return self.shard.keys()

    def get_tensor(self, name):
        tensor = self.shard.get_tensor(name).clone()
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(tensor)]
        self.most_alive = max(self.most_alive, len(self.alive))
        return tensor


@pytest.mark.parametrize(
    ("device", "asked"), [("cpu", "cpu"), ("cuda:1", "cuda:1"), ("cuda", "cuda:3")]
)
def test_tensors_go_straight_to_their_device_one_at_a_time(tmp_path, monkeypatch, device, asked):
    save_random(LlamaConfig(**SHAPE), tmp_path, max_shard_size="20KB")
    expected = load(tmp_path).destinations()
    checkpoint = Checkpoint(tmp_path)
    shards = RecordingShards()
    monkeypatch.setattr(safetensors, "safe_open", shards)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    places = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    checkpoint.fill(places, torch.device(device), torch.zeros(4))
    assert shards.devices == [asked] * len(list(tmp_path.glob("*.safetensors")))
    assert shards.most_alive == 2  # the next is read while the last is still named
    for name, tensor in expected.items():
        torch.testing.assert_close(places[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), (torch.bfloat16, 0.3), (torch.float16, 0.03), (torch.float64, 1e-4)],
    ids=str,
)
def test_weights_and_logits_have_the_type_asked_for(llama, dtype, tolerance):
    folder, reference = llama
    model = load(folder, dtype=dtype)
    assert {tensor.dtype for tensor in model.destinations().values()} == {dtype}
    assert model.config.dtype == dtype
    (tokens,) = random_prompts(lengths=(9,))
    (logits,) = all_logits(PagedRunner(model), [tokens], 4)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference_logits(reference, tokens).to(logits.dtype)
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


def test_in_float64_chunks_do_not_matter(llama):
    model = load(llama[0], dtype="float64")
    (tokens,) = random_prompts(lengths=(23,))
    (at_once,) = all_logits(PagedRunner(model), [tokens], 64)
    (in_parts,) = all_logits(PagedRunner(model), [tokens], 1)
    torch.testing.assert_close(at_once, in_parts, rtol=0, atol=1e-12)


def test_dtype_auto_is_float32_on_a_cpu_and_an_unknown_one_is_refused(llama):
    assert load(llama[0], dtype="auto").config.dtype == torch.float32
    for wrong in ("float7", torch.int8):
        with pytest.raises(ValueError, match=str(wrong)):
            load(llama[0], dtype=wrong)


def test_a_missing_tensor_is_named(llama):
    edit_tensors(llama[0], **{UP: None})
    with pytest.raises(ValueError, match=f"lacks the tensor '{UP}'"):
        load(llama[0])


def test_a_misshapen_tensor_is_named_with_both_shapes(llama):
    edit_tensors(llama[0], **{UP: torch.zeros(48, 31)})
    with pytest.raises(ValueError, match=rf"'{UP}' .*\[48, 32\].*\[48, 31\]"):
        load(llama[0])


def test_a_tensor_that_the_config_has_not_is_named(llama):
    edit_tensors(llama[0], **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})
    with pytest.raises(ValueError, match=r"q_proj\.bias"):
        load(llama[0])


def test_an_untied_checkpoint_needs_its_lm_head(llama):
    folder = llama[0]
    edit_tensors(folder, **{"lm_head.weight": None})
    with pytest.raises(ValueError, match="lm_head"):
        load(folder)


def logits_of(model, tokens):
    return all_logits(PagedRunner(model), [tokens], 4)[0]


@pytest.mark.parametrize("config", [LlamaConfig, OlmoConfig], ids=["decoder", "transformers"])
@pytest.mark.parametrize("held", ["both, equal", "both, different", "the head alone", "neither"])
def test_a_tied_head_of_its_own_is_used_and_said_as_transformers_does(
    tmp_path, caplog, config, held
):
    save_random(config(**SHAPE, tie_word_embeddings=True), tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")[EMBEDDING]
    head = embedding.roll(1, 0) if held == "both, different" else embedding
    has_head, has_embedding = held != "neither", held.startswith("both")
    edit_tensors(
        tmp_path,
        **{HEAD: head.clone() if has_head else None},
        **{EMBEDDING: embedding if has_embedding else None},
    )
    if held == "neither":
        with pytest.raises(ValueError, match=rf"lacks the tensor '{EMBEDDING}'|missing"):
            load(tmp_path)
        return
    with caplog.at_level("WARNING"), transformers_logs_reach(caplog):
        model = load(tmp_path)
    (tokens,) = random_prompts(lengths=(9,))
    expected = reference_logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens)
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=0, atol=1e-4)
    assert ("tie" in caplog.text) == (held == "both, different")


def test_rotary_frequencies_in_a_file_are_compared_with_the_configs(llama, caplog):
    folder, name = llama[0], "model.layers.1.self_attn.rotary_emb.inv_freq"
    own = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    edit_tensors(folder, **{name: own.bfloat16()})
    load(folder)
    assert caplog.text == ""
    edit_tensors(folder, **{name: own / 4})
    load(folder)
    assert name in caplog.text


def test_tensors_that_transformers_does_not_use_are_named(tmp_path, caplog):
    save_random(OlmoConfig(**SHAPE), tmp_path)
    edit_tensors(tmp_path, **{"model.layers.0.mystery.weight": torch.zeros(3)})
    load(tmp_path)
    assert "model.layers.0.mystery.weight" in caplog.text


def test_the_spec_states_the_facts_of_the_model(tmp_path):
    save_random(Qwen2Config(**SHAPE), tmp_path)
    spec = load(tmp_path, max_model_len=99).config
    assert (spec.architecture, spec.vocab_size, spec.hidden_size) == ("Qwen2ForCausalLM", 101, 32)
    assert (spec.num_layers, spec.max_model_len) == (3, 99)
    assert spec.kv_shapes == ((2, 8),) * 3


@pytest.mark.parametrize("length", [0, 257])
def test_a_length_beyond_the_model_is_refused(llama, length):
    with pytest.raises(ValueError, match=rf"1\.\.256 .*got {length}"):
        load(llama[0], max_model_len=length)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load(tmp_path)


def test_an_unknown_architecture_is_refused(llama):
    edit_config(llama[0], model_type="nonsense", architectures=["NonsenseForCausalLM"])
    with pytest.raises(ValueError, match="nonsense"):
        load(llama[0])


def test_a_quantized_checkpoint_is_refused(llama):
    edit_config(llama[0], quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantized"):
        load(llama[0])


def test_weights_in_another_format_are_refused(llama):
    (llama[0] / "model.safetensors").rename(llama[0] / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load(llama[0])


def test_a_name_that_is_neither_folder_nor_repository_is_refused():
    with pytest.raises(ValueError, match="'no such model'"):
        resolve_model("no such model")


def test_a_folder_without_a_tokenizer_is_refused(llama):
    with pytest.raises(ValueError, match="no tokenizer"):
        load_tokenizer(str(llama[0]))
