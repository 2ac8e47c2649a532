"""Damage to training rows: as much as was asked for, always the same, of nothing else."""

from __future__ import annotations

import numpy as np

from mixwright.data_mixing.plan import RowRefs
from mixwright.pretrain.sweeps.damage import COPIED_ROWS, Damage


def refs(domains: int = 3, rows: int = 2000) -> RowRefs:
    domain_n, row_n = (grid.ravel() for grid in np.meshgrid(np.arange(domains), np.arange(rows)))
    return RowRefs(np.arange(len(row_n)), domain_n, np.zeros_like(row_n), row_n)


def test_a_part_of_the_rows_becomes_copies_of_a_few_of_their_own_domain() -> None:
    whole = refs()
    read = Damage(duplicated=0.3).redirect(whole)
    changed_n = read.row_n != whole.row_n
    assert 0.28 < changed_n.mean() < 0.32
    assert read.row_n[changed_n].max() == COPIED_ROWS - 1
    assert np.array_equal(read.domain_n, whole.domain_n)
    assert len(np.unique(read.row_n[(whole.domain_n == 1) & changed_n])) == COPIED_ROWS


def test_noised_rows_have_half_their_tokens_wrong_and_the_others_none() -> None:
    whole = refs()
    tokens_nS = np.full((len(whole.row_n), 65), 600)
    spoilt_nS = Damage(noised=0.2).spoil(tokens_nS, whole, 500)
    wrong_n = (spoilt_nS != tokens_nS).mean(axis=1)
    assert 0.18 < (wrong_n > 0).mean() < 0.22
    assert 0.49 < wrong_n[wrong_n > 0].mean() < 0.51
    drawn = spoilt_nS[spoilt_nS != tokens_nS]
    assert (drawn.min(), drawn.max()) == (0, 499)
    assert abs(drawn.mean() - 249.5) < 2


def test_a_row_is_damaged_alike_whoever_reads_it_and_whenever() -> None:
    whole, damage = refs(), Damage(noised=0.5)
    tokens_nS = np.arange(len(whole.row_n) * 4).reshape(-1, 4)
    at_once_nS = damage.spoil(tokens_nS, whole, 500)
    some = np.array([5, 1234, 77])
    part = RowRefs(np.arange(3), whole.domain_n[some], np.ones(3, dtype=np.int64), whole.row_n[some])
    assert np.array_equal(damage.spoil(tokens_nS[some], part, 500), at_once_nS[some])


def test_without_damage_nothing_changes() -> None:
    whole = refs()
    tokens_nS = np.arange(len(whole.row_n))[:, None]
    assert Damage().redirect(whole) is whole
    assert Damage().spoil(tokens_nS, whole, 500) is tokens_nS
