"""One torch thread per test process: two workers that spin two threads each on two cores crawl.

Where torch is not installed, `tests/core` runs all the same.
"""

from contextlib import suppress

with suppress(ImportError):
    import torch

    torch.set_num_threads(1)
