"""A graph is recorded after a warm-up, on a stream of its own that waits and is waited for, in the
pool that all graphs share."""

from contextlib import contextmanager

import pytest
import torch

from folospec.worker.cuda import capture


class Cuda:
    """Stands in for `torch.cuda`, with the signatures of its functions, and writes down what is
    called, in order."""

    def __init__(self):
        self.events, self.streams = [], []

    def graph_pool_handle(self):
        return "pool"

    def Stream(self, device=None, priority=0):  # noqa: N802 - torch's name
        assert device == torch.device("cuda", 0)
        return self._stream("side")

    def current_stream(self, device=None):
        assert device == torch.device("cuda", 0)
        return self._stream("main")

    def _stream(self, name):
        cuda = self

        class Stream:
            def wait_stream(self, other):
                cuda.events.append((name, "waits for", other.name))

        Stream.name = name
        return Stream()

    @contextmanager
    def stream(self, stream):
        self.streams.append(stream.name)
        yield
        self.streams.pop()

    @contextmanager
    def graph(self, cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        assert stream.name == "side"
        self.events.append("recording")
        yield
        self.events.append("recorded")

    def CUDAGraph(self):  # noqa: N802 - torch's name
        cuda = self

        class Graph:
            def replay(self):
                cuda.events.append("replayed")

        return Graph()


@pytest.fixture
def cuda(monkeypatch):
    stand_in = Cuda()
    for name in ("graph_pool_handle", "Stream", "current_stream", "stream", "graph", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    return stand_in


def test_a_recording_comes_after_a_warm_up_that_both_streams_wait_for(cuda):
    graphs = capture.recorder(torch.device("cuda", 0))
    replay = graphs.record(lambda: cuda.events.append(("run", tuple(cuda.streams))))
    assert cuda.events == [
        ("side", "waits for", "main"),
        ("run", ("side",)),
        ("main", "waits for", "side"),
        "recording",
        ("run", ()),
        "recorded",
    ]
    del cuda.events[:]
    replay()
    assert cuda.events == ["replayed"]


def test_there_are_no_graphs_on_a_cpu():
    assert capture.recorder(torch.device("cpu")) is None
