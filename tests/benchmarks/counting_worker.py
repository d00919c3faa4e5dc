"""A worker whose engine counts instead of computing, and misbehaves when its mode says so."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers" / "workers"))

from channel import Batch, Engine, Load, Result, serve


class Counting(Engine):
    packages = ("pip",)

    def __init__(self, load: Load) -> None:
        print("engines are noisy")
        if load.mode == "unloadable":
            raise MemoryError("too large")
        self.texts = 0

    def reset(self) -> None:
        self.texts = 0

    def generate(self, batch: Batch) -> Result:
        print("very noisy")
        if batch.mode == "raising":
            raise OverflowError("too\nmuch")
        if batch.mode == "ending":
            os._exit(3)
        if batch.mode == "sleeping":
            time.sleep(60)
        if batch.mode == "lazy":
            return Result([[1] for _ in batch.prompts])
        self.texts += len(batch.prompts)
        tokens = [[ids[-1] + 1 + i for i in range(batch.max_tokens)] for ids in batch.prompts]
        return Result(tokens, {"texts": self.texts}, seconds=2.0)


if __name__ == "__main__":
    serve(Counting)
