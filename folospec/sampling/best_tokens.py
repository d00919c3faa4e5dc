"""Finds the best tokens of rows of logits, and the confidence in them, in one native call.

Each request's temperature, filters and noise apply. It runs where the native kernels do.

`constraints.constrain` comes before it. The torch form is `pipeline.process` with `sampler.perturb`
and the k largest of every row.
"""

from __future__ import annotations

from folospec.kernels.native_children import NO_NOISE, NativeChildren, load, pack_wanted
from folospec.kernels.sampling_records import pack_sampling
from folospec.sampling.pipeline import pack_filters
from folospec.sampling_params import SamplingParams

__all__ = ["NO_NOISE", "NativeChildren", "load", "pack_request", "pack_wanted"]


def pack_request(params: SamplingParams, seed: int, sample_index: int) -> bytes:
    """What a request's tokens are drawn with, as `NativeChildren.draw` takes it."""
    return pack_sampling(seed, sample_index, pack_filters(params))
