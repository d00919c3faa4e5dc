"""The ratio rules on the device keep the target's distribution, and verify as the rules of
`spec.verify` do, which are proven by enumeration: many seeds in one launch."""

import pytest
import torch

pytest.importorskip("triton")

from chi_square import FALSE_ALARM, chi_square_p_value  # noqa: E402

from folospec.core.token_tree import TokenTree  # noqa: E402
from folospec.kernels.gpu import ratio  # noqa: E402
from folospec.kernels.gpu.sampling import DeviceSampling  # noqa: E402
from folospec.kernels.gpu.sampling_arrays import PackedProposals, read_ratio_paths  # noqa: E402
from folospec.spec.acceptance import ACCEPTANCE
from folospec.spec.proposal import Proposal  # noqa: E402
from folospec.spec.verify import KeyedCoins  # noqa: E402

HAS_CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CARD else "cpu")
NUM_SEEDS = 4000 if HAS_CARD else 100
TARGET = torch.tensor([[0.4, 0.5, 0.0, 0.1], [0.4, 0.1, 0.2, 0.3], [0.25, 0.25, 0.3, 0.2]])
DRAFT = torch.tensor([[0.98, 0.0, 0.0, 0.02], [0.1, 0.6, 0.2, 0.1]])
SIBLINGS, CHAIN = [-1, -1], [-1, 0]
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid|divide):RuntimeWarning")


def verified(rule, parents, num_seeds=NUM_SEEDS):
    """Verdicts of the device and of `spec.verify` for drafts that were drawn from their
    distributions."""
    generator = torch.Generator().manual_seed(11)
    drafts = DRAFT[[0, 0]] if parents == SIBLINGS else DRAFT
    tokens = torch.stack(
        [
            torch.multinomial(distribution, num_seeds, True, generator=generator)
            for distribution in drafts
        ],
        1,
    )
    trials, expected = PackedProposals(), []
    for seed, token_ids in enumerate(tokens.tolist()):
        stream = (seed, 0, 100)
        trials.add(stream, 0, token_ids, parents, drafts)
        proposal = Proposal(TokenTree(token_ids, parents), drafts)
        verdict = ACCEPTANCE[rule].verify(proposal, TARGET, KeyedCoins(*stream))
        expected.append((verdict.path, verdict.next_token_id))
    result = DeviceSampling().start_ratio(rule, TARGET.to(DEVICE), trials)
    found = read_ratio_paths(result.cpu(), trials)
    return tokens.tolist(), [(j.path, j.token_id) for j in found], expected


def first_tokens(tokens, verdicts):
    """The first token that every sequence emits."""
    firsts = [
        token_ids[path[0]] if path else token_id
        for token_ids, (path, token_id) in zip(tokens, verdicts, strict=True)
    ]
    return torch.bincount(torch.tensor(firsts), minlength=TARGET.shape[1])


RULES = [("rejection", SIBLINGS), ("rejection", CHAIN), ("block", CHAIN)]


@pytest.mark.parametrize(("rule", "parents"), RULES)
def test_verdicts_are_those_of_the_proven_rule_and_have_the_targets_distribution(rule, parents):
    tokens, found, expected = verified(rule, parents)
    assert found == expected
    assert {len(path) for path, _ in found} == ({0, 1} if parents == SIBLINGS else {0, 1, 2})
    observed = first_tokens(tokens, found)
    assert chi_square_p_value(observed, TARGET[0] * NUM_SEEDS) > 1e-4


def test_a_rule_that_draws_again_from_the_target_is_seen(tmp_path, monkeypatch):
    """After a rejection the whole distribution, instead of what the draft has left of it."""
    from folospec.kernels.gpu import sampling

    gpu_mutants = pytest.importorskip("gpu_mutants")
    old, new = "mass <= EPS", "mass <= 2.0"
    wrong = gpu_mutants.mutant(ratio, old, new, tmp_path)
    monkeypatch.setattr(sampling, "rejection_kernel", wrong.rejection_kernel)
    tokens, found, expected = verified("rejection", CHAIN, 3 * NUM_SEEDS)
    assert found != expected
    observed = first_tokens(tokens, found)
    assert chi_square_p_value(observed, TARGET[0] * 3 * NUM_SEEDS) < FALSE_ALARM
