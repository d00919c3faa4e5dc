"""Derives what sampling needs from a request's parameters, once, at admission."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from folospec.sampling.constraints import SamplingRow, TokenCounts, is_constrained
from folospec.sampling.pipeline import pack_filters
from folospec.sampling_params import SamplingParams

if TYPE_CHECKING:
    from folospec.core.sequence import Sequence


class SamplingMetadata:
    """The options of one request as the pipeline and the kernels take them.

    Args:
        params: of the request.
        bad_words_token_ids: every tokenization of `params.bad_words`.
        stop_ids: every token id that ends the output.
    """

    def __init__(
        self,
        params: SamplingParams,
        bad_words_token_ids: Seq[Seq[int]] = (),
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.params, self.stop_ids = params, stop_ids
        self.bad_words_token_ids = bad_words_token_ids
        self.filters = pack_filters(params)
        """See `pipeline.pack_filters`."""
        self.is_constrained = is_constrained(
            SamplingRow(params, bad_words_token_ids=bad_words_token_ids, stop_ids=stop_ids)
        )
        """Whether a stage before temperature may ever change the request's logits."""
        self._prompt_counts = TokenCounts()
        self._output_counts: dict[str, TokenCounts] = {}

    def row(self, seq: Sequence, draft_token_ids: Seq[int] = ()) -> SamplingRow:
        """What is asked of the row after the sequence's last token, or after drafts below it."""
        return SamplingRow(
            params=self.params,
            prompt_token_ids=seq.prompt_token_ids,
            output_token_ids=seq.output_token_ids,
            draft_token_ids=draft_token_ids,
            bad_words_token_ids=self.bad_words_token_ids,
            stop_ids=self.stop_ids,
            prompt_counts=self._prompt_counts,
            output_counts=self._output_counts.setdefault(seq.seq_id, TokenCounts()),
        )
