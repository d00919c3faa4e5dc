"""Stands in for CUDA graphs where there is no card: it records what a function launches, and
replays that, and nothing else of the function.

    record   every op of torch and every launch of a kernel, with the very tensors it was given
    replay   what the recording made is poisoned; then the ops run again, each into the tensors that
             it made the first time

So numbers and shapes are those of the recording, as on a card, and only what tensors hold can
differ. What a card refuses while it records is refused here: reading a tensor on the host, and
bringing host data to the device.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from folospec.kernels.gpu import launch as door

HOST_READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu")
FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_pinned", "masked_select")


class CannotBeRecorded(AssertionError):
    """A card would refuse it too."""


class _Ops(TorchDispatchMode):
    def __init__(self, tape):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name.split(".")[0] in FORBIDDEN:
            raise CannotBeRecorded(f"{name} while a graph is recorded")
        out = func(*args, **(kwargs or {}))
        if not self.tape.is_launching:
            self.tape.add_op(func, args, kwargs or {}, out)
        return out


def tensors_of(tree):
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


class Tape:
    """One recording."""

    def __init__(self):
        self.steps, self.made = [], []
        self.is_launching = False

    def add_op(self, func, args, kwargs, out):
        inputs, outputs = tensors_of((args, kwargs)), tensors_of(out)
        known = {storage(tensor) for tensor in inputs}
        fresh = [tensor for tensor in outputs if storage(tensor) not in known]
        self.made += fresh
        is_empty = func._schema.name in ("aten::empty", "aten::empty_like", "aten::new_empty")
        is_view = not fresh and not func._schema.is_mutable
        if not (is_empty or is_view):
            self.steps.append((func, args, kwargs, outputs if fresh else []))

    def launch(self, kernel, grid, *args, **options):
        self.steps.append((self.plain_launch, (kernel, grid, *args), options, []))
        self._launch(kernel, grid, *args, **options)

    def _launch(self, kernel, grid, *args, **options):
        self.is_launching = True
        with mock.patch.multiple(Tensor, **self.host_reads):  # the interpreter may
            self.plain_launch(kernel, grid, *args, **options)
        self.is_launching = False

    def record(self, fn):
        self.plain_launch = door.launch
        self.host_reads = {name: getattr(Tensor, name) for name in HOST_READS}

        def refuse(*_, **__):
            raise CannotBeRecorded("a tensor is read on the host while a graph is recorded")

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(door, "launch", self.launch))
            stack.enter_context(mock.patch.multiple(Tensor, **dict.fromkeys(HOST_READS, refuse)))
            stack.enter_context(_Ops(self))
            fn()

    @torch.inference_mode()
    def replay(self):
        for tensor in self.made:
            tensor.fill_(math.nan if tensor.is_floating_point() else 1)
        for func, args, kwargs, outputs in self.steps:
            found = tensors_of(func(*args, **kwargs))
            for place, value in zip(outputs, found, strict=False):
                place.copy_(value)


class StandIn:
    """A `worker.cuda.graphs.Recorder`; counts what it recorded and replayed."""

    def __init__(self):
        self.num_recorded = self.num_replayed = 0

    @torch.inference_mode()
    def record(self, fn):
        fn()
        tape = Tape()
        tape.record(fn)
        self.num_recorded += 1

        def replay():
            self.num_replayed += 1
            tape.replay()

        return replay
