"""The best tokens of rows of logits, under each request's temperature, filters and noise, and the
confidence in them: one native call, where that runs.

`constraints.constrain` comes before it. The torch form is `pipeline.process` with `sampler.perturb`
and the k largest of every row.
"""

from __future__ import annotations

from folospec.kernels.native_children import NO_NOISE, NativeChildren, load, pack_wanted
from folospec.kernels.sampling_records import pack_law
from folospec.sampling.pipeline import pack_filters
from folospec.sampling_params import SamplingParams

__all__ = ["NO_NOISE", "NativeChildren", "load", "pack_request", "pack_wanted"]


def pack_request(params: SamplingParams, seed: int, sample_index: int) -> bytes:
    """What a request's tokens are drawn with, as `NativeChildren.draw` takes it."""
    return pack_law(seed, sample_index, pack_filters(params))
