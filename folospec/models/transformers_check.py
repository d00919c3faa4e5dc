"""Compares a transformers model on paged KV with its own plain forward pass, at load.

A model may derive more from its inputs than its attention shows: positions of its own, something
from the ids before a token, a state. So it runs a few tokens in every way in which the engine runs
them, and each row must have the logits of the plain forward pass of its sequence alone.

    step 1     first, rows 0..4         second, rows 0..7     packed
    step 2     first, rows 5..          second, row 8         rows 0.. come from KV
               and other tokens at the last row's position, as siblings in a tree
    step 3                              second, row 9         a row on its own
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from folospec.attention.base import LayerKV
from folospec.attention.metadata import AttentionMetadata, SequenceRows
from folospec.models.base import Model

LENGTH, NUM_OTHERS = 12, 3
LONGEST_WINDOW = 64
"""Windows up to here are filled by the tokens of the comparison; the probe has seen the masks of
all."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
"""Error of a row's logits over their spread, both as root mean squares. A wrong input moves logits
by a good part of their spread; rounding in 16 bits, over many layers, by less than this. There a
row may still be far off, where its rounding chose another expert: half of the rows must agree, and
in wider types all."""
PLAIN, PACKED = "on plain text", "where another sequence is packed before its own"
CONTINUED = "where the earlier tokens of its sequence are in the KV"
SIBLINGS = "where drafts for one position run side by side"


def refusal(name: str, reason: str) -> ValueError:
    """Word the error for an architecture that cannot run."""
    return ValueError(f"architecture {name!r} is not supported: {reason}")


@contextmanager
def refusing(name: str, reason: str) -> Iterator[None]:
    """Turn whatever a model's own code raises into the refusal of its architecture."""
    try:
        yield
    except Exception as error:
        line = str(error).partition("\n")[0]
        raise refusal(name, f"{reason} ({type(error).__name__}: {line:.160})") from error


def own_logits(model: Any, tokens: Tensor) -> Tensor:
    """The logits of the model's plain forward pass over a text, [len(tokens), vocab_size]."""
    with torch.no_grad():
        return model(input_ids=tokens[None], use_cache=False).logits[0]


class Comparison:
    """The texts, and what the model's own forward makes of them.

    Args:
        own: the model's own forward: token ids [n] -> logits [n, vocab_size].
        name: the architecture, for messages.
        vocab_size: of the model.
        windows: the sliding windows of its layers.
        special: token ids that some models look for in their inputs.

    Raises:
        ValueError: the model's own forward does not run.
    """

    def __init__(
        self,
        own: Callable[[Tensor], Tensor],
        name: str,
        vocab_size: int,
        windows: tuple[int | None, ...],
        special: list[int],
        device: torch.device,
    ) -> None:
        self.name = name
        filled = [window for window in windows if window is not None and window <= LONGEST_WINDOW]
        length = max([LENGTH, *(window + 4 for window in filled)])
        spread = torch.arange(2 * length) * 7919 + 11  # a prime: no two neighbours in a vocabulary
        ids = (spread % vocab_size).to(device)
        self.first, self.second = ids[:length].clone(), ids[length : length + 10].clone()
        self.second[2 : 2 + len(special)] = torch.tensor(special, dtype=ids.dtype, device=device)
        self.others = (
            self.first[-1:] + torch.arange(1, NUM_OTHERS + 1, device=device)
        ) % vocab_size
        with refusing(name, "its own forward pass does not run on token ids alone"):
            self.of_first, self.of_second = own(self.first), own(self.second)
            ends = [own(torch.cat([self.first[:-1], other[None]]))[-1:] for other in self.others]
        self.of_siblings = torch.cat([*ends, self.of_first[-1:]])

    def check(self, model: Model, block_size: int) -> None:
        """Raise ValueError unless the model has these logits on paged KV, in every step."""
        first, second = self.first, self.second
        aux_layers = tuple(range(model.config.num_layers + 1))
        blocks = -(-(len(first) + NUM_OTHERS) // block_size)
        run = _Run(model, block_size, [range(blocks, 0, -1), range(blocks + 1, 2 * blocks + 1)])
        with refusing(self.name, "its forward does not run on packed rows"):
            at_once = run([first[:5], second[:8]], [_rows(run, 0, 0, 5), _rows(run, 1, 0, 8)])
            tree = torch.cat([first[5:-1], self.others, first[-1:]])
            forked = _forked(run, 0, 5, len(tree))
            later = run([tree, second[8:9]], [forked, _rows(run, 1, 8, 9)], aux_layers)
            alone = run([second[9:]], [_rows(run, 1, 9, 10)])
        chain, siblings, next_row = later.split([len(first) - 6, NUM_OTHERS + 1, 1])
        continued = torch.cat([chain, next_row, alone])
        of_continued = torch.cat([self.of_first[5:-1], self.of_second[8:]])
        for found, expected, where in (
            (at_once[:5], self.of_first[:5], PLAIN),
            (at_once[5:], self.of_second[:8], PACKED),
            (continued, of_continued, CONTINUED),
            (siblings, self.of_siblings, SIBLINGS),
        ):
            dtype = model.config.dtype
            off = distances(found, expected.to(found), dtype)
            error = float(off.median() if dtype.itemsize == 2 else off.max())
            if not error <= TOLERANCE[dtype]:
                raise refusal(
                    self.name,
                    f"{where} its logits are not those of its own forward pass, by {error:.2g} of "
                    "their spread",
                )


def distances(found: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The error of each row of logits [N, vocab_size], over the spread of the row: [N].

    What is rounded off the logits themselves in `dtype` does not count. NaN where only one of them
    is finite.
    """
    same = (found == expected) | (found.isnan() & expected.isnan())
    error = torch.where(same, 0.0, found - expected).double()
    usual = expected.isfinite() & (expected.abs() < 1e30)  # tokens that a model bans are far below
    values = torch.where(usual, expected, 0.0).double()
    count = usual.sum(1).clamp(min=1)
    mean = values.sum(1, keepdim=True) / count[:, None]
    spread = (torch.where(usual, values - mean, 0.0).square().sum(1) / count).sqrt()
    rounded = 4 * torch.finfo(dtype).eps * (values.square().sum(1) / count).sqrt()
    off = (error.square().mean(1).sqrt() - rounded).clamp(min=0.0)
    return (off / spread.clamp(min=1e-30)).where(off != 0, 0.0)


class _Run:
    """Paged KV for two sequences, and steps on it."""

    def __init__(self, model: Model, block_size: int, tables: list[range]) -> None:
        self.model, self.block_size = model, block_size
        self.tables = [list(table) for table in tables]
        num_slots = (1 + max(max(table) for table in self.tables)) * block_size
        spec = model.config
        self.kv = [
            LayerKV(
                *(
                    torch.zeros((num_slots, *shape), dtype=spec.dtype, device=model.device)
                    for _ in "kv"
                )
            )
            for shape in spec.kv_shapes
        ]

    def __call__(
        self, tokens: list[Tensor], rows: list[SequenceRows], aux_layers: tuple[int, ...] = ()
    ) -> Tensor:
        metadata = AttentionMetadata.from_rows(rows, self.block_size, device=self.model.device)
        hidden, _ = self.model.forward(torch.cat(tokens), metadata, self.kv, aux_layers)
        return self.model.logits(hidden)


def _rows(run: _Run, seq: int, start: int, end: int) -> SequenceRows:
    table, size = run.tables[seq], run.block_size
    return SequenceRows(
        positions=list(range(start, end)),
        slots=[table[index // size] * size + index % size for index in range(start, end)],
        context_len=start,
        block_table=table,
    )


def _forked(run: _Run, seq: int, start: int, count: int) -> SequenceRows:
    """`count` rows of which the last ones have one position, and do not see each other."""
    rows, parent = _rows(run, seq, start, start + count), count - NUM_OTHERS - 2
    mask = torch.ones(count, count, dtype=torch.bool).tril()
    mask[parent + 1 :, parent + 1 :] = torch.eye(NUM_OTHERS + 1, dtype=torch.bool)
    return SequenceRows(
        positions=[min(position, start + parent + 1) for position in rows.positions],
        slots=rows.slots,
        context_len=start,
        block_table=rows.block_table,
        suffix_mask=mask,
    )
