"""The plain torch form of the small ops of a decoder layer: the oracle any faster form is judged
by.

Every op works on one row at a time: a row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale the last axis of `x` to unit root mean square, then by `weight` (Zhang, Sennrich, arXiv
    1910.07467).

    Args:
        x: [..., H] floats.
        weight: [H], of the type of `x`.
        eps: added to the mean square.
    """
    return functional.rms_norm(x, weight.shape[-1:], weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head's halves by its row's angles (Su et al., arXiv 2104.09864; the half-split
    layout of Llama).

    Args:
        x: [N, heads, D] floats.
        cos, sin: [N, 1, D / 2], of the type of `x`.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
