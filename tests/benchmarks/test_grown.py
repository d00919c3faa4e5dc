"""The grown model computes what the demo computes, with nothing in it that an engine could skip."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.lib.prompts import held_out_prompts
from benchmarks.models import grown
from benchmarks.models.growth import Plan, Shape, halves, shares
from folospec import LLM, SamplingParams
from folospec.models.checkpoint import read_tensors
from folospec.models.loader import load_tokenizer, resolve_model

SMALL = Shape(hidden=512, layers=8, heads=16, kv_heads=4, inner=1500)
"""Every rule of growth at once: 8 copies of a head in larger groups, 2 or 3 of a neuron, 2 added
layers."""
ROUNDING = 1e-12
"""Of logits of up to 20, relative to them, in float64."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("grown")
    grown.write_grown(place, SMALL, "bfloat16")
    return place


@pytest.fixture(scope="module")
def texts():
    return held_out_prompts(load_tokenizer("folospec-demo"), 3)


@pytest.fixture(scope="module", autouse=True)
def norms_in_float64():
    """transformers takes the norms in float32, whatever the model's type."""

    def forward(self, stream):
        mean_square = stream.square().mean(-1, keepdim=True)
        return self.weight * stream * torch.rsqrt(mean_square + self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", forward)
        yield


def load(place):
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64).eval()


@torch.inference_mode()
def logits_of(model, texts):
    return [model(torch.tensor([ids])).logits[0] for ids in texts]


@pytest.fixture(scope="module")
def expected(texts, norms_in_float64):
    """The demo's logits."""
    return logits_of(load(resolve_model("folospec-demo")), texts)


def difference(model, texts, expected):
    """Largest difference of the logits to the demo's, over the largest logit."""
    pairs = zip(expected, logits_of(model, texts), strict=True)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def test_the_function_is_the_demos(folder, texts, expected):
    model = load(folder)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (512, 8)
    assert difference(model, texts, expected) < ROUNDING


def mismatched_duplicate(model):
    model.model.layers[added()].mlp.down_proj.weight[:, 0].neg_()


def unequal_duplicate(model):
    model.model.layers[added()].self_attn.q_proj.weight[:64].neg_()


def share_lost(model):
    model.model.layers[0].mlp.down_proj.weight[:, -1].mul_(0.5)


def copy_lost(model):
    model.model.layers[0].self_attn.o_proj.weight[-1].zero_()


@pytest.mark.parametrize("harm", [mismatched_duplicate, unequal_duplicate, share_lost, copy_lost])
def test_control_one_broken_rule_changes_the_function(folder, texts, expected, harm):
    model = load(folder)
    with torch.no_grad():
        harm(model)
    assert difference(model, texts, expected) > 100 * ROUNDING


def added():
    """An added layer between the demo's: what is wrong in it reaches the logits."""
    layers = Plan.of(demo_config(), SMALL).layers
    return next(index for index in range(layers[-1]) if index not in layers)


def demo_config():
    return json.loads((resolve_model("folospec-demo") / "config.json").read_text())


def test_folospec_generates_the_demos_tokens_from_it(folder, texts):
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    requests = [{"prompt_token_ids": ids} for ids in texts]
    outputs = [
        [o.outputs[0].token_ids for o in LLM(str(name)).generate(requests, params, use_tqdm=False)]
        for name in ("folospec-demo", folder)
    ]
    assert outputs[0] == outputs[1]


def test_no_weight_is_zero_or_denormal_and_no_two_added_layers_are_alike(folder):
    demo_zeros = {name for name, weight in demo_tensors().items() if not weight.all()}
    assert demo_zeros <= {"model.embed_tokens.weight"}
    tensors = dict(read_tensors(folder))
    for name, weight in tensors.items():
        if name not in demo_zeros:
            assert weight.abs().min() >= torch.finfo(torch.bfloat16).tiny, name
    layers = Plan.of(demo_config(), SMALL).layers
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(8) if i not in layers]
    assert len(names) == 2
    assert not torch.equal(*(tensors[name] for name in names))


def demo_tensors():
    return dict(read_tensors(resolve_model("folospec-demo")))


def test_float32_and_bfloat16_are_one_model(folder, tmp_path):
    grown.write_grown(tmp_path, SMALL, "float32")
    narrow, wide = (dict(read_tensors(place)) for place in (folder, tmp_path))
    assert narrow.keys() == wide.keys()
    assert {weight.dtype for weight in wide.values()} == {torch.float32}
    assert all(torch.equal(weight.float(), wide[name]) for name, weight in narrow.items())


def test_old_and_new_readers_find_the_same_facts(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "def f(x):\n    return x"
    ids = [load_tokenizer(str(name))(text)["input_ids"] for name in (folder, "folospec-demo")]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("count", range(1, 20))
def test_shares_are_powers_of_two_that_sum_to_1(count):
    found = halves(count)
    assert len(found) == count
    assert sum(found) == 1.0
    assert max(found) <= 2 * min(found)
    assert all((1 / share).is_integer() and int(1 / share).bit_count() == 1 for share in found)


def test_every_source_gets_its_own_shares():
    assert shares(torch.tensor([0, 1, 0, 0])).tolist() == [0.25, 1.0, 0.25, 0.5]


@pytest.mark.parametrize(
    "change",
    [{"hidden": 768}, {"heads": 12}, {"kv_heads": 3}, {"inner": 702}, {"layers": 5}],
    ids=lambda change: next(iter(change)),
)
def test_a_shape_that_the_demo_cannot_grow_to_is_refused(change):
    sizes = {name: getattr(SMALL, name) for name in SMALL.__slots__}
    with pytest.raises(ValueError, match=f"{next(iter(change.values()))}"):
        Plan.of(demo_config(), Shape(**{**sizes, **change}))
