"""Captures CUDA graphs: a function's launches are recorded once, and replayed as one.

    record   fn()  ->  every launch with its addresses and sizes
    replay   the same launches, on whatever those addresses hold now

So what changes from step to step must be the contents of tensors that stay where they are. Nothing
that the host reads, and no tensor that the function made outside of the recording, may be new.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


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
        """Run `fn`, so that kernels are compiled and libraries make their handles; record it, and
        return what replays it.

        Raises:
            RuntimeError: something in it cannot be recorded.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            fn()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile is no business of the recording.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            fn()
        return graph.replay


def recorder(device: torch.device) -> CudaGraphs | None:
    """What records graphs for a device; None where there are none."""
    return CudaGraphs(device) if device.type == "cuda" else None
