"""The order of pairs: every epoch all of them once, a function of seed and step alone, digests that see the order."""

from __future__ import annotations

import numpy as np
import pytest

from mixwright.pretrain.rpo.order import num_steps, order_digest, pairs_of_step


@pytest.mark.parametrize(("num_pairs", "per_step"), [(38, 8), (7, 16), (1, 3), (64, 64)])
def test_every_epoch_is_all_pairs_once_in_an_order_of_its_own(num_pairs: int, per_step: int) -> None:
    steps = -(-4 * num_pairs // per_step)
    stream = np.concatenate([pairs_of_step(num_pairs, per_step, 3, step) for step in range(steps)])
    epochs = stream[: 4 * num_pairs].reshape(4, num_pairs)
    for epoch in epochs:
        assert np.bincount(epoch, minlength=num_pairs).tolist() == [1] * num_pairs
    if num_pairs > 7:
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert all(epoch.tolist() != list(range(num_pairs)) for epoch in epochs)
        assert pairs_of_step(num_pairs, per_step, 4, 0).tolist() != stream[:per_step].tolist()


def test_slices_of_a_step_have_digests_that_add_up_and_depend_on_place_and_step() -> None:
    index_S = pairs_of_step(38, 8, 3, 5)
    whole = order_digest(5, index_S)
    parts = [order_digest(5, index_S[start:stop], start) for start, stop in ((0, 3), (3, 8))]
    assert sum(parts) % (1 << 64) == whole
    swapped = index_S[[1, 0, 2, 3, 4, 5, 6, 7]]
    assert len({whole, order_digest(5, swapped), order_digest(6, index_S)}) == 3


def test_steps_in_so_many_epochs() -> None:
    assert num_steps(100, 8, 2) == 25
    assert num_steps(100, 8, 0.5) == 6
    assert num_steps(3, 8, 1) == 1
