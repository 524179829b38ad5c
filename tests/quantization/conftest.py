"""What fake quantization is computed by, for tests that hold of each form."""

from __future__ import annotations

import pytest

from hf_qat.quantization.kernels import cpu


@pytest.fixture(params=["PyTorch", "loops"])
def each_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By PyTorch's operations, and by the loops that Numba compiles."""
    if request.param == "PyTorch":
        monkeypatch.setattr(cpu, "_works", lambda: False)
    else:
        pytest.importorskip("numba")
    return request.param
