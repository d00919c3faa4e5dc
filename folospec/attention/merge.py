"""Merges two attentions over disjoint keys by their log-sum-exps (arXiv 2402.05099).

    out = (out_a * exp(lse_a) + out_b * exp(lse_b)) / (exp(lse_a) + exp(lse_b))
        = out_a + sigmoid(lse_b - lse_a) * (out_b - out_a)

The second line takes no exponential that could overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Attention over the keys of both parts.

    Args:
        out_a, out_b: [rows, heads, size], each over the keys of its own part; finite.
        lse_a, lse_b: [rows, heads], the natural logarithm of the sum of the exponentials of the
            part's scores: -inf where a row sees no key of the part. A row sees keys of one at
            least.

    Returns:
        float32 [rows, heads, size].
    """
    share = torch.sigmoid(lse_b.float() - lse_a.float())
    return torch.lerp(out_a.float(), out_b.float(), share.unsqueeze(-1))
