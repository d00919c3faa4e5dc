"""One torch thread per test process, unless FOLOSPEC_TEST_THREADS says otherwise: two workers that
spin two threads each on two cores crawl.

Ctrl-C is what it is in a process that a person started: one that was started in the background may
ignore it. Without a GPU, Triton's kernels are interpreted. Where torch is not installed,
`tests/core` runs all the same.
"""

import gc
import os
import signal
from contextlib import suppress

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Nothing is garbage of what is imported and collected: a million objects that would be looked
    through again and again, during the tests as well."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    """Slow tests first: at the end there is nobody left to share them with."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


with suppress(ImportError):
    import torch

    torch.set_num_threads(int(os.environ.get("FOLOSPEC_TEST_THREADS", "1")))
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
        with suppress(ImportError):
            from triton_interpreter import mend

            mend()
