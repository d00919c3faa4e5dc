"""The keyed noise is a fixed function of its key, spread like uniforms, and without memory."""

import itertools

import pytest
import torch
from chi_square import FALSE_ALARM, ks_p_value, pair_p_value, uniform_p_value

from folospec.sampling import noise
from folospec.sampling.noise import Purpose, bits, gumbel, key, key_tensor, purpose_code, uniform

IDS = torch.arange(1024)


def keys_over(count, *, seed=1, sample_index=0, position=7, purpose=0, vary):
    base = {"seed": seed, "sample_index": sample_index, "position": position, "purpose": purpose}
    return key_tensor([key(**{**base, vary: base[vary] + i}) for i in range(count)])


def weak_uniform(keys, token_ids):
    """The negative control: a hash of one multiplication, where high bits never reach low ones."""
    return (((keys[:, None] ^ token_ids) * 0x2C1B3C6D & 0xFFFFFFFF).double() + 0.5) * 2.0**-32


def weak_keys_over(count, **_):
    return torch.arange(count)


def neighbours(lookup, make_keys, axis):
    """Pairs of uniforms whose keys, or token ids, differ by one."""
    if axis == "token_id":
        v = lookup(make_keys(256, vary="position"), IDS)
        return v[:, 0::2], v[:, 1::2]
    v = lookup(make_keys(256, vary=axis), IDS)
    return v[0::2], v[1::2]


def test_hosts_and_devices_have_the_same_bits():
    keys, ids = keys_over(300, vary="position"), torch.cat([IDS, (1 << 18) - IDS])
    assert keys.min() < 0 < keys.max()
    assert torch.equal(bits(keys, ids), noise._device_bits(keys[:, None], ids))
    few = ids[: len(keys)]
    assert torch.equal(noise.elementwise_bits(keys, few), noise._device_bits(keys, few))


AXES = ["seed", "sample_index", "position", "purpose", "token_id"]


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_on_every_axis_are_uniform_and_independent(axis):
    first, second = neighbours(uniform, keys_over, axis)
    for part in (first, second):
        assert uniform_p_value(part) > FALSE_ALARM
        assert ks_p_value(part) > FALSE_ALARM
    assert pair_p_value(first, second) > FALSE_ALARM


@pytest.mark.parametrize("axis", ["position", "token_id"])
def test_the_same_test_rejects_a_weak_hash(axis):
    first, second = neighbours(weak_uniform, weak_keys_over, axis)
    assert pair_p_value(first, second) < FALSE_ALARM


def test_a_single_number_is_that_of_its_row():
    keys = keys_over(64, vary="seed")
    for key_, row in zip(keys.tolist(), uniform(keys, IDS[::93]).tolist(), strict=True):
        assert [noise.uniform_number(key_, token_id) for token_id in range(0, 1024, 93)] == row


def test_the_low_bits_are_uniform_too():
    low = bits(keys_over(256, vary="position"), IDS) & 0xFFF
    assert uniform_p_value((low.double() + 0.5) / 4096) > FALSE_ALARM
    assert pair_p_value((low[0::2].double() + 0.5) / 4096, (low[1::2].double() + 0.5) / 4096) > (
        FALSE_ALARM
    )


def flip_shares(before, after):
    """How often each of the 32 bits differs, float64 [32]."""
    difference = before ^ after
    shares = [((difference >> b) & 1).double().mean() for b in range(32)]
    return torch.stack(shares)


@pytest.mark.parametrize("bit", range(18))
def test_flipping_one_bit_of_a_token_id_flips_half_of_every_output_bit(bit):
    keys, ids = keys_over(64, vary="position"), torch.arange(1 << 10) * 251
    shares = flip_shares(bits(keys, ids), bits(keys, ids ^ (1 << bit)))
    # 65,536 flips of a fair coin stay within 6.1 standard deviations but for one time in 10^9.
    assert (shares - 0.5).abs().max() < 6.5 * 0.5 / 65536**0.5


@pytest.mark.parametrize("part", ["seed", "sample_index", "position", "purpose"])
def test_flipping_one_bit_of_a_part_of_the_key_flips_half_of_every_output_bit(part):
    base = {"seed": 3, "sample_index": 1, "position": 100, "purpose": 0}
    ids = torch.arange(1 << 14)
    for bit in range(0, 64, 3):
        other = {**base, part: base[part] ^ (1 << bit)}
        shares = flip_shares(
            bits(key_tensor([key(**base)]), ids), bits(key_tensor([key(**other)]), ids)
        )
        assert (shares - 0.5).abs().max() < 7 * 0.5 / ids.numel() ** 0.5


def test_avalanche_rejects_a_weak_hash():
    ids = torch.arange(1 << 14)
    before, after = (ids * 0x2C1B3C6D & 0xFFFFFFFF), ((ids ^ 1) * 0x2C1B3C6D & 0xFFFFFFFF)
    assert (flip_shares(before, after) - 0.5).abs().max() > 0.4


def test_no_two_tokens_of_a_row_share_their_bits():
    ids = torch.arange(1 << 18)
    for row in bits(key_tensor([key(5, 0, 9, 0), key(5, 0, 10, 0)]), ids):
        assert row.unique().numel() == ids.numel()


def test_both_halves_of_the_key_matter():
    low = bits(torch.tensor([5, 5 + (1 << 32)]), IDS)
    high = bits(torch.tensor([5, 6]), IDS)
    assert (low[0] != low[1]).float().mean() > 0.99
    assert (high[0] != high[1]).float().mean() > 0.99


def test_looking_up_single_ids_gives_the_numbers_of_the_full_row():
    keys = keys_over(8, vary="position")
    full = gumbel(keys, torch.arange(4096))
    reduced = torch.tensor([4095, 0, 17, 17, 2048])
    assert torch.equal(gumbel(keys, reduced), full[:, reduced])
    per_row = torch.stack([torch.arange(5) * (row + 1) for row in range(8)])
    assert torch.equal(gumbel(keys, per_row), full.gather(1, per_row))
    assert torch.equal(gumbel(keys, reduced[None]), full[:, reduced])


@pytest.mark.parametrize("vocab_size", [1, 3, 7, 33, 1000])
def test_a_row_alone_equals_the_row_in_any_batch(vocab_size):
    keys, ids = keys_over(9, vary="seed"), torch.arange(vocab_size)
    batch = gumbel(keys, ids)
    for row in range(9):
        assert torch.equal(gumbel(keys[row : row + 1], ids)[0], batch[row])
    assert torch.equal(gumbel(keys.flip(0), ids), batch.flip(0))


GOLDEN_KEYS = [2391539541053276776, 1321962074176129191, -8258869765125682172]
GOLDEN_BITS = [
    [244222706, 8555478, 168572518, 502997375],
    [2861557639, 2669491557, 3229457649, 9658721],
    [2925436215, 1023155773, 184420959, 3444159693],
]
GOLDEN_GUMBEL = [2.8379898071289062, 6.217630386352539, 3.2178800106048584, 2.082981586456299]
GOLDEN_SEED = 627405149472732430


def test_golden_values_are_pinned():
    keys = [key(0, 0, 0, 0), key(1, 2, 3, int(Purpose.TARGET)), key(-1, 0, 2**40, 27)]
    assert keys == GOLDEN_KEYS
    ids = torch.tensor([0, 1, 4095, 200_000])
    assert bits(key_tensor(keys), ids).tolist() == GOLDEN_BITS
    assert gumbel(key_tensor(keys), ids)[0].tolist() == pytest.approx(GOLDEN_GUMBEL, rel=1e-6)
    assert noise.derived_seed(0, 1) == GOLDEN_SEED


def slow_bits(key64, token_id):
    """The hash in plain integers, as any other implementation would write it."""

    def mix(x):
        x ^= x >> 15
        x = x * 0x2C1B3C6D % 2**32
        x ^= x >> 12
        x = x * 0x297A2D39 % 2**32
        return x ^ (x >> 15)

    low, high = key64 % 2**32, (key64 >> 32) % 2**32
    return mix(mix(token_id ^ low) ^ high)


def test_bits_equal_plain_integer_arithmetic():
    keys = [key(s, i, p, 0) for s, i, p in itertools.product((0, 2**63, -7), (0, 3), (0, 5000))]
    ids = [0, 1, 31, 4095, 151_935, 2**31 - 1]
    expected = [[slow_bits(k, t) for t in ids] for k in keys]
    assert bits(key_tensor(keys), torch.tensor(ids)).tolist() == expected


def test_keys_of_different_draws_differ():
    codes = [int(kind) for kind in Purpose]
    codes += [purpose_code(kind, row=row) for kind in Purpose for row in range(6)]
    assert len(set(codes)) == len(codes)
    keys = {
        key(*parts) for parts in itertools.product(range(4), range(4), range(20), sorted(codes))
    }
    assert len(keys) == 4 * 4 * 20 * len(codes)


def test_a_key_does_not_mix_up_its_parts():
    assert len({key(*parts) for parts in itertools.permutations((1, 2, 3, 4))}) == 24


def test_derived_seeds_differ_by_engine_seed_and_ordinal():
    seeds = {noise.derived_seed(s, o) for s in range(50) for o in range(50)}
    assert len(seeds) == 2500


def test_the_tails_are_finite_and_keep_their_order():
    # The bits nearest both ends, put through the same arithmetic as every look-up.
    ends = torch.tensor([0, 1, 2, 3, 2**32 - 3, 2**32 - 2, 2**32 - 1])
    v = noise._to_uniform(ends.clone())
    assert v[0] > 0
    assert v[-1] < 1
    assert v.unique().numel() == len(ends)
    g = noise._to_gumbel(ends.clone())
    assert torch.isfinite(g).all()
    assert g.tolist() == sorted(g.tolist(), reverse=True)
    assert g[0] == pytest.approx(22.8739, abs=1e-3)
    assert g[-1] == pytest.approx(-3.1299, abs=1e-3)
    assert g[:4].unique().numel() == 4


def test_float32_uniforms_would_collapse_in_the_tail():
    """Why the Gumbel is taken in float64, and of which end: an ordinary uniform u = 1 - v in
    float32 has a few values left where the winners are drawn."""
    v = noise._to_uniform(torch.arange(4096))  # the largest Gumbels
    good = noise._to_gumbel(torch.arange(4096))
    in_float32 = -torch.log(-torch.log((1 - v).float()))
    assert torch.isinf(in_float32).any()
    assert in_float32.unique().numel() < 40
    assert good.unique().numel() > 4000
