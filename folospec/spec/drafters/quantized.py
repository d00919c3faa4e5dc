"""Drafts with the target's own weights, rounded to fewer bits (arXiv 2503.13565).

That is ML-SpecQD; QuantSpec (arXiv 2502.10424) rounds the KV too.

Decoding waits for the weights to be read, so the same weights in fewer bits are a cheaper model,
and one that nearly always agrees. There is nothing to train, and no KV to keep: the drafter reads
the target's own KV, and writes its rows at the slots that verification writes next.

    slots      t0 t1 ... t8 | root  x1  x2  x3
    drafting    read        |  w    w   w          rounded weights; x3 is proposed and never run
    verifying   read        |  W    W   W   W      exact weights write every one of them again
    commit                  |  W    W              root and x1, say: no row of the draft is left

Here the matrices are int8 with one scale per output channel (`kernels.torch_ops.quantize_int8`);
embedding, norms and KV are the target's. The papers go down to 4 bits. What it gains in time hangs
on the kernel of the product: the native one reads a quarter of what float32 weights take; the plain
torch form, `linear_int8`, gains none.
"""

from __future__ import annotations

from folospec.spec.drafters.base import DrafterContext
from folospec.spec.drafters.model_drafter import DRAFTING_OPTIONS, ModelDrafter


class QuantizedDrafter(ModelDrafter):
    """Drafts with an int8 copy of the target.

    Raises:
        ValueError: the target cannot be copied, or an option is wrong.
    """

    def __init__(self, context: DrafterContext) -> None:
        context.refuse_model()
        options = context.read_options(DRAFTING_OPTIONS)
        super().__init__(context, options, context.self_draft_model(quantized=True))
