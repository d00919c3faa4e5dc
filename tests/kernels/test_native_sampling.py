"""The native form of drawing is the torch form: the same tokens, parameter sets and sets of what is
kept."""

import math
import random
import subprocess
import sys

import pytest
import torch
from native_builds import NEON, X86, built_for, require_native

from folospec.core.token_tree import TokenTree
from folospec.kernels import native_sampling
from folospec.kernels.native_sampling import NativeSampling
from folospec.kernels.sampling_records import PackedTrees, pack_sampling
from folospec.sampling import noise
from folospec.sampling.noise import Purpose
from folospec.sampling.pipeline import SamplingRow, pack_filters, process
from folospec.sampling.sampler import NO_TOKEN, draw_target
from folospec.sampling_params import SamplingParams
from folospec.spec.verify import verify_coupled

NEG_INF = float("-inf")
SIZES = (1, 2, 5, 61, 64, 255, 257, 1000, 4096)
OPTIONS = {
    "temperature": (0.0, 0.8, 1.0, 1.5, 1e-4, 1e-300, 50.0),
    "top_p": (1.0, 1.0, 0.95, 0.5, 0.01, 0.999999),
    "top_k": (-1, -1, 1, 3, 50, 300, 6000),
    "min_p": (0.0, 0.0, 0.05, 1.0, 1e-5),
}


@pytest.fixture(scope="module", params=["own", NEON])
def native(request) -> NativeSampling:
    """This machine's kernels; and those for NEON, emulated where it is no Arm."""
    if request.param != "own":
        return NativeSampling(built_for(request.param).library)
    require_native()
    return native_sampling.load()


@pytest.fixture
def no_native(monkeypatch):
    """`process` is the oracle: torch alone."""
    monkeypatch.setattr(native_sampling, "load", lambda: None)


def random_logits(rng: random.Random, num_rows: int, size: int) -> torch.Tensor:
    """Sharp or flat, with ties, with impossible tokens, all alike, or with one that towers."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits = torch.randn(num_rows, size, generator=generator) * rng.choice([0.01, 1.0, 4.0, 12.0])
    match rng.randrange(6):
        case 0:
            logits = (logits * 2).round() / 2
        case 1:
            logits[torch.rand(num_rows, size, generator=generator) < 0.7] = NEG_INF
            logits[:, size // 2] = 0.5
        case 2:
            logits = logits * 0.0  # zeros of both signs
        case 3:
            logits[:, size // 3] += 30
    return logits


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(**{name: rng.choice(values) for name, values in OPTIONS.items()})


def draw(native, logits, all_params, rows, positions):
    """Tokens and peaks of rows without trees."""
    packed_trees = PackedTrees()
    for params, row, position in zip(all_params, rows, positions, strict=True):
        packed_trees.add(params, row, position)
    verified = native.draw_and_verify(logits, packed_trees)
    return [one.token_id for one in verified], [one.peak for one in verified]


def params_of(params, seeds, indices):
    drawn = zip(params, seeds, indices, strict=True)
    return [pack_sampling(seed, index, pack_filters(p)) for p, seed, index in drawn]


@pytest.mark.parametrize("target", X86)
def test_builds_for_other_machines_are_the_oracle_too(target, no_native):
    check_against_oracle(NativeSampling(built_for(target).library), seed=8)


@pytest.mark.parametrize("seed", range(8))
def test_tokens_and_distributions_are_those_of_the_oracle(seed, native, no_native):
    check_against_oracle(native, seed)


def check_against_oracle(native, seed):
    rng = random.Random(seed)
    num_filtered = num_different_from_top = 0
    for _ in range(40):
        count, size = rng.choice([1, 3, 8]), rng.choice(SIZES)
        logits = random_logits(rng, count, size)
        params = [random_params(rng) for _ in range(count)]
        seeds = [rng.randrange(-(2**63), 2**64) for _ in range(count)]
        indices = [rng.randrange(4) for _ in range(count)]
        positions = [rng.randrange(5000) for _ in range(count)]
        expected = process(logits, [SamplingRow(p) for p in params])
        target = int(Purpose.TARGET)
        keys = [noise.key(*key, target) for key in zip(seeds, indices, positions, strict=True)]
        all_params = params_of(params, seeds, indices)
        tokens, peaks = draw(native, logits, all_params, range(count), positions)
        assert list(tokens) == draw_target(expected, keys).tolist()
        assert list(peaks) == logits.amax(-1).tolist()
        log_probs, _ = native.log_probs(logits, all_params, range(count))
        assert torch.equal(log_probs > NEG_INF, expected > NEG_INF)
        # Odds are integers of at most 2^52: the sum of a row is off by size * 2^-53 at most.
        torch.testing.assert_close(log_probs, expected, rtol=1e-7, atol=size * 2.0**-53)
        num_filtered += int((expected == NEG_INF).any(-1).sum())
        num_different_from_top += int((torch.tensor(tokens) != logits.argmax(-1)).sum())
    assert num_filtered > 0
    assert num_different_from_top > 0


def test_other_noise_draws_other_tokens(native, no_native):
    """The control of the test above: tokens are equal because the keys are."""
    logits = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    rows = range(64)
    params = [SamplingParams()] * 64
    tokens, _ = draw(native, logits, params_of(params, rows, [0] * 64), rows, rows)
    keys = [noise.key(seed, 0, seed + 1, int(Purpose.TARGET)) for seed in rows]
    wrong = draw_target(process(logits, [SamplingRow(p) for p in params]), keys).tolist()
    assert sum(a != b for a, b in zip(tokens, wrong, strict=True)) > 32


def test_greedy_takes_the_lowest_id_of_equals(native):
    logits = torch.full((3, 133), -1.0)
    logits[0, [130, 70, 99]] = 2.0
    logits[1, [132, 16]] = 0.0
    logits[1, 3] = -0.0
    params = [pack_sampling(0, 0, pack_filters(SamplingParams(temperature=0)))]
    tokens, _ = draw(native, logits, params * 3, range(3), range(3))
    assert list(tokens) == [70, 3, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, NEG_INF])
@pytest.mark.parametrize("place", [0, 17, 99])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_that_cannot_be_drawn_from_says_why(bad, place, temperature, native):
    logits = torch.full((2, 100), NEG_INF if bad == NEG_INF else 1.0)
    logits[0, place] = bad
    logits[1, 5] = 3.0
    params = [pack_sampling(0, 0, pack_filters(SamplingParams(temperature=temperature, top_p=0.1)))]
    tokens, peaks = draw(native, logits, params * 2, [0, 1], [7, 7])
    assert list(tokens) == [NO_TOKEN, 5]
    assert peaks[0] == bad or (math.isnan(bad) and math.isnan(peaks[0]))
    log_probs, _ = native.log_probs(logits, params, [0, 0])
    assert bool((log_probs[0] == NEG_INF).all())
    assert log_probs[1, 5] == 0.0


PROGRAM = """
import random, sys, torch
sys.path[:0] = {folders!r}
import test_native_sampling as cases
native = cases.native_sampling.load()
rng = random.Random(5)
logits = cases.random_logits(rng, 96, 4096)
params = cases.params_of([cases.random_params(rng) for _ in range(96)], range(96), [0] * 96)
for threads in 1, 2:
    torch.set_num_threads(threads)
    order = rng.sample(range(96), 96)
    tokens = cases.draw(native, logits, [params[i] for i in order], order, order)[0]
    drawn = dict(zip(order, tokens))
    found = native.log_probs(logits, params, range(96))[0]
    print([drawn[row] for row in range(96)], found.view(torch.int32).long().sum().item())
"""


def test_bits_depend_on_neither_threads_nor_order(native):
    command = [sys.executable, "-c", PROGRAM.format(folders=[str(path) for path in sys.path])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    alone, together = done.stdout.splitlines()
    assert len(set(alone.split(","))) > 48, "most rows draw a token of their own"
    assert together == alone


def test_a_row_draws_the_same_token_alone_and_in_any_batch(native):
    rng = random.Random(9)
    logits = random_logits(rng, 40, 1000)
    params = [random_params(rng) for _ in range(40)]
    all_params = params_of(params, range(40), [0] * 40)
    together, _ = draw(native, logits, all_params, range(40), range(40))
    distribution_together, _ = native.log_probs(logits, all_params, range(40))
    for row in range(40):
        assert draw(native, logits, [all_params[row]], [row], [row])[0][0] == together[row]
        alone = native.log_probs(logits[row : row + 1], all_params, [row])[0]
        assert torch.equal(alone[0], distribution_together[row])


def test_what_it_cannot_read_is_refused(native):
    logits = torch.zeros(4, 10)
    assert NativeSampling.takes(logits)
    for other in (logits.double(), logits.bfloat16(), logits.T, logits[0], torch.zeros(4, 0)):
        assert not NativeSampling.takes(other)
    params = [pack_sampling(0, 0, pack_filters(SamplingParams()))]
    packed_trees = PackedTrees()
    for root_row, tree in ((-1, ()), (0, [-1])):
        with pytest.raises(ValueError, match="root_row must be at least 0"):
            packed_trees.add(params[0], root_row, 0, (), tree)
    packed_trees.add(params[0], 3, 0, [5], [-1])
    with pytest.raises(ValueError, match="4 rows of logits, not 5"):
        native.draw_and_verify(logits, packed_trees)
    with pytest.raises(ValueError, match="params_of must name"):
        native.log_probs(logits, params, [0])


def random_tree(rng, tokens_likely, size):
    """Parents before children; siblings may be equal, and some nodes are not to be accepted."""
    parents = [rng.randrange(max(-1, node - 3), node) for node in range(size)]
    return [rng.choice([*tokens_likely, -1]) for _ in range(size)], parents


@pytest.mark.parametrize("seed", range(4))
def test_a_verify_is_coupled_verification(seed, native, no_native):
    """Against every row drawn and `verify_coupled`, on trees with equal siblings and with nodes
    that are not verified."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = set()
    num_left_out = 0
    for _ in range(150):
        size, vocab_size = rng.choice([0, 1, 5, 20]), rng.choice([3, 64, 300])
        logits = torch.full((size + 1, vocab_size), -30.0)
        logits[:, :3] = torch.randn(size + 1, 3, generator=generator)
        token_ids, parents = random_tree(rng, range(3), size)
        params = SamplingParams(temperature=rng.choice([0.0, 1.0]))
        depths = [0]
        for node, parent in enumerate(parents):
            depths.append(depths[parent + 1] + 1)
            # What is drawn is a function of the context: equal nodes have equal rows.
            duplicates = [
                n for n in range(node) if (parents[n], token_ids[n]) == (parent, token_ids[node])
            ]
            if duplicates:
                logits[node + 1] = logits[duplicates[0] + 1]
        keys = [noise.key(seed, 1, 7 + depth, int(Purpose.TARGET)) for depth in depths]
        drawn = draw_target(process(logits, [SamplingRow(params)] * (size + 1)), keys).tolist()
        candidate = [token_id >= 0 for token_id in token_ids]
        tree = TokenTree([max(token_id, 0) for token_id in token_ids], parents)
        expected = verify_coupled(tree, drawn, candidate)
        packed_trees = PackedTrees()
        packed_trees.add(params_of([params], [seed], [1])[0], 0, 7, token_ids, parents)
        [one] = native.draw_and_verify(logits, packed_trees)
        assert (one.path, one.token_id) == (
            expected.path,
            expected.next_token_id,
        )
        lengths.add(len(one.path))
        num_left_out += expected != verify_coupled(tree, drawn)
    assert {0, 1, 2} <= lengths
    assert num_left_out > 0


def test_a_path_ends_where_no_token_is_possible(native):
    logits = torch.full((3, 50), -1.0)
    logits[0, 7] = logits[2, 9] = 1.0
    logits[1] = NEG_INF
    packed_trees = PackedTrees()
    params = pack_sampling(0, 0, pack_filters(SamplingParams(temperature=0)))
    packed_trees.add(params, 0, 5, [7, -1], [-1, 0])
    assert native.draw_and_verify(logits, packed_trees) == [([0], NO_TOKEN, NEG_INF)]


def test_a_top_k_beyond_64_bits_keeps_all():
    assert pack_filters(SamplingParams(top_k=2**80)) == pack_filters(SamplingParams(top_k=2**62))
