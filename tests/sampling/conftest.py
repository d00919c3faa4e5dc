"""Every test of the pipeline holds for both of its forms."""

from collections.abc import Iterator

import pytest

from folospec.kernels import native_sampling


@pytest.fixture(scope="module", params=["torch", "native"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """float32 rows are worked off by torch, or by the native kernels; float64 rows always by
    torch."""
    if request.param == "native" and native_sampling.load() is None:
        pytest.skip("there are no native kernels here")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native_sampling, "load", lambda: None)
        yield request.param
