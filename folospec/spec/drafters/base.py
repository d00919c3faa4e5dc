"""The drafter interface and its registry. A new drafter is one file: subclass `Drafter`, register
it, name it in `speculative=`.

A drafter proposes and learns. It never sees blocks being allocated or freed, never judges its own
tokens, and cannot change the
output: whatever it proposes, the verifier emits what plain decoding would have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from folospec.config import SpeculativeConfig

if TYPE_CHECKING:
    from torch import Tensor

    from folospec.sampling_params import SamplingParams
    from folospec.spec.draft_runner import DraftRunner
    from folospec.spec.proposal import Proposal
    from folospec.spec.verify import Verdict


@dataclass(slots=True)
class DraftRow:
    """What a drafter is told of one sequence: its committed tokens (the last of them is the root),
    and how many it may propose.

    A drafter that keeps KV finds in `num_draft_computed` how many committed tokens have it, and
    writes its new progress there.
    """

    seq_id: str
    token_ids: Sequence[int]
    num_prompt_tokens: int
    max_draft_tokens: int
    params: SamplingParams
    seed: int
    sample_index: int
    block_table: Sequence[int]
    num_draft_computed: int = 0

    @property
    def root_position(self) -> int:
        return len(self.token_ids) - 1


@dataclass(frozen=True, slots=True)
class Needs:
    """What a drafter asks of the target's forward passes, besides its tokens."""

    taps: tuple[int, ...] = ()
    """Layers: the residual stream before each of them, at every committed position."""
    num_top_logits: int = 0
    """The target's most likely tokens after every judged row, accepted or not."""


@dataclass(slots=True)
class Outcome:
    """What a step did to a sequence.

    Without `needs`, one for each verified proposal. A drafter that needs taps or top logits gets
    one for every sequence of the step, `proposal` and `verdict` None where there was none.
    """

    seq_id: str
    proposal: Proposal | None
    verdict: Verdict | None
    new_token_ids: Sequence[int]
    """The tokens that were committed; a stop may have cut them short."""
    start: int = 0
    """Position of the first row of `taps`."""
    taps: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> [num_committed_rows, hidden_size], for positions `start`, `start` + 1, ... A sibling
    of n > 1 begins at the end of the prompt, whose rows the request's first sequence was told."""
    top_token_ids: Tensor | None = None
    """int64 [num_judged_rows, num_top_logits], most likely first; row 0 is the root, row i + 1 node
    i. None where nothing was judged."""


@dataclass(slots=True)
class DrafterContext:
    """What a drafter is made from: the user's settings, the target's vocabulary, and a way to load
    models with KV."""

    config: SpeculativeConfig
    vocab_size: int
    load_draft_model: Callable[[str, str], DraftRunner]
    """`load_draft_model(path, owner)`: a runner for the model at `path`, whose KV belongs to
    `owner`."""


class Drafter(ABC):
    """A source of draft tokens for the sequences of a batch."""

    def __init__(self, context: DrafterContext) -> None:
        self.config = context.config

    @property
    def needs(self) -> Needs:
        """What `observe` is to be told."""
        return Needs()

    @property
    def kv_owner(self) -> str | None:
        """The name under which the drafter's KV progress is kept, None for a drafter without KV."""
        return None

    @abstractmethod
    def propose(self, rows: list[DraftRow]) -> list[Proposal | None]:
        """Return a proposal of at most `max_draft_tokens` nodes for each row, or None where there
        is nothing to say."""

    def observe(self, outcomes: list[Outcome]) -> None:  # noqa: B027 - most drafters learn nothing
        """Learn from what became of the step."""

    def drop(self, seq_id: str) -> None:  # noqa: B027 - most drafters keep no state
        """Forget a sequence: it is finished, or was preempted."""


DrafterFactory = Callable[[DrafterContext], Drafter]
_REGISTRY: dict[str, DrafterFactory] = {}


def register_drafter(name: str, factory: DrafterFactory) -> None:
    """Make `speculative=name` build its drafter with `factory(context)`; a `Drafter` subclass is
    such a factory.

    Raises:
        ValueError: the name is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"a drafter named {name!r} is registered already")
    _REGISTRY[name] = factory


def make_drafter(context: DrafterContext) -> Drafter:
    """Build the drafter that `context.config.method` names.

    Raises:
        ValueError: no drafter has that name, or the drafter refuses its settings.
    """
    check_drafter(context.config.method)
    return _REGISTRY[context.config.method](context)


def known_drafters() -> tuple[str, ...]:
    """The names that are registered, in order."""
    return tuple(sorted(_REGISTRY))


def check_drafter(method: str) -> None:
    """Refuse a name that is not registered; models are loaded after that, not before.

    Raises:
        ValueError: no drafter has that name.
    """
    if method not in _REGISTRY:
        raise ValueError(
            f"speculative method must be one of {', '.join(sorted(_REGISTRY))}, got {method!r}"
        )


def read_options(
    method: str, options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `defaults` updated by the user's options.

    Raises:
        ValueError: an option the drafter does not have.
    """
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        known = ", ".join(sorted(defaults)) or "none"
        raise ValueError(f"unknown options {unknown} of the {method} drafter; it has: {known}")
    return {**defaults, **options}
