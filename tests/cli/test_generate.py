import json

import pytest

from folospec import LLM, SamplingParams
from folospec.cli.generate import GenerateOptions, read_speculative
from folospec.speculative_config import SpeculativeConfig

PROMPT = "w1 w2 w3 w4 w5"


def completions(target, prompts, **params):
    outputs = LLM(target).generate(prompts, SamplingParams(**params), use_tqdm=False)
    return [completion.text for output in outputs for completion in output.outputs]


def test_stdout_has_the_completion_and_stderr_the_counts(folospec, target):
    result = folospec("generate", PROMPT, "--model", target, "--max-tokens", "9")
    [expected] = completions(target, PROMPT, temperature=0, max_tokens=9)
    assert result.exit_code == 0
    assert result.stdout == expected + "\n"
    assert "9 tokens in" in result.stderr
    assert "9 target passes" in result.stderr


@pytest.mark.parametrize("speculative", ["ngram", "draft_model"])
def test_speculation_prints_the_same_text_in_fewer_passes(folospec, target, draft, speculative):
    speculative = {
        "ngram": '{"method": "ngram", "prompt_lookup_min": 1}',
        "draft_model": f"draft_model:{draft}",
    }[speculative]
    sampling = ("--temperature", "0.7", "--seed", "3", "--max-tokens", "48")
    plain = folospec("generate", PROMPT, "--model", target, "--json", *sampling)
    result = folospec(
        "generate", PROMPT, "--model", target, "--json", *sampling, "--speculative", speculative
    )
    one, other = json.loads(plain.stdout), json.loads(result.stdout)
    assert one["outputs"] == other["outputs"]
    assert one["metrics"]["num_drafts"] == 0 < other["metrics"]["num_accepted_tokens"]
    assert other["metrics"]["num_target_passes"] < one["metrics"]["num_target_passes"] == 48


def test_argument_file_and_stdin_are_the_same_prompt(folospec, target, tmp_path):
    options = ("--model", target, "--max-tokens", "7")
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    argument = folospec("generate", PROMPT, *options)
    assert folospec("generate", "--file", file, *options).stdout == argument.stdout
    assert folospec("generate", *options, input=PROMPT + "\n").stdout == argument.stdout
    assert folospec("generate", "--file", "-", *options, input=PROMPT).stdout == argument.stdout
    other = folospec("generate", *options, input="w9 " + PROMPT)
    assert other.stdout != argument.stdout


def test_many_prompts_come_in_order_under_their_titles(folospec, target, tmp_path):
    prompts = ["w1 w2", "w7", "w9 w9 w9"]
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"{prompts[1]}"\n\n{{"prompt": "{prompts[2]}"}}\n')
    result = folospec(
        "generate", prompts[0], "--file", file, "--model", target, "--max-tokens", "5"
    )
    lines = result.stdout.splitlines()
    assert [line.split(" ─")[0] for line in lines[::2]] == [
        f"{i}: {prompt}" for i, prompt in enumerate(prompts, start=1)
    ]
    assert lines[1::2] == completions(target, prompts, temperature=0, max_tokens=5)


def test_sampling_options_reach_the_engine(folospec, target):
    given = ("-n", "2", "--temperature", "0.9", "--top-p", "0.8", "--top-k", "9", "--seed", "5")
    limits = ("--max-tokens", "20", "--stop", "w63")
    result = folospec("generate", PROMPT, "--model", target, "--json", *given, *limits)
    sampling = {"temperature": 0.9, "top_p": 0.8, "top_k": 9, "seed": 5, "max_tokens": 20}
    expected = completions(target, PROMPT, n=2, stop="w63", **sampling)
    texts = [completion["text"] for completion in json.loads(result.stdout)["outputs"]]
    assert texts == expected
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([PROMPT, "--speculative", "nope"], "got 'nope'"),
        ([PROMPT, "--speculative", '{"method"'], "speculative is not valid JSON"),
        ([PROMPT, "--speculative", '{"model": "x"}'], "needs a 'method'"),
        (
            [PROMPT, "--speculative", '{"method": "ngram", "window": 3}'],
            "unknown option of the ngram drafter 'window'",
        ),
        ([PROMPT, "--speculative", "draft_model"], "needs the draft model's path"),
        ([PROMPT, "--speculative", "ngram", "--acceptance", "hope"], "acceptance must be one of"),
        ([PROMPT, "--acceptance", "block"], "--acceptance needs --speculative"),
        ([PROMPT, "--num-speculative-tokens", "3"], "--num-speculative-tokens needs --speculative"),
        ([PROMPT, "--compare"], "--compare needs --speculative"),
        ([PROMPT, "--rounds", "2"], "--rounds needs --compare"),
        ([PROMPT, "--model", "/no/such/folder"], "'/no/such/folder' is neither a folder"),
        (
            [PROMPT, "--model", "folospec demo"],
            "loaded: a hub id is NAME or OWNER/NAME; did you mean",
        ),
        ([PROMPT, "--dtype", "float8"], "dtype must be one of"),
        ([PROMPT, "--kv-cache-dtype", "int4"], "kv_cache_dtype must be one of"),
        ([PROMPT, "--attention-backend", "flash_attn"], "'flash_attn' cannot run here"),
        ([PROMPT, "--attention-backend", "fast"], "attention_backend must be one of auto, native"),
        ([PROMPT, "--multi-step", "4"], "multi_step must be None or 1 where no CUDA graphs run"),
        ([PROMPT, "--block-size", "0"], "block_size must be an integer of at least 1"),
        ([PROMPT, "--gpu-memory-utilization", "2"], "gpu_memory_utilization must be a share"),
        ([PROMPT, "--quantization", "int4"], "quantization must be None, int8 or fp8"),
        ([PROMPT, "--device", "toaster"], "'toaster'"),
        ([PROMPT, "--temperature", "-1"], "temperature must be"),
        ([PROMPT, "-n", "2"], "1 at temperature 0"),
        ([PROMPT, "--max-tokens", "0"], "max_tokens must be"),
        (["--file", "/no/such/file"], "--file /no/such/file: No such file"),
        ([""], "the prompt is empty"),
        ([], "the prompt is empty"),
        (["w1 " * 8192], "the prompt has 8192 tokens"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(folospec, target, arguments, words):
    model = [] if "--model" in arguments else ["--model", target]
    result = folospec("generate", *arguments, *model)
    assert (result.exit_code, result.stdout) == (2, "")
    assert isinstance(result.exception, SystemExit)
    [line] = result.stderr.splitlines()
    assert line.startswith("folospec: ")
    assert words in line


def test_a_file_that_is_not_text_is_refused(folospec, target, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xff\xfe\xff")
    result = folospec("generate", "--file", file, "--model", target)
    assert result.exit_code == 2
    assert "not UTF-8" in result.stderr


def test_a_defect_keeps_its_traceback(folospec, target, monkeypatch):
    def step(self, **options):
        raise ValueError("a defect")

    monkeypatch.setattr("folospec.engine.llm_engine.LLMEngine.step", step)
    result = folospec("generate", PROMPT, "--model", target)
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)


def read(text, num_speculative_tokens=None, acceptance=None):
    return read_speculative(
        text,
        num_speculative_tokens=num_speculative_tokens,
        acceptance=acceptance,
    )


def test_speculative_is_a_name_a_name_with_a_model_or_json():
    assert read(None) is None
    of = SpeculativeConfig.of
    assert read("ngram") == of("ngram")
    small = {"method": "draft_model", "model": "C:\\small"}
    assert read("draft_model:C:\\small") == of(small)
    assert read("ngram,draft_model:C:\\small") == of(["ngram", small])
    assert read('{"method": "ngram", "prompt_lookup_max": 3}') == of(
        {"method": "ngram", "options": {"prompt_lookup_max": 3}}
    )
    assert read('["ngram"]') == of(["ngram"])


def test_options_stand_above_json():
    config = read('{"method": "ngram", "num_speculative_tokens": 2}', 4, "block")
    assert (config.drafters[0].num_speculative_tokens, config.acceptance) == (4, "block")


def test_a_prediction_comes_from_a_file(folospec, tmp_path):
    expected = tmp_path / "expected.txt"
    expected.write_text("\nimport sys\nimport re\n")
    arguments = ("generate", "import os", "--max-tokens", "8")
    result = folospec(*arguments, "--speculative", "prediction", "--prediction", str(expected))
    assert result.exit_code == 0, result.stderr
    plain = folospec(*arguments)
    assert result.stdout == plain.stdout
    assert "acceptance length" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--speculative", "prediction"), "needs --prediction FILE"),
        (("--speculative", "ngram", "--prediction", "{file}"), "needs a drafter that reads it"),
        (("--speculative", "prediction", "--prediction", "nowhere.txt"), "cannot read nowhere.txt"),
    ],
)
def test_a_prediction_without_a_reader_and_a_reader_without_one_are_refused(
    folospec, options, message, tmp_path
):
    file = tmp_path / "expected.txt"
    file.write_text("x = 1\n")
    result = folospec("generate", "x =", *(o.format(file=file) for o in options))
    assert result.exit_code == 2
    assert message in result.stderr


def test_what_a_file_of_results_depends_on_leaves_out_what_changes_no_token():
    sampling = {"temperature": 0.5}
    plain = GenerateOptions(sampling=sampling).settings
    drafter = SpeculativeConfig.of("prediction")
    drafted = GenerateOptions(sampling={**sampling, "prediction": "text"}, speculative=drafter)
    assert drafted.settings == plain
    assert plain["temperature"] == 0.5
    for other in (GenerateOptions(sampling={"top_k": 5}), GenerateOptions(seed=1)):
        assert other.settings != plain
    ratio = SpeculativeConfig.of({"method": "ngram", "acceptance": "rejection"})
    assert GenerateOptions(sampling=sampling, speculative=ratio).settings != plain
