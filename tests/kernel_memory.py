"""How far the memory reaches that a function of the native kernels is given addresses of.

`EXTENTS` has an entry for each function that `emulated_kernels` can call: it reads the sizes in the
arguments, and in the structs that they point to, as `folospec/kernels/cpu` does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import Structure, c_char, c_void_p
from typing import Any, Protocol, TypeVar

import numpy as np

from folospec.kernels import native, native_children, native_sampling, sampling_records

INT, LONG, FLOAT = 4, 8, 4
FORMAT_BYTES = {0: 4, 1: 2, 2: 1}

S = TypeVar("S", bound=Structure)


class Library(Protocol):
    """What is asked for the size of the scratch."""

    folospec_scratch_floats: Callable[[int, int], int]


class Memory:
    """What a call can reach, as far as it is told."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.parts: list[tuple[int, int]] = []
        self.pointers: list[tuple[int, int]] = []
        """Where a pointer lies in memory, and where it points to."""

    def add(self, *parts: tuple[int, int]) -> None:
        """Addresses, 0 for none, and how many bytes there are."""
        self.parts += [(address, size) for address, size in parts if address]

    def struct(self, address: int, kind: type[S]) -> S:
        self.add((address, ctypes.sizeof(kind)))
        return kind.from_address(address)

    def follow(self, struct: Structure, **sizes: int) -> None:
        """Pointers of a struct, with the sizes of what they point to."""
        for name, size in sizes.items():
            self.point(ctypes.addressof(struct) + getattr(type(struct), name).offset, size)

    def point(self, at: int, size: int) -> int:
        """A pointer that lies in memory; returns where it points to."""
        target = c_void_p.from_address(at).value or 0
        if target:
            self.pointers.append((at, target))
            self.add((target, size))
        return target

    def regions(self) -> list[tuple[int, int]]:
        """All of it, without overlaps."""
        merged: list[tuple[int, int]] = []
        for address, size in sorted(self.parts):
            if merged and address < sum(merged[-1]):
                begin = merged[-1][0]
                merged[-1] = (begin, max(sum(merged[-1]), address + size) - begin)
            elif size:
                merged.append((address, size))
        return merged


def integers(address: int, count: int, dtype: type[np.integer[Any]]) -> np.ndarray[Any, Any]:
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((c_char * size).from_address(address) if size else b"", dtype)


def ceiling(*lists: np.ndarray[Any, Any]) -> int:
    """One more than the largest member of any."""
    return max((int(each.max()) + 1 for each in lists if each.size), default=0)


def matrix(memory: Memory, weight: native.Matrix) -> None:
    outputs, inputs = weight.out_size, weight.in_size
    size = outputs * inputs * FORMAT_BYTES[weight.format]
    memory.follow(weight, data=size, scale=FLOAT * outputs, bias=FLOAT * outputs)


def linear(memory: Memory, weight: int, x: int, room: int, rows: int, y: int, _: int) -> None:
    described = memory.struct(weight, native.Matrix)
    matrix(memory, described)
    row_bytes = FLOAT * (described.in_size + 31)
    memory.add((x, FLOAT * rows * described.in_size), (room, rows * row_bytes))
    memory.add((y, FLOAT * rows * described.out_size))


def step(memory: Memory, described: native.AttentionStep, slot_mapping: int) -> int:
    """What an attention step points to; returns the bytes of a layer's keys, or values."""
    s, rows = described, described.rows
    row_seq = integers(s.row_seq, rows, np.int32)
    num_keys = integers(s.num_keys, rows, np.int32)
    seqs = ceiling(row_seq)
    contexts = integers(s.context_lens, seqs, np.int32)
    table = integers(s.block_table, seqs * s.table_width, np.int32)
    tail_start = integers(s.tail_start, rows, np.int64)
    num_tail = ceiling(tail_start + num_keys - contexts[row_seq]) - 1
    tails = integers(s.tail_slots, num_tail, np.int64)
    memory.follow(
        s,
        row_seq=INT * rows,
        num_keys=INT * rows,
        first_key=INT * rows,
        context_lens=INT * seqs,
        block_table=INT * len(table),
        tail_start=LONG * rows,
        tail_slots=LONG * num_tail,
        group_start=INT * (s.groups + 1),
    )
    memory.add((slot_mapping, LONG * rows))
    slots = max(
        ceiling(table) * s.block_size, ceiling(tails, integers(slot_mapping, rows, np.int64))
    )
    return slots * s.kv_heads * s.head_size * FORMAT_BYTES[s.kv_format]


def attention(
    memory: Memory, described: int, pages: int, queries: int, keys: int, values: int,
    slot_mapping: int, out: int, _: int,
) -> None:  # fmt: skip
    s = memory.struct(described, native.AttentionStep)
    kv_bytes = step(memory, s, slot_mapping)
    memory.follow(memory.struct(pages, native.Pages), key=kv_bytes, value=kv_bytes)
    width, kv_width = (FLOAT * s.rows * heads * s.head_size for heads in (s.heads, s.kv_heads))
    memory.add((queries, width), (keys, kv_width), (values, kv_width), (out, width))


def forward(memory: Memory, model: int, call: int) -> None:
    m, p = memory.struct(model, native.ModelStruct), memory.struct(call, native.Pass)
    rows, hidden, size = p.attention.rows, m.hidden, p.attention.head_size
    kv_bytes = step(memory, p.attention, p.slot_mapping)
    ids = integers(p.input_ids, rows, np.int64)
    angles = FLOAT * ceiling(integers(p.positions, rows, np.int64)) * size // 2
    layers = (native.Layer * m.num_layers).from_address(ctypes.addressof(m.layers.contents))
    for layer in layers:
        memory.follow(layer, input_norm=FLOAT * hidden, post_norm=FLOAT * hidden)
        memory.follow(layer, query_norm=FLOAT * size, key_norm=FLOAT * size)
        memory.follow(layer.pages, key=kv_bytes, value=kv_bytes)
        for weight in (layer.qkv, layer.output, layer.gate_up, layer.down):
            matrix(memory, weight)
    memory.follow(
        m,
        layers=ctypes.sizeof(layers),
        embedding=ceiling(ids) * hidden * FORMAT_BYTES[m.embedding_format],
        final_norm=FLOAT * hidden,
    )
    memory.follow(
        p,
        input_ids=LONG * rows,
        positions=LONG * rows,
        slot_mapping=LONG * rows,
        cos=angles,
        sin=angles,
        window_first=INT * rows * max(layer.window for layer in layers),
        hidden=FLOAT * rows * hidden,
        aux_hidden_states=LONG * (m.num_layers + 1),
        scratch=FLOAT * memory.library.folospec_scratch_floats(model, call),
    )
    for layer_number in range(m.num_layers + 1):
        memory.point(p.aux_hidden_states + LONG * layer_number, FLOAT * rows * hidden)


def scratch_floats(memory: Memory, model: int, call: int) -> None:
    memory.struct(model, native.ModelStruct)
    memory.struct(call, native.Pass)


def rms_norm(memory: Memory, x: int, weight: int, rows: int, size: int, _: float, out: int) -> None:
    memory.add((x, FLOAT * rows * size), (weight, FLOAT * size), (out, FLOAT * rows * size))


def rotate(
    memory: Memory, heads: int, cos: int, sin: int, rows: int, heads_per_row: int, size: int
) -> None:
    angles = FLOAT * rows * (size // 2)
    memory.add((heads, FLOAT * rows * heads_per_row * size), (cos, angles), (sin, angles))


def silu_mul(memory: Memory, gate_up: int, rows: int, inner: int, out: int) -> None:
    memory.add((gate_up, FLOAT * rows * 2 * inner), (out, FLOAT * rows * inner))


def move_rows(
    memory: Memory, tensors: int, sizes: int, num_tensors: int, sources: int, targets: int,
    count: int, held: int,
) -> None:  # fmt: skip
    memory.add((tensors, LONG * num_tensors), (sizes, LONG * num_tensors))
    memory.add((sources, LONG * count), (targets, LONG * count))
    row_bytes = integers(sizes, num_tensors, np.int64)
    rows = ceiling(*(integers(each, count, np.int64) for each in (sources, targets)))
    for number, size in enumerate(row_bytes.tolist()):
        memory.point(tensors + LONG * number, rows * size)
    memory.add((held, count * int(row_bytes.max(initial=0))))


PARAMS = sampling_records.NOISE.size + sampling_records.FILTERS.size


def verify(
    memory: Memory, logits: int, size: int, all_params: int, trees: int, nodes: int, count: int,
    verified: int, paths: int, _: int,
) -> None:  # fmt: skip
    root, _, begin, length = integers(trees, 4 * count, np.int64).reshape(-1, 4).T
    memory.add((logits, FLOAT * size * ceiling(root + length)), (all_params, PARAMS * count))
    memory.add((trees, sampling_records.TREE.size * count))
    num_nodes = ceiling(begin + 2 * length) - 1
    memory.add((nodes, LONG * num_nodes), (paths, LONG * num_nodes))
    memory.add((verified, native_sampling._VERIFIED.size * count))


def log_probs(
    memory: Memory, logits: int, size: int, all_params: int, params_of: int, count: int, out: int,
    peaks: int, _: int,
) -> None:  # fmt: skip
    num_distributions = ceiling(integers(params_of, count, np.int64))
    memory.add(
        (logits, FLOAT * size * count),
        (all_params, PARAMS * num_distributions),
        (params_of, LONG * count),
    )
    memory.add((out, FLOAT * size * count), (peaks, FLOAT * count))


def children(
    memory: Memory, logits: int, size: int, all_params: int, wanted: int, rows: int, most: int,
    tokens: int, chances: int, found: int, _: int,
) -> None:  # fmt: skip
    wanted_size = native_children._WANTED.size
    params_of = integers(wanted, rows * wanted_size // LONG, np.int64)[:: wanted_size // LONG]
    memory.add((logits, FLOAT * size * rows), (all_params, PARAMS * ceiling(params_of)))
    memory.add((wanted, wanted_size * rows), (found, LONG * rows))
    memory.add((tokens, LONG * rows * most), (chances, FLOAT * rows * most))


EXTENTS: dict[str, Callable[..., None]] = {
    "folospec_sizes": lambda memory, to: memory.add((to, LONG * len(native._STRUCTS))),
    "folospec_sampling_sizes": lambda memory, to: memory.add((to, LONG * 3)),
    "folospec_sizeof_wanted": lambda memory: None,
    "folospec_instruction_set": lambda memory: None,
    "folospec_read": lambda memory, numbers, count, _: memory.add((numbers, FLOAT * count)),
    **{
        f"folospec_{known.__name__}": known
        for known in (
            *(linear, attention, forward, scratch_floats, rms_norm, rotate, silu_mul, move_rows),
            *(verify, log_probs, children),
        )
    },
}
"""By function: a `Memory`, then its arguments. Says what it can reach."""
