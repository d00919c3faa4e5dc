from __future__ import annotations

from dataclasses import dataclass

import harness
import pytest


@dataclass(frozen=True)
class Models:
    """Folders of a tiny target, a draft model that often agrees with it, and one that knows
    nothing."""

    target: str
    near: str
    far: str


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    target = harness.save_tiny_llama(folder / "target", layers=2, hidden=32, seed=0)
    return Models(
        target=target,
        near=harness.perturbed_copy(target, folder / "near", scale=0.12, seed=1),
        far=harness.save_tiny_llama(folder / "far", layers=1, hidden=16, seed=2),
    )


@pytest.fixture(scope="session")
def plain(models: Models) -> harness.Run:
    """The mixed batch, decoded plainly: what every speculative run must reproduce."""
    return harness.run(harness.make_llm(models.target))


@pytest.fixture
def oracle(plain: harness.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drafters that know the future know that of the mixed batch, during this test."""
    monkeypatch.setattr(harness.OracleTreeDrafter, "futures", harness.futures_of(plain))
