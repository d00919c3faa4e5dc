"""Defines the drafter interface and its registry.

A new drafter is one file: subclass `Drafter`, register it, name it in `speculative=`.

A drafter proposes tokens and learns from results. It allocates and frees no blocks and does not
verify its own tokens. The engine checks what it returns (`spec.checks`), and what it is given is
read-only or a copy. Under `coupled` no proposal can change the output. Under `rejection` and
`block` the output has the target's distribution only if `draft_probs` is what the draft tokens were
drawn from: a drafter that states another distribution changes the output.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from folospec.option_names import OptionNames
from folospec.speculative_config import AUTO, DrafterConfig

if TYPE_CHECKING:
    from torch import Tensor

    from folospec.models.base import ModelSpec
    from folospec.sampling_params import SamplingParams
    from folospec.spec.draft_runner import DraftRunner
    from folospec.spec.proposal import Proposal
    from folospec.spec.verify import Verdict


@dataclass(slots=True)
class DraftRequest:
    """One sequence to draft for: its committed tokens (the last of them is the root), and how much
    may be proposed. The token lists are read-only views that grow with the sequence.

    A drafter that keeps KV finds in `num_draft_computed` how many committed tokens have it, and
    writes its new progress there. Its runner takes `block_table` itself, no copy of it, and no
    longer than the call of `propose` lasts.
    """

    seq_id: str
    token_ids: Sequence[int]
    num_prompt_tokens: int
    max_draft_tokens: int
    """Most nodes that are verified."""
    max_depth: int
    """Depth of the deepest node that could still be used; the engine leaves out what is deeper."""
    num_slots: int
    """Slots behind the root, at offsets 1 .. `num_slots`: most nodes of the proposal, scratch ones
    included, and where a drafter may write KV while it drafts. Where blocks are short it may be
    less than `max_draft_tokens` and the drafter's `max_scratch_slots` together."""
    params: SamplingParams
    seed: int
    sample_index: int
    block_table: Sequence[int]
    prediction_token_ids: Sequence[int] = ()
    """What the caller expects the output to be."""
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    num_draft_computed: int = 0
    min_path_probability: float = 0.0
    """A node that is reached with a smaller probability is not worth having children."""

    @property
    def root_position(self) -> int:
        return len(self.token_ids) - 1


@dataclass(frozen=True, slots=True)
class DrafterNeeds:
    """What a drafter asks of the target's forward passes, besides its tokens."""

    aux_hidden_state_layers: tuple[int, ...] = ()
    """Layers in 0..`num_layers`: the hidden states (residual stream) before each of them, at every
    committed position."""
    num_top_tokens: int = 0
    """The target's most likely tokens after every row of a proposal, accepted or not, by its raw
    logits: no sampling parameter is applied."""
    prediction: bool = False
    """The texts that callers expect, `SamplingParams.prediction`."""


@dataclass(slots=True)
class StepResult:
    """What a step did to a sequence.

    Without `needs`, one for each verified proposal. A drafter that needs hidden states or top
    tokens gets one for every sequence of the step, `proposal` and `verdict` None where there was
    none. All that can be changed is the drafter's own copy.
    """

    seq_id: str
    proposal: Proposal | None
    verdict: Verdict | None
    new_token_ids: Sequence[int]
    """The tokens that were committed; a stop may have cut them short."""
    own_nodes: Mapping[int, int] = field(default_factory=dict)
    """Where this drafter's nodes are in `proposal`, which may be merged from several drafters'; a
    node that was left out is missing, and all are where another drafter's proposal was taken."""
    start: int = 0
    """Position of the first row of `aux_hidden_states`."""
    aux_hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> [num_committed_rows, hidden_size], for positions `start`, `start` + 1, ... A sibling
    of n > 1 begins at the end of the prompt; the request's first sequence has the rows before."""
    top_token_ids: Tensor | None = None
    """int64 [num_nodes + 1, num_top_tokens], most likely first; row 0 is the root, row i + 1 is
    node i. None where nothing was verified."""


class SelfDraftModel(Protocol):
    """Gives a runner for a cheaper copy of the target, which reads and writes the target's KV."""

    def __call__(
        self,
        *,
        quantized: bool = False,
        skip_attention: frozenset[int] = frozenset(),
        skip_mlp: frozenset[int] = frozenset(),
    ) -> DraftRunner: ...


@dataclass(slots=True)
class DrafterContext:
    """What a drafter is made from: the user's settings, the target's facts, and ways to load models
    with KV."""

    config: DrafterConfig
    name: str
    """The drafter's name in this engine: its method, numbered where there are several of it."""
    stream: int
    """Number of the drafter in this engine; part of the key of its own noise."""
    acceptance: str
    """The rule that verifies proposals, a key of `spec.acceptance.ACCEPTANCE`."""
    target: ModelSpec
    encode: Callable[[str], list[int]] | None
    """Text to token ids without special tokens; None without a tokenizer."""
    default_draft_model: str | None
    """The draft model that comes with the target, if one does."""
    load_draft_model: Callable[[str, str], DraftRunner]
    """`load_draft_model(path, owner)`: a runner for the model at `path`, whose KV belongs to
    `owner`, the drafter's `kv_owner`."""
    self_draft_model: SelfDraftModel
    """A runner for a cheaper copy of the target. It has no progress to keep: it runs rows at the
    root's slot and behind alone, which verification writes again. Raises ValueError for a target
    that cannot be copied so."""

    has_read_options: bool = field(default=False, init=False)
    """Whether the drafter has asked for its options."""

    @property
    def vocab_size(self) -> int:
        return self.target.vocab_size

    def read_options(
        self, defaults: Mapping[str, Any], names: OptionNames | None = None
    ) -> dict[str, Any]:
        """Return `defaults` updated by the user's options.

        Args:
            names: other engines' names for them.

        Raises:
            ValueError: an option the drafter does not have, or one under two names.
        """
        self.has_read_options = True
        names = names or OptionNames(owner=f"the {self.config.method} drafter")
        return {**defaults, **names.own(self.config.options, defaults)}

    def refuse_model(self) -> None:
        """For drafters without a model.

        Raises:
            ValueError: the user named one.
        """
        if self.config.model is not None:
            raise ValueError(
                f"the {self.config.method} drafter has no model, got model={self.config.model!r}"
            )


class Drafter(ABC):
    """A source of draft tokens for the sequences of a batch."""

    default_num_speculative_tokens = 5
    """Most draft tokens per sequence and step where the user does not say; a drafter of trees sets
    its own, on the class or on the instance."""
    max_scratch_slots = 0
    """Slots a drafter can use beside those of its draft tokens: for rows that are computed and
    never verified, or for draft KV of nodes that it does not propose in the end."""

    def __init__(self, context: DrafterContext) -> None:
        self.config = context.config
        self.name = context.name

    @property
    def num_speculative_tokens(self) -> int:
        """Most draft tokens per sequence and step."""
        return self.config.num_speculative_tokens or self.default_num_speculative_tokens

    @property
    def drafts_in_passes(self) -> bool:
        """Whether every level of a draft costs a pass of a model, so that deep drafts are dear."""
        return False

    @property
    def has_static_tree(self) -> bool:
        """Whether the shape of a sampled draft is known before its first token is drawn. Where it
        is not, a planner prunes no sampled drafts under a ratio rule."""
        return False

    @property
    def needs(self) -> DrafterNeeds:
        """What it needs of the target's passes. Read once, when the engine is made."""
        return DrafterNeeds()

    @property
    def kv_owner(self) -> str | None:
        """The name under which the drafter's KV progress is kept, None for a drafter without KV."""
        return None

    def warm_up(self, max_num_seqs: int) -> None:  # noqa: B027 - most have nothing to prepare
        """Called once, before the first request: prepare for drafts of so many sequences at once,
        if that takes time."""

    @abstractmethod
    def propose(self, requests: list[DraftRequest]) -> list[Proposal | None]:
        """Return a proposal for each request, within its limits, or None where there is nothing to
        propose."""

    def observe(self, results: list[StepResult]) -> None:  # noqa: B027 - most learn nothing
        """Learn from the results of a step."""

    def finish(self, seq_id: str, token_ids: Sequence[int], num_prompt_tokens: int) -> None:  # noqa: B027
        """The sequence ended: store whatever helps to draft for other requests. `drop` follows."""

    def drop(self, seq_id: str) -> None:  # noqa: B027 - most drafters keep no state
        """Forget a sequence: it is finished, or was preempted."""

    def stats(self) -> dict[str, Any]:
        """Figures about its state, the sizes of its stores among them, for `LLM.stats()`."""
        return {}


DrafterFactory = Callable[[DrafterContext], Drafter]
_REGISTRY: dict[str, DrafterFactory] = {}


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse an option that is no count.

    Raises:
        ValueError: it is no integer, or below `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def register_drafter(name: str, factory: DrafterFactory) -> None:
    """Make `speculative=name` build its drafter with `factory(context)`; a `Drafter` subclass is
    such a factory.

    Raises:
        ValueError: the name is taken or is no name, or the factory is none.
    """
    if not isinstance(name, str) or not name or name == AUTO:
        raise ValueError(f"a drafter's name must be a text and not {AUTO!r}, got {name!r}")
    if name in _REGISTRY:
        raise ValueError(f"a drafter named {name!r} is registered already")
    if not callable(factory):
        raise ValueError(
            f"drafter {name!r} must be a subclass of Drafter or a function, got {factory!r}"
        )
    _REGISTRY[name] = factory


def make_drafter(context: DrafterContext) -> Drafter:
    """Build the drafter that `context.config.method` names.

    Raises:
        ValueError: no drafter has that name, the drafter refuses its settings or never asks for
            them, or its factory fails.
    """
    method = context.config.method
    check_drafter(method)
    try:
        drafter = _REGISTRY[method](context)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"drafter {method!r} cannot be made of its context: {type(error).__name__}: {error}"
        ) from error
    if not context.has_read_options:
        context.read_options({})  # what nobody asks for is not ignored
    return drafter


def known_drafters() -> tuple[str, ...]:
    """The names that are registered, in order."""
    return tuple(sorted(_REGISTRY))


def check_drafter(method: str) -> None:
    """Refuse a name that is not registered; models are loaded after that, not before.

    Raises:
        ValueError: no drafter has that name.
    """
    if method not in _REGISTRY:
        names = [AUTO, *sorted(_REGISTRY)]
        near = difflib.get_close_matches(method, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"speculative method must be one of {', '.join(names)}, got {method!r}{hint}"
        )
