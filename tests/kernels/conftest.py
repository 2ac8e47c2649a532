"""Small blocks and slices, so that small problems have many of them and none divides the sizes."""

from __future__ import annotations

import pytest

from mixwright.kernels import blocks, late_bound


@pytest.fixture(autouse=True)
def many_blocks_and_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CPU_CACHED_ROWS", 13)
    monkeypatch.setattr(blocks, "CPU_SCRATCH_ROWS", 11)
    monkeypatch.setattr(late_bound, "CPU_SLICE_BYTES", 1)
