"""Holds which drafters an engine has, and how their drafts are accepted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from folospec.option_checks import is_name, require, require_bool, require_count
from folospec.option_names import DRAFTER_NAMES

AUTO = "auto"
"""As a drafter's name: those that are there, chosen when the engine is made."""
ACCEPTANCE_RULES = ("coupled", "rejection", "block")
"""Those that come with folospec; others are registered with `register_acceptance_rule`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterConfig:
    """One drafter: its name, its model if it has one, and its own options.

    Raises:
        ValueError: a value is out of range; the message names it and what is allowed.
    """

    method: str
    """Name of a registered drafter: "ngram", "suffix", "draft_model", or one of your own. "auto" is
    suffix, and the draft model that `model` names or that comes with the target."""
    model: str | None = None
    """Path, hub id or bundled name of the draft model, for the drafters that have one."""
    num_speculative_tokens: int | None = None
    """Most draft tokens per sequence and step, the nodes of a tree; None is the drafter's own
    default."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The drafter's own options; it refuses those that it does not know."""

    def __post_init__(self) -> None:
        require(is_name(self.method), "method", self.method, "the name of a drafter")
        require(
            self.model is None or is_name(self.model),
            "model",
            self.model,
            "None, a path, a hub id or a bundled name",
        )
        if self.num_speculative_tokens is not None:
            require_count("num_speculative_tokens", self.num_speculative_tokens)
        require(isinstance(self.options, Mapping), "options", self.options, "a mapping")
        if self.method == AUTO:
            require(not self.options, "options", dict(self.options), "empty with method='auto'")

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | DrafterConfig) -> DrafterConfig:
        """Read a drafter's name, "NAME:MODEL", or a mapping with a "method"; keys that are no field
        of this class, nor another engine's name for one (`option_names`), go to the drafter as its
        `options`."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            method, colon, model = value.strip().partition(":")
            return cls(method=method, model=model if colon else None)
        if not isinstance(value, Mapping):
            raise ValueError(f"a drafter must be a name or a mapping, got {value!r}")
        own = [f.name for f in fields(cls)]
        rest = [key for key in value if key not in (*own, *DRAFTER_NAMES.same)]
        value = DRAFTER_NAMES.own(value, [*own, *rest])
        if "method" not in value:
            raise ValueError(
                "a drafter needs a 'method', such as 'ngram' or 'draft_model', got the keys "
                f"{sorted(value)}"
            )
        given = value.get("options", {})
        require(isinstance(given, Mapping), "options", given, "a mapping")
        options = {**given, **{key: value[key] for key in rest}}
        return cls(
            **{k: v for k, v in value.items() if k in own and k != "options"}, options=options
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """Which drafters propose tokens, and by which rule they are accepted.

    Raises:
        ValueError: a value is out of range; the message names it and what is allowed.
    """

    drafters: tuple[DrafterConfig, ...]
    """In order of precedence: for each sequence the first that has something to say drafts."""
    merge: bool = False
    """Ask all of them, and merge their proposals into one tree."""
    acceptance: str = "coupled"
    """"coupled": the same tokens as without speculation. "rejection" and "block": the same
    distribution. Or the name of a registered rule; the engine looks it up."""
    allow_lossy: bool = False
    """Allow a rule that promises neither tokens nor distribution."""
    adaptive: bool | None = None
    """Let the planner decide, in every step, who is drafted for and how much, nobody and nothing
    included: whatever gives most tokens per second. False drafts as much as is allowed, always.
    None is True with "auto", and False with drafters of the user's choice."""

    def __post_init__(self) -> None:
        ok = isinstance(self.drafters, tuple) and len(self.drafters) > 0
        ok = ok and all(isinstance(drafter, DrafterConfig) for drafter in self.drafters)
        require(ok, "drafters", self.drafters, "at least one drafter, each a DrafterConfig")
        require_bool("merge", self.merge)
        ok = self.adaptive is None or isinstance(self.adaptive, bool)
        require(ok, "adaptive", self.adaptive, "None, True or False")
        methods = [drafter.method for drafter in self.drafters]
        ok = AUTO not in methods or (len(methods) == 1 and self.adaptive is not False)
        require(ok, "drafters", methods, "'auto' alone, with adaptive=None or True")
        require(is_name(self.acceptance), "acceptance", self.acceptance, "the name of a rule")
        require_bool("allow_lossy", self.allow_lossy)

    @property
    def is_adaptive(self) -> bool:
        """Whether the planner decides."""
        if self.adaptive is None:
            return any(drafter.method == AUTO for drafter in self.drafters)
        return self.adaptive

    @property
    def label(self) -> str:
        """The drafters' names: "ngram,draft_model", or "ngram+draft_model" if they are merged."""
        return ("+" if self.merge else ",").join(drafter.method for drafter in self.drafters)

    @classmethod
    def of(
        cls, value: None | str | Mapping[str, Any] | Sequence[Any] | SpeculativeConfig
    ) -> SpeculativeConfig | None:
        """Read what users pass as `speculative=`, in Python or on the command line: None, a text, a
        list of drafters in order of precedence, a mapping, or a config.

        A mapping describes one drafter by its "method", or several by a list of "drafters"; each of
        them is a name or a mapping of its own. Keys that neither class has go to the drafter as its
        `options`. So these are the same::

            "ngram", ["ngram"], {"method": "ngram"}, {"drafters": ["ngram"]}

        A text is a name, NAME:MODEL, several of these with commas between them, or a list or
        mapping in JSON. So these are the same, too::

            "suffix,draft_model:small", ["suffix", {"method": "draft_model", "model": "small"}]

        "auto", or "auto:MODEL", takes the drafters that are there.

        Raises:
            ValueError: the value is none of these; the message names it and what is allowed.
        """
        if isinstance(value, str):
            value = _read_text(value)
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, (list, tuple)):
            return cls(drafters=tuple(DrafterConfig.of(item) for item in value))
        if not isinstance(value, Mapping):
            raise ValueError(
                "speculative must be None, a name, a list, a mapping or a SpeculativeConfig, "
                f"got {value!r}"
            )
        shared = {f.name for f in fields(cls)} - {"drafters"}
        own = {k: v for k, v in value.items() if k in shared}
        rest = {k: v for k, v in value.items() if k not in shared}
        if "drafters" not in rest:
            return cls(drafters=(DrafterConfig.of(rest),), **own)
        if set(rest) != {"drafters"}:
            raise ValueError(
                f"with 'drafters', {sorted(set(rest) - {'drafters'})} must be set for each of them"
            )
        drafters = rest["drafters"]
        require(isinstance(drafters, (list, tuple)), "drafters", drafters, "a list")
        return cls(drafters=tuple(DrafterConfig.of(item) for item in drafters), **own)


def _read_text(text: str) -> Any:
    """Turn the text form of `speculative` into a list of drafters or what its JSON holds."""
    if not text.lstrip().startswith(("{", "[")):
        return text.split(",")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"speculative is not valid JSON: {error}; got {text!r}") from None
