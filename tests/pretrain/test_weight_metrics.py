"""Figures of instance weights over a window."""

from __future__ import annotations

import pytest
import torch

from mixwright.data_mixing.weighting import Samples
from mixwright.pretrain.weight_metrics import EDGES, WeightWindow


def samples() -> Samples:
    return Samples(torch.ones(4), torch.full((4,), 8.0), torch.tensor([0, 0, 1, 1]))


def test_a_window_adds_up_its_steps_and_starts_again() -> None:
    window = WeightWindow(2)
    window.add(torch.tensor([1.0, 1.0, 1.0, 1.0]), samples())
    window.add(torch.tensor([0.0, 2.0, 3.0, 3.0]), samples())
    found = window.take(["code", "wiki"], [0.7, 0.3])
    assert found is not None
    assert found["effective_sample_size"] == pytest.approx((1 + 64 / (4 * 22)) / 2)
    assert found["weight_share"] == pytest.approx({"code": 3 / 8, "wiki": 5 / 8})
    assert found["token_share"] == pytest.approx({"code": 0.5, "wiki": 0.5})
    assert found["correlation"] == pytest.approx(-1)
    counts = dict(zip([*EDGES, None], found["histogram"]["counts"], strict=True))
    assert counts == {**dict.fromkeys([*EDGES, None], 0), 0.0625: 1, 1.0: 5, 1.5: 2}
    assert window.take(["code", "wiki"], [0.7, 0.3]) is None


def test_a_correlation_needs_mixtures_that_differ_and_domains_that_were_read() -> None:
    window = WeightWindow(2)
    window.add(torch.ones(4), samples())
    found = window.take(["code", "wiki"], [0.5, 0.5])
    assert found is not None
    assert found["correlation"] is None
