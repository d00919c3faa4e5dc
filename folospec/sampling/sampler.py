"""Draws tokens with keyed Gumbel noise: argmax(log_probs + g) is a sample of probs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folospec.sampling.logprobs import gather_logprobs
from folospec.sampling.noise import elementwise_gumbel, key_tensor

__all__ = ["NO_TOKEN", "draw_target", "gather_logprobs", "perturb"]

NO_TOKEN = -1
"""What is drawn from a row that has no possible token (a draft after which nothing can follow)."""

_NEG_INF = float("-inf")
_SPARSE_SHARE = 16


def perturb(log_probs: Tensor, keys: Tensor | Sequence[int]) -> Tensor:
    """Add each row's Gumbel noise to what is possible in it.

    The k largest of a row are k draws without replacement, in their order. A coupled drafter takes
    them with the keys of the target: in a reduced vocabulary it adds `noise.gumbel(keys, its token
    ids)` itself, to the same effect.

    Args:
        log_probs: float32 or float64 [num_rows, vocab_size], need not be normalised; -inf is
            impossible.
        keys: int64 [num_rows], or a list, from `noise.key`.

    Returns:
        A new tensor like `log_probs`, -inf where that is.
    """
    if not isinstance(keys, Tensor):
        keys = key_tensor(keys, log_probs.device)
    vocab_size = log_probs.shape[1]
    if _is_remote(log_probs) or _num_possible(log_probs) * _SPARSE_SHARE > log_probs.numel():
        token_ids = torch.arange(vocab_size, device=log_probs.device)
        return log_probs + elementwise_gumbel(keys[:, None], token_ids)
    return _perturb_sparse(log_probs, keys, (log_probs > _NEG_INF).nonzero(as_tuple=True))


def _is_remote(log_probs: Tensor) -> bool:
    """Whether to read a number of it means to wait for a device: then shortcuts are none."""
    return log_probs.device.type != "cpu"


def _num_possible(log_probs: Tensor) -> int:
    return int(torch.count_nonzero(log_probs > _NEG_INF))


def _perturb_sparse(log_probs: Tensor, keys: Tensor, at: tuple[Tensor, ...]) -> Tensor:
    """The noise is looked up only where it can matter; each number is the same as in a full row."""
    perturbed = torch.full_like(log_probs, _NEG_INF)
    perturbed[at] = log_probs[at] + elementwise_gumbel(keys[at[0]], at[1])
    return perturbed


def draw_target(log_probs: Tensor, keys: Tensor | Sequence[int]) -> Tensor:
    """Draw one token per row; it depends on the row and its key alone.

    Args:
        log_probs: [num_rows, vocab_size] of `pipeline.process`.
        keys: int64 [num_rows], or a list, from `noise.key` with `Purpose.TARGET` and the position
            of the token being drawn.

    Returns:
        int64 [num_rows]; of equals the lowest id, `NO_TOKEN` for a row that is -inf throughout.
    """
    best = log_probs.argmax(-1)
    best_log_prob = log_probs.gather(-1, best[:, None])[:, 0]
    if not _is_remote(log_probs) and _is_one_hot(log_probs, best_log_prob):
        return best  # no noise can change them
    perturbed = perturb(log_probs, keys)
    return perturbed.argmax(-1).masked_fill_(best_log_prob == _NEG_INF, NO_TOKEN)


def _is_one_hot(log_probs: Tensor, best_log_prob: Tensor) -> bool:
    return bool((best_log_prob == 0).all()) and _num_possible(log_probs) == len(log_probs)
