"""The contest with the peers, with workers that only pretend: order, errors, rows and ratios."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.lib.limits import Machine, Work
from benchmarks.lib.prompts import held_out_prompts
from benchmarks.peers import checkpoints, compare, plots, table
from benchmarks.peers import contestants as contestants_module
from benchmarks.peers.contest import Cell, Entry, Group
from benchmarks.peers.contestants import Contestant, Setup, groups, make_contestants
from benchmarks.peers.kinds import PEER_KINDS
from benchmarks.peers.process import WorkerError
from benchmarks.peers.prompts import make_rounds
from benchmarks.peers.rows import agreement, make_rows, past_end
from benchmarks.peers.surprise import excess_surprise
from benchmarks.peers.venvs import environment_of
from folospec import LLM, SamplingParams
from folospec.models.loader import load_tokenizer, resolve_model

CELL = Cell("completion", 0.0, 2)
PLAIN = Contestant("folospec plain", "folospec", "llm")
VLLM = Contestant("vllm plain", "vllm", "plain")
LOOKUP = Contestant("vllm lookup k=4", "vllm", "lookup", {"num_speculative_tokens": 4})
GENERATE = Contestant("transformers plain", "transformers", "plain")
ASSISTED = Contestant("transformers draft_model k=4", "transformers", "draft_model")
MACHINE = Machine(100.0, {"float32": 1000.0})
WORK = Work(layer_weights=80, output_weights=20, kv_entries=2, attention_operations=4)
SETUP = Setup("demo", "float32", threads=2, max_batch=2, max_len=64, timeout=1.0)
ROUNDS = [[[r, 0], [r, 1], [r, 2], [r, 3]] for r in range(4)]


class Pretender:
    """A worker that answers in no time, unless its script says otherwise."""

    def __init__(self, name, journal, script):
        self.name, self.journal, self.script = name, journal, script
        self.is_running = self.is_closed = False

    def start(self, load):
        self.journal.append((self.name, "load"))
        if self.script == "unloadable":
            raise WorkerError("too large")
        self.is_running = True
        return {"versions": {self.name: "1"}}

    def ask(self, command):
        if command["command"] == "reset":
            self.journal.append((self.name, "reset"))
            return {}
        self.journal.append((self.name, command["mode"], command["prompts"], command["max_tokens"]))
        if self.script == command["mode"]:
            self.is_running = False
            raise WorkerError("no answer in 1 seconds")
        tokens = [[7] * command["max_tokens"] for _ in command["prompts"]]
        return {"seconds": 1.0, "token_ids": tokens, "details": {}}

    def memory_bytes(self):
        return 1

    def close(self):
        self.is_closed = True


def make_group(contestants, journal, scripts=None, workers=None):
    workers = {} if workers is None else workers

    def make(contestant):
        name = contestant.worker
        workers[name] = Pretender(name, journal, (scripts or {}).get(name))
        return workers[name]

    return Group(0, contestants, make, lambda contestant: {})


def turns(journal):
    return [entry[0] for entry in journal if entry[1] not in ("load", "reset")]


def test_contestants_take_turns_and_another_one_begins_each_round():
    journal = []
    with make_group([PLAIN, VLLM, LOOKUP], journal) as group:
        group.measure(CELL, ROUNDS, 16)
    a, b, c = PLAIN.name, VLLM.name, LOOKUP.name
    assert turns(journal) == [a, b, c, a, b, c, b, c, a, c, a, b]


def test_all_get_the_same_prompts_and_every_round_has_its_own():
    journal = []
    with make_group([PLAIN, VLLM], journal) as group:
        entries = group.measure(CELL, ROUNDS, 16)
    for name in (PLAIN.name, VLLM.name):
        asked = [e[2:] for e in journal if e[0] == name and e[1] not in ("load", "reset")]
        assert asked[0] == (ROUNDS[0][:2], 8)  # the warm-up: one batch, a few tokens
        assert asked[1:] == [(prompts, 16) for prompts in ROUNDS[1:]]
    assert [len(entry.seconds) for entry in entries] == [3, 3]


def test_workers_load_once_are_reset_for_every_cell_and_closed_at_the_end():
    journal, workers = [], {}
    with make_group([PLAIN, VLLM], journal, workers=workers) as group:
        for _ in range(3):
            group.measure(CELL, ROUNDS, 16)
    assert journal.count((VLLM.name, "load")) == 1
    assert journal.count((VLLM.name, "reset")) == 2
    assert all(worker.is_closed for worker in workers.values())


def interrupt(text):
    if text.startswith("completion"):
        raise KeyboardInterrupt


def test_workers_are_closed_after_an_interrupt():
    workers = {}
    group = make_group([PLAIN], [], workers=workers)
    group.note = interrupt
    with pytest.raises(KeyboardInterrupt), group:
        group.measure(CELL, ROUNDS, 16)
    assert workers[PLAIN.name].is_closed


def test_who_does_not_load_has_an_error_and_is_not_tried_again():
    journal = []
    with make_group([VLLM, PLAIN], journal, {VLLM.name: "unloadable"}) as group:
        first, second = (group.measure(CELL, ROUNDS, 16) for _ in range(2))
    assert [entry.error for entry in first] == ["WorkerError: too large", None]
    assert second[0].error == "WorkerError: too large"
    assert journal.count((VLLM.name, "load")) == 1
    assert len(second[1].seconds) == 3


def test_who_takes_too_long_is_out_and_who_shares_its_process_goes_on():
    journal = []
    contestants = [ASSISTED, GENERATE]
    one = Cell("completion", 0.0, 1)
    with make_group(contestants, journal, {"transformers": "draft_model"}) as group:
        entries = group.measure(one, ROUNDS, 16)
    assert "no answer in 1 seconds" in entries[0].error
    assert entries[1].error is None
    assert len(entries[1].seconds) == 3
    assert [e[1] for e in journal if e[1] == "draft_model"] == ["draft_model"]


def test_modes_for_one_sequence_sit_out_larger_batches():
    with make_group([GENERATE, ASSISTED], []) as group:
        names = [entry.contestant.name for entry in group.measure(CELL, ROUNDS, 16)]
    assert names == [GENERATE.name]


def entry(contestant, seconds, group=0, tokens=(1, 2), error=None):
    rounds = [[list(tokens)] * CELL.num_prompts for _ in seconds]
    return Entry(contestant, group, list(seconds), rounds, error=error)


def rows_of(*entries):
    rounds = [[[1, 2], [3, 4, 5, 6], [1, 2], [3, 4, 5, 6]] for _ in range(2)]
    made = make_rows(CELL, entries, rounds, 2, SETUP, WORK, MACHINE)
    return {row["contestant"]: row for row in made}


def test_ratios_are_medians_of_pairs_and_the_fastest_peer_is_named():
    rows = rows_of(
        entry(PLAIN, [1.0, 4.0, 3.0]),
        entry(VLLM, [2.0, 2.0, 2.0]),
        entry(LOOKUP, [0.5, 1.0, 1.0]),
    )
    assert rows[VLLM.name]["ratio_to_folospec_plain"] == 1.5  # of 0.5, 2 and 1.5
    assert rows[PLAIN.name]["fastest_peer"] == LOOKUP.name
    assert rows[PLAIN.name]["fastest_plain_peer"] == VLLM.name
    assert rows[PLAIN.name]["ratio_to_fastest_peer"] == pytest.approx(1 / 3)  # 0.5, 0.25 and 1/3
    assert rows[VLLM.name]["tokens_per_second"] == 4 * 2 / 2.0


def test_ratios_between_groups_go_by_way_of_the_anchor():
    """The machine is half as fast while the second group runs."""
    rows = rows_of(
        entry(PLAIN, [1.0, 1.0]),
        entry(VLLM, [0.5, 0.5]),
        entry(PLAIN, [2.0, 2.0], group=1),
        entry(GENERATE, [2.0, 2.0], group=1),
    )
    assert list(rows) == [PLAIN.name, VLLM.name, GENERATE.name]
    assert rows[GENERATE.name]["ratio_to_folospec_plain"] == 1.0
    assert rows[GENERATE.name]["ratio_to_fastest_plain_peer"] == 0.5
    assert rows[PLAIN.name]["seconds"] == [1.0, 1.0]


def test_a_failed_contestant_has_a_row_with_its_error_and_is_nobodys_rival():
    rows = rows_of(entry(PLAIN, [1.0]), entry(VLLM, [0.1], error="WorkerError: gone"))
    assert rows[VLLM.name]["error"] == "WorkerError: gone"
    assert "seconds" not in rows[VLLM.name]
    assert rows[PLAIN.name]["ratio_to_fastest_peer"] is None
    json.dumps(rows)
    assert table.rate_table(list(rows.values()), "demo").row_count == 2
    drawn = [{**row, "provenance": {"cpu": cpu}} for row in rows.values() for cpu in ("one", "two")]
    titles = [axes.get_title() for axes in plots.rates(drawn).axes]
    assert titles == ["demo, float32, batch 2\none", "demo, float32, batch 2\ntwo"]


def test_without_an_anchor_there_are_rows_without_its_ratios():
    rows = rows_of(entry(PLAIN, [], error="WorkerError: gone"), entry(VLLM, [1.0]))
    assert rows[VLLM.name]["ratio_to_folospec_plain"] is None
    assert rows[VLLM.name]["ratio_to_fastest_peer"] == 1.0
    assert rows[PLAIN.name]["error"]


def test_a_row_has_its_limit():
    row = rows_of(entry(PLAIN, [10.0]))[PLAIN.name]
    # Contexts of 4 on average: 4 bytes of 100 weights and 2 * 4 * 2 entries of KV.
    assert row["step_bytes"] == 4 * (100 + 2 * 4 * 2)
    assert row["step_operations"] == 2 * 100 * 2 + 4 * 4 * 2
    assert row["step_limit_seconds"] == pytest.approx(4.64)
    assert row["share_of_limit"] == pytest.approx(4 * 2 / row["limit_tokens_per_second"] / 10)


def test_agreement_counts_completions_and_tokens_before_the_first_difference():
    found = agreement([[[1, 2, 3, 4], [5, 6, 7, 8]]], [[[1, 2, 3, 4], [5, 9, 7, 8]]])
    assert found == {"same_completions": 0.5, "same_tokens": 5 / 8}


def test_processes_that_do_not_fit_together_run_in_groups_with_the_anchor():
    size = SETUP.gib(VLLM, WORK)
    contestants = [PLAIN, VLLM, GENERATE, ASSISTED, LOOKUP]
    together = groups(contestants, SETUP, WORK, 100.0)
    assert together == [contestants]
    tight = SETUP.gib(PLAIN, WORK) + size + 0.1
    divided = groups(contestants, SETUP, WORK, tight)
    assert divided == [[PLAIN, VLLM], [PLAIN, GENERATE, ASSISTED], [PLAIN, LOOKUP]]


def test_contestants_are_named_apart_and_unknown_ones_refused():
    made = make_contestants([{"name": "plain"}], ["vllm"], [2, 4])
    assert [c.name for c in made] == [
        "folospec plain",
        "vllm plain",
        "vllm lookup k=2",
        "vllm lookup k=4",
        "vllm draft_model k=2",
        "vllm draft_model k=4",
    ]
    assert [c.is_speculative for c in made] == [False, False, True, True, True, True]
    with pytest.raises(ValueError, match="names must differ"):
        make_contestants([{"name": "plain"}] * 2, [], [4])
    with pytest.raises(ValueError, match="got 'sglang'"):
        make_contestants([], ["sglang"], [4])
    with pytest.raises(ValueError, match="needs a name"):
        make_contestants([{"speculative": "auto"}], [], [4])


def test_where_there_is_no_draft_model_nobody_drafts_with_one():
    peer_names = list(PEER_KINDS)
    of_demo, of_chat = (
        [c.name for c in make_contestants(None, peer_names, [4], checkpoint)]
        for checkpoint in ("demo", "smollm2")
    )
    assert not any("draft_model" in name for name in of_chat)
    assert [name for name in of_chat if name.startswith("folospec")] == [
        "folospec plain",
        "folospec auto",
        "folospec suffix",
    ]
    assert "openvino draft_model k=4" in of_demo
    assert "folospec draft_model" in of_demo
    assert "llama_cpp_q4_1 plain" in of_chat
    assert not any("q4_1" in name for name in of_demo)


def test_weights_of_its_own_run_in_the_other_engine_and_are_nobodys_rival():
    quantised = Contestant("llama_cpp_q4_1 plain", "llama_cpp_q4_1", "plain")
    assert (quantised.engine, quantised.worker) == ("llama_cpp", "llama_cpp_q4_1")
    rows = rows_of(entry(PLAIN, [1.0]), entry(VLLM, [2.0]), entry(quantised, [0.5]))
    assert rows[PLAIN.name]["fastest_peer"] == VLLM.name
    assert rows[quantised.name]["ratio_to_fastest_peer"] == 4.0
    assert rows[quantised.name]["precision"]["weights"].startswith("Q4_1")
    assert rows[VLLM.name]["precision"] == dict.fromkeys(
        ("weights", "activations", "kv"), "float32"
    )


def test_all_are_held_to_the_instructions_of_the_target():
    for engine in ("folospec", "vllm", "openvino", "transformers"):
        native = contestants_module.environment(engine, 2, 1)
        older = contestants_module.environment(engine, 2, 1, "x86-64-v3")
        assert "ATEN_CPU_CAPABILITY" not in native
        assert older["FOLOSPEC_KERNELS_TARGET"] == "x86-64-v3"
        assert older["ONEDNN_MAX_CPU_ISA"] == older["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
        assert native.get("VLLM_CACHE_ROOT") != older.get("VLLM_CACHE_ROOT") or engine != "vllm"
    assert environment_of("llama_cpp", "x86-64-v3") == "llama_cpp-x86-64-v3"
    assert environment_of("llama_cpp", "native") == "llama_cpp"
    assert environment_of("vllm", "x86-64-v3") == "vllm"


def test_outputs_that_go_on_behind_their_end_are_counted():
    assert past_end([[[1, 2, 9], [1, 9, 2]], [[3, 4, 5], [9, 9, 9]]], {9}) == 0.5
    assert past_end([], {9}) is None


@pytest.fixture
def chat_model(monkeypatch):
    """The demo stands in for the chat model, which nobody downloads here."""
    found = {"gguf": Path("model.gguf"), "bf16": resolve_model("folospec-demo")}
    monkeypatch.setattr(checkpoints.smollm2, "bring", lambda: found)


def test_every_peer_reads_the_chat_model_in_its_own_form(chat_model):
    bf16 = resolve_model("folospec-demo")
    assert checkpoints.checkpoint_for("vllm", "smollm2", "bfloat16") == bf16
    gguf = checkpoints.checkpoint_for("llama_cpp_q4_1", "smollm2", "bfloat16")
    assert gguf == Path("model.gguf")
    assert checkpoints.end_token_ids(bf16) == {0}


def test_tasks_of_a_chat_model_end_before_the_model_does(chat_model):
    rounds = make_rounds("smollm2", ["chat", "translation"], [1], 2, 100)
    assert {task: part.max_tokens for (task, _), part in rounds.items()} == {
        "chat": 100,
        "translation": 32,
    }
    assert [len(part) for part in rounds["chat", 1].prompts] == [4, 4, 4]
    shorter = make_rounds("smollm2", ["chat"], [1], 1, 5)
    assert shorter["chat", 1].max_tokens == 5
    (bundled,) = make_rounds("demo", ["completion"], [1], 1, 100).values()
    assert bundled.max_tokens == 100
    with pytest.raises(ValueError, match="must fit in 1024 tokens .*, got 1000"):
        make_rounds("demo", ["completion"], [1], 1, 1000)


@pytest.mark.parametrize(
    "options", [["--rounds", "0"], ["--peers", "sglang"], ["--temperatures", "-1"]]
)
def test_bad_arguments_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        compare.parse_arguments(options)
    assert options[0] in capsys.readouterr().err


def test_samples_of_the_model_have_no_excess_surprise_and_others_have():
    prompts = held_out_prompts(load_tokenizer("folospec-demo"), 4)
    llm = LLM("folospec-demo", dtype="float32", skip_tokenizer_init=True)

    def sampled(temperature):
        params = [
            SamplingParams(temperature=temperature, max_tokens=40, ignore_eos=True, seed=i)
            for i in range(4)
        ]
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        return [o.outputs[0].token_ids for o in llm.generate(requests, params, use_tqdm=False)]

    excess, error = excess_surprise(prompts, sampled(0.8), 0.8)
    assert abs(excess) < 4 * error
    for other in (sampled(1.2), sampled(0.0)):
        excess, error = excess_surprise(prompts, other, 0.8)
        assert abs(excess) > 4 * error
    named, _ = excess_surprise(prompts, sampled(0.8), 0.8, str(resolve_model("folospec-demo")))
    assert named == pytest.approx(excess_surprise(prompts, sampled(0.8), 0.8)[0])
    noise = torch.randint(4096, (4, 40), generator=torch.Generator().manual_seed(0)).tolist()
    assert excess_surprise(prompts, noise, 0.8)[0] > 5


@pytest.mark.parametrize(
    ("machine", "flags", "target", "precision"),
    [
        ("x86_64", {"avx2", "avx512f"}, "native", "bfloat16"),
        ("x86_64", {"avx2", "avx512f"}, "x86-64-v3", "float32"),
        ("x86_64", {"avx2"}, "native", "float32"),
        ("aarch64", {"asimd"}, "native", "bfloat16"),
    ],
)
def test_what_is_calculated_in_may_depend_on_the_instructions(
    machine, flags, target, precision, monkeypatch
):
    monkeypatch.setattr(contestants_module.platform, "machine", lambda: machine)
    monkeypatch.setattr(contestants_module, "cpu_flags", lambda: frozenset(flags))
    setup = Setup("demo", "bfloat16", 2, 1, 64, 1.0, target)
    openvino = Contestant("openvino plain", "openvino", "plain")
    assert setup.precision(openvino).activations == precision
    assert setup.precision(VLLM).activations == "bfloat16"
