import os
import subprocess
import sys
from pathlib import Path

import folospec

PROGRAM = """
import sys
for name in ("torch", "transformers"):
    sys.modules[name] = None  # importing it raises ImportError
from folospec.core import KVCacheManager, Scheduler, SequenceGroup, SequenceStatus, TokenTree
from folospec.sampling_params import SamplingParams

manager = KVCacheManager(8, 4, enable_prefix_caching=True)
scheduler = Scheduler(
    manager, max_num_seqs=2, max_num_batched_tokens=16, enable_chunked_prefill=True
)
scheduler.add(SequenceGroup("r", [1, 2, 3], SamplingParams(), arrival=0))
(step,) = scheduler.schedule({{"r-0": 2}}).steps
manager.commit(step.seq, 3)
scheduler.finish(step.seq, SequenceStatus.FINISHED_STOPPED)
scheduler.check_integrity()
assert TokenTree.chain([1, 2]).ancestor_mask().shape == (3, 3)
import {blocked}
"""


def run(blocked: str) -> subprocess.CompletedProcess[str]:
    root = Path(folospec.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(blocked=blocked)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_core_imports_and_works_without_torch_and_transformers() -> None:
    done = run("folospec.core")
    assert done.returncode == 0, done.stderr


def test_the_block_on_torch_is_a_real_one() -> None:
    done = run("torch")
    assert done.returncode != 0
    assert "torch" in done.stderr
