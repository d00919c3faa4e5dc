"""The throughput benchmark, small: what is claimed in its rows holds, and a lie would show."""

import json

import pytest

from benchmarks.engine import throughput
from benchmarks.lib import contestants, prompts
from folospec.models.loader import load_tokenizer

MAX_TOKENS = 8
EVERYONE = [
    "folospec plain",
    "folospec ngram",
    "folospec draft_model",
    "transformers generate",
    "transformers generate_batch",
    "transformers assistant_model",
    "transformers prompt_lookup",
]
PROVENANCE = {"command", "git_commit", "cpu", "cores", "torch_threads", "torch", "transformers"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("throughput") / "rows.jsonl"
    options = ["--rounds", "1", "--batches", "1", "--max-tokens", str(MAX_TOKENS)]
    returned = throughput.main([*options, "--out", str(out)])
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written == json.loads(json.dumps(returned))
    return {row["contestant"]: row for row in written}


def test_every_contestant_runs_at_batch_1_and_none_fails(rows):
    assert list(rows) == EVERYONE
    assert not [row["error"] for row in rows.values() if "error" in row]


def test_a_row_says_where_and_how_it_was_measured(rows):
    for row in rows.values():
        assert row["provenance"].keys() >= PROVENANCE
        assert row.keys() >= {"model", "dtype", "batch", "settings", "max_tokens", "seconds"}
    assert rows["folospec draft_model"]["settings"]["speculative"]["num_speculative_tokens"] == 5


def test_rate_and_ratios_follow_from_the_seconds(rows):
    plain, generate = rows["folospec plain"], rows["transformers generate"]
    (seconds,), (baseline,) = plain["seconds"], generate["seconds"]
    num_tokens = plain["num_prompts"] * MAX_TOKENS
    assert plain["tokens_per_second"] == pytest.approx(num_tokens / seconds)
    assert plain["ratio_to_transformers_generate"] == pytest.approx(baseline / seconds)
    assert plain["ratio_to_folospec_plain"] == 1.0


def test_speculation_drafts_takes_fewer_passes_and_changes_no_token(rows):
    plain, drafted = rows["folospec plain"], rows["folospec draft_model"]
    assert drafted["acceptance_length"] > 1.0
    assert drafted["target_passes_per_round"] < plain["target_passes_per_round"]
    assert drafted["tokens_equal_to_plain"]
    assert drafted["first_differences"] == []


def test_the_parts_of_a_step_add_up_to_its_time(rows):
    plain = rows["folospec plain"]
    parts = plain["milliseconds_per_step"]
    steps = plain["num_prompts"] * MAX_TOKENS
    assert sum(parts.values()) * steps == pytest.approx(1000 * sum(plain["seconds"]))
    assert min(parts.values()) >= 0


class Scripted(contestants.Contestant):
    """Answers in no time with the tokens it was given, or raises."""

    def __init__(self, name, token_ids, error=None):
        self.name, self.settings = name, {}
        self.token_ids, self.error = token_ids, error

    def generate(self, batch, max_tokens):
        if self.error is not None:
            raise self.error
        return contestants.Run(1.0, [self.token_ids[:max_tokens] for _ in batch])


def test_control_another_token_is_reported_with_its_place():
    honest, adversary = Scripted("folospec plain", [1, 2, 3]), Scripted("adversary", [1, 9, 3])
    row = throughput.measure([honest, adversary], [[5], [6]], batch=2, rounds=1, max_tokens=3)[1]
    assert not row["tokens_equal_to_plain"]
    assert row["num_differing_prompts"] == 2
    assert row["first_differences"][0] == {"prompt": 0, "position": 1}


def test_control_too_few_tokens_are_an_error():
    honest, lazy = Scripted("folospec plain", [1, 2, 3]), Scripted("lazy", [1, 2])
    row = throughput.measure([honest, lazy], [[5]], batch=1, rounds=1, max_tokens=3)[1]
    assert "1 prompts x 3 tokens became [2]" in row["error"]


def test_who_fails_is_reported_and_the_others_go_on():
    honest = Scripted("folospec plain", [1, 2])
    broken = Scripted("broken", [], MemoryError("too large"))
    rows = throughput.measure([broken, honest], [[5]], batch=1, rounds=2, max_tokens=2)
    assert rows[0]["error"] == "MemoryError: too large"
    assert "seconds" not in rows[0]
    assert len(rows[1]["seconds"]) == 2
    assert throughput.rate_table(rows).row_count == 2


def test_prompts_are_ragged_and_the_first_ones_do_not_depend_on_their_number():
    tokenizer = load_tokenizer("folospec-demo")
    many, few = prompts.held_out_prompts(tokenizer, 10), prompts.held_out_prompts(tokenizer, 3)
    assert many[:3] == few
    assert [len(ids) for ids in many] == [*prompts.LENGTHS, *prompts.LENGTHS]
    assert len({tuple(ids) for ids in many}) == 10


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--batches", "1,0"], ["--dtype", "int8"]])
def test_bad_arguments_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        throughput.parse_arguments(options)
    assert options[0] in capsys.readouterr().err
