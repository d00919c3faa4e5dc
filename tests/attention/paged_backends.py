"""The backends of two parts over stand-ins of their libraries."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import two_part_steps
from flash_attn_stand_in import FlashAttn
from xformers_stand_in import Xformers

from folospec.attention.two_parts import TwoPartBackend


def flash_attn_backend(
    monkeypatch: pytest.MonkeyPatch, library: FlashAttn, *, kernel: bool = False
) -> TwoPartBackend:
    """flash-attn's; with `kernel` the kernel for trees itself, else a stand-in of it too."""
    from folospec.attention.flash_attention import FlashAttention

    _install(monkeypatch, {"flash_attn": library.module()}, kernel)
    return FlashAttention()


def xformers_backend(
    monkeypatch: pytest.MonkeyPatch, library: Xformers, *, kernel: bool = False
) -> TwoPartBackend:
    """xformers'; `kernel` as for flash-attn's."""
    from folospec.attention import xformers

    monkeypatch.setattr(xformers, "_has_block_pointers", lambda: True)
    _install(monkeypatch, library.modules(), kernel)
    return xformers.XformersAttention()


def _install(
    monkeypatch: pytest.MonkeyPatch, modules: dict[str, ModuleType | Any], kernel: bool
) -> None:
    from folospec.kernels.gpu import attention

    for path, module in modules.items():
        monkeypatch.setitem(sys.modules, path, module)
    if not kernel:
        monkeypatch.setattr(attention, "attend_suffix", two_part_steps.attend_suffix)
