"""CUDA graphs: a function's launches are recorded once, and replayed as one.

    record   fn()  ->  every launch with its addresses and sizes
    replay   the same launches, on whatever those addresses hold now

So what changes from step to step must be the contents of tensors that stay where they are. Nothing
that the host reads, and no tensor that the function made outside of the recording, may be new.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_WARM_UPS = 2
"""Runs before the recording: kernels are compiled and libraries make their handles in them."""


class CudaGraphs:
    """Records graphs that share one pool of memory: they never run at the same time.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, fn: Callable[[], None]) -> Callable[[], None]:
        """Run `fn` a few times, record it, and return what replays it."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                fn()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            fn()
        return graph.replay


def recorder(device: torch.device) -> CudaGraphs | None:
    """What records graphs for a device; None where there are none."""
    return CudaGraphs(device) if device.type == "cuda" else None
