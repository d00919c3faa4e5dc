"""Registers the acceptance rules by name: what each promises and needs, users' rules too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from folospec.core.token_tree import ROOT, TokenTree, Verdict
from folospec.spec.verify import verify_block, verify_coupled, verify_rejection

PROMISES = ("tokens", "distribution", "none")


@dataclass(frozen=True, slots=True)
class AcceptanceRule:
    """How drafts are accepted, and what that promises.

    Raises:
        ValueError: a value is out of range.
    """

    verify: Callable[..., Verdict]
    """With `shares_noise` as `verify_coupled(tree, target_token_ids, candidate)`, else as
    `verify_rejection(proposal, target_probs, coins)`."""
    promise: str
    """"tokens": those of plain decoding. "distribution": that of plain sampling. "none": the output
    may differ from both, and the rule wants `allow_lossy=True`."""
    takes_trees: bool
    shares_noise: bool
    """True: verified against the target's drawn tokens, and the drafter may draw with the target's
    noise. False: verified against the target's probs, and the drafter must use noise of its own."""
    has_kernels: bool = False
    """Whether the engine's kernels compute it; only rules that come with folospec have them."""

    def __post_init__(self) -> None:
        if not callable(self.verify):
            raise ValueError(f"verify must be a function, got {self.verify!r}")
        if self.promise not in PROMISES:
            raise ValueError(f"promise must be one of {', '.join(PROMISES)}, got {self.promise!r}")
        for name in ("takes_trees", "shares_noise", "has_kernels"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")


_RULES = {
    "coupled": AcceptanceRule(verify_coupled, "tokens", True, shares_noise=True, has_kernels=True),
    "rejection": AcceptanceRule(
        verify_rejection, "distribution", True, shares_noise=False, has_kernels=True
    ),
    "block": AcceptanceRule(
        verify_block, "distribution", False, shares_noise=False, has_kernels=True
    ),
}
ACCEPTANCE: Mapping[str, AcceptanceRule] = MappingProxyType(_RULES)
"""The rules by the name that `SpeculativeConfig.acceptance` takes."""


def register_acceptance_rule(name: str, rule: AcceptanceRule) -> None:
    """Make `acceptance=name` verify drafts by `rule`. What its function raises reaches the user as
    the cause of an error that names the rule.

    Raises:
        ValueError: the name is taken or is no name, or `rule` is no rule, or says that it has
            kernels.
    """
    if not isinstance(name, str) or not name or name in _RULES:
        raise ValueError(f"name must be a name that none of {sorted(_RULES)} has, got {name!r}")
    if not isinstance(rule, AcceptanceRule) or rule.has_kernels:
        raise ValueError(f"rule must be an AcceptanceRule with has_kernels=False, got {rule!r}")
    _RULES[name] = replace(rule, verify=_names_errors(name, rule.verify))


def _names_errors(name: str, verify: Callable[..., Verdict]) -> Callable[..., Verdict]:
    """The function of a rule, whose errors say that they are the rule's."""

    def named(*args: Any) -> Verdict:
        try:
            return verify(*args)
        except Exception as error:
            raise RuntimeError(
                f"acceptance rule {name!r} raised {type(error).__name__}: {error}"
            ) from error

    return named


def check_acceptance(name: str, *, allow_lossy: bool, merge: bool) -> None:
    """Refuse a rule that cannot be used; models are loaded after that, not before.

    Raises:
        ValueError: no rule has that name, it is lossy and that is not allowed, or it verifies
            chains and proposals are to be merged into trees.
    """
    if name not in _RULES:
        raise ValueError(f"acceptance must be one of {', '.join(sorted(_RULES))}, got {name!r}")
    if _RULES[name].promise == "none" and not allow_lossy:
        raise ValueError(
            f"acceptance must be a lossless rule, or allow_lossy must be True, got {name!r}"
        )
    if merge and not _RULES[name].takes_trees:
        raise ValueError(f"merge must be False with acceptance={name!r}, which verifies chains")


def check_verdict(name: str, verdict: Verdict, tree: TokenTree, vocab_size: int) -> None:
    """Refuse what the registered rule of that name must not return.

    Raises:
        ValueError: it is no Verdict, the path is none of the tree, or the next token is outside the
            vocabulary.
    """
    if not isinstance(verdict, Verdict) or not _are_ints([*verdict.path, verdict.next_token_id]):
        raise ValueError(
            f"acceptance rule {name!r} must return a Verdict of integers, got {verdict!r}"
        )
    above = [ROOT, *verdict.path]
    ok = all(
        0 <= node < len(tree) and tree.parents[node] == parent
        for parent, node in zip(above, verdict.path, strict=False)
    )
    if not ok or not -1 <= verdict.next_token_id < vocab_size:
        raise ValueError(f"acceptance rule {name!r} must return a path of the tree, got {verdict}")


def _are_ints(values: Sequence[object]) -> bool:
    return all(type(value) is int for value in values)
