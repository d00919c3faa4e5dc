"""Who takes part in the comparison with the peers, how each is set, and in which process it runs.

folospec         every setting of `LLM` that is asked for, a process each
transformers     plain, draft_model, lookup, generate_batch     one process
vllm             plain, draft_model, lookup                     a process each
openvino         plain, draft_model, lookup                     a process each
llama_cpp        plain, lookup                                  one process
llama_cpp_q4_1   the same, with SmolLM2 as it is published      one process
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lib.limits import ITEM_BYTES, Work
from benchmarks.peers.checkpoints import checkpoint_for, has_draft
from benchmarks.peers.kinds import FOLOSPEC_KIND, PEER_KINDS, PeerKind, Precision
from benchmarks.peers.process import WorkerProcess
from benchmarks.peers.venvs import PEERS, environment_of, python_of
from folospec.kernels.targets import cpu_flags

WORKERS = Path(__file__).parent / "workers"
ANCHOR = "folospec plain"
"""The contestant that all others are compared with, in every group."""
DRAFT = "folospec-demo-draft"
FOLOSPEC: list[dict[str, Any]] = [
    {"name": "plain"},
    {"name": "auto", "speculative": {"method": "auto", "model": DRAFT}},
    {"name": "suffix", "speculative": "suffix"},
    {
        "name": "draft_model",
        "speculative": {"method": "draft_model", "model": DRAFT, "num_speculative_tokens": 5},
    },
    {
        "name": "draft_model sequoia",
        "speculative": {"method": "draft_model", "model": DRAFT, "tree": "sequoia"},
    },
    {
        "name": "suffix+draft_model",
        "speculative": {
            "drafters": ["suffix", {"method": "draft_model", "model": DRAFT, "tree": "dynamic"}],
            "merge": True,
        },
    },
]
FOLOSPEC_ALONE = [setting for setting in FOLOSPEC if setting["name"] in ("plain", "suffix")]
FOLOSPEC_ALONE.insert(1, {"name": "auto", "speculative": "auto"})
"""The settings where there is no draft model."""
NATIVE = "native"
TARGETS: dict[str, dict[str, str]] = {
    NATIVE: {},
    "x86-64-v3": {
        "FOLOSPEC_KERNELS_TARGET": "x86-64-v3",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
"""What tells folospec, torch, and oneDNN in torch and OpenVINO to leave newer instructions alone;
llama.cpp is built for them, and the worker of vLLM chooses its library by them."""
NGRAM = 3
"""Longest n-gram that the peers' lookups match."""
ASSISTANT_CONFIDENCE = 0.4
"""What transformers takes by default: a draft ends at a token less likely than this."""
GIB = 1 << 30


def has_wide_vectors(target: str) -> bool:
    """Whether the contestants may use more than AVX2, and the processor has more."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return target == NATIVE and not (is_x86 and "avx512f" not in cpu_flags())


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to generate."""

    name: str
    peer: str
    mode: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> PeerKind:
        return PEER_KINDS.get(self.peer, FOLOSPEC_KIND)

    @property
    def engine(self) -> str:
        """Whose environment and script its process has."""
        return self.kind.engine or self.peer

    @property
    def worker(self) -> str:
        """The name of the process that it runs in."""
        return self.peer if self.kind.shares_process else self.name

    @property
    def is_speculative(self) -> bool:
        if self.peer == "folospec":
            return self.options.get("speculative") is not None
        return self.mode in ("draft_model", "lookup")

    @property
    def is_rival(self) -> bool:
        """Whether folospec is compared with it."""
        return self.peer != "folospec" and self.kind.is_rival

    def takes(self, batch: int) -> bool:
        return batch == 1 or self.mode not in self.kind.only_batch_1


def make_contestants(
    folospec: Sequence[dict[str, Any]] | None,
    peers: Sequence[str],
    draft_tokens: Sequence[int],
    checkpoint: str = "demo",
) -> list[Contestant]:
    """folospec's settings, then the peers' modes, the speculative ones once per number of tokens.

    Args:
        folospec: None for those that the checkpoint can have.
        checkpoint: what all of them run; without a draft model nobody drafts with one.

    Raises:
        ValueError: a setting has no name, a name comes twice, or a peer is unknown.
    """
    if folospec is None:
        folospec = FOLOSPEC if has_draft(checkpoint) else FOLOSPEC_ALONE
    found = []
    for setting in folospec:
        if not isinstance(setting.get("name"), str):
            raise ValueError(f"a setting of folospec needs a name, got {setting}")
        options = {key: value for key, value in setting.items() if key != "name"}
        found.append(Contestant(f"folospec {setting['name']}", "folospec", "llm", options))
    for peer in peers:
        if peer not in PEER_KINDS:
            raise ValueError(f"peers must be of {', '.join(PEER_KINDS)}, got {peer!r}")
        if PEER_KINDS[peer].only_checkpoint in ("", checkpoint):
            for mode in PEER_KINDS[peer].modes:
                if mode != "draft_model" or has_draft(checkpoint):
                    found += _of_mode(peer, mode, draft_tokens)
    names = [contestant.name for contestant in found]
    if len(set(names)) < len(names):
        raise ValueError(f"names must differ, got {names}")
    return found


def _of_mode(peer: str, mode: str, draft_tokens: Sequence[int]) -> list[Contestant]:
    if mode not in ("draft_model", "lookup"):
        return [Contestant(f"{peer} {mode}", peer, mode)]
    options: dict[str, Any] = {}
    if mode == "lookup":
        options["ngram"] = NGRAM
    elif peer == "transformers":
        options["assistant_confidence_threshold"] = ASSISTANT_CONFIDENCE
    return [
        Contestant(
            f"{peer} {mode} k={count}", peer, mode, {"num_speculative_tokens": count, **options}
        )
        for count in draft_tokens
    ]


@dataclass(frozen=True, slots=True)
class Setup:
    """What all contestants have in common on one checkpoint and type."""

    checkpoint: str
    dtype: str
    threads: int
    max_batch: int
    max_len: int
    timeout: float
    target: str = NATIVE
    """The instructions that everybody may use."""

    def precision(self, contestant: Contestant) -> Precision:
        """What a contestant calculates in."""
        return contestant.kind.precision_of(self.dtype, has_wide_vectors(self.target))

    def kv_bytes(self, work: Work) -> int:
        """What the largest batch needs, and half as much for drafts."""
        entries = work.kv_entries * self.max_len * self.max_batch
        return 3 * ITEM_BYTES[self.dtype] * entries // 2

    def kv_gib(self, work: Work) -> int:
        """Size of the KV pools, which some engines take in whole GiB."""
        return -(-self.kv_bytes(work) // GIB)

    def gib(self, contestant: Contestant, work: Work) -> float:
        """Memory of a contestant's process, about."""
        kind = contestant.kind
        weights = ITEM_BYTES[self.dtype] * (work.layer_weights + 2 * work.output_weights)
        num_bytes = kind.weight_copies * weights + self.kv_bytes(work)
        return kind.base_gib + num_bytes / GIB

    def load_message(self, contestant: Contestant, work: Work) -> dict[str, Any]:
        """What the worker is told. Conversions that are lacking are made.

        Raises:
            RuntimeError: a converter failed.
        """
        peer = contestant.peer
        reader = "folospec" if contestant.engine == "llama_cpp" else peer
        draft = checkpoint_for(reader, "draft", self.dtype) if has_draft(self.checkpoint) else ""
        return {
            "checkpoint": str(checkpoint_for(peer, self.checkpoint, self.dtype)),
            "draft": str(draft),
            "dtype": self.dtype,
            "threads": self.threads,
            "max_batch": self.max_batch,
            "max_len": self.max_len,
            "kv_gib": self.kv_gib(work),
            "mode": contestant.mode,
            "options": contestant.options,
        }

    def process(self, contestant: Contestant, work: Work) -> WorkerProcess:
        script = WORKERS / f"{contestant.engine}_worker.py"
        python = python_of(environment_of(contestant.engine, self.target))
        return WorkerProcess(
            [str(python), str(script)],
            environment(contestant.engine, self.threads, self.kv_gib(work), self.target),
            PEERS / "logs" / f"worker-{contestant.worker.replace(' ', '-')}.log",
            self.timeout,
        )


def environment(peer: str, threads: int, kv_gib: int, target: str = NATIVE) -> dict[str, str]:
    """The environment variables of a worker."""
    common = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **TARGETS[target],
    }
    if peer != "vllm":
        return common
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        **common,
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(PEERS / ("vllm-cache" if target == NATIVE else f"vllm-{target}")),
        # It warns that it is slow without.
        "LD_PRELOAD": str(PEERS / "vllm" / "lib" / "libiomp5.so"),
    }


def groups(
    contestants: Sequence[Contestant], setup: Setup, work: Work, memory_gib: float
) -> list[list[Contestant]]:
    """Divide contestants into groups whose processes fit into the memory together, the anchor (or
    who comes first) in every one. One that fits beside none is in a group with the anchor alone."""
    anchor = next((c for c in contestants if c.name == ANCHOR), contestants[0])
    found: list[list[Contestant]] = [[anchor]]
    workers, used = {anchor.worker}, setup.gib(anchor, work)
    for contestant in contestants:
        if contestant == anchor:
            continue
        size = 0.0 if contestant.worker in workers else setup.gib(contestant, work)
        if used + size > memory_gib and len(found[-1]) > 1:
            found.append([anchor])
            workers, used = {anchor.worker}, setup.gib(anchor, work)
            size = 0.0 if contestant.worker in workers else setup.gib(contestant, work)
        found[-1].append(contestant)
        workers.add(contestant.worker)
        used += size
    return found
