"""Which documents are kept and in which split: compared with plain Python, and the guarantees spelt out."""

from __future__ import annotations

import numpy as np
import pytest

from mixwright.data_mixing.corpora import DomainSource, SplitFractions
from mixwright.data_mixing.selection import (
    DROPPED,
    assign_splits,
    excerpt_bytes,
    find_duplicates,
    seeded_cut,
    select,
)
from tests.data_mixing.corpora_for_tests import scan_of, sentences


def source(max_bytes: int | None = None) -> DomainSource:
    return DomainSource.model_validate({"paths": ("x",), "max_bytes": max_bytes})


def test_duplicates_are_all_but_the_first_of_each() -> None:
    chance = np.random.default_rng(4)
    identity_n2 = chance.integers(0, 12, (400, 2), np.uint64)
    seen: set[tuple[int, int]] = set()
    expected = []
    for low, high in identity_n2.tolist():
        expected.append((low, high) in seen)
        seen.add((low, high))
    assert find_duplicates(identity_n2).tolist() == expected


def test_of_equal_documents_over_domains_the_first_listed_domain_keeps_its_first() -> None:
    scans = [scan_of(["x", "y", "x"]), scan_of(["z", "y", "x", "w"])]
    chosen = select(scans, [source(), source()], SplitFractions(validation=0, test=0))
    assert [c.split_n.tolist() for c in chosen] == [[0, 0, DROPPED], [0, DROPPED, DROPPED, 0]]
    assert [c.num_duplicate for c in chosen] == [1, 2]


def test_the_cut_takes_documents_by_rank_until_the_next_would_exceed_the_limit() -> None:
    scan = scan_of(sentences(1, 300))
    candidate_n = np.arange(300) % 3 > 0
    kept_n = seeded_cut(scan.rank_n, scan.num_bytes_n, candidate_n, 9_000)
    total, expected = 0, set()
    for i in sorted(np.flatnonzero(candidate_n).tolist(), key=lambda i: int(scan.rank_n[i])):
        if total + scan.num_bytes_n[i] > 9_000:
            break
        total += int(scan.num_bytes_n[i])
        expected.add(i)
    assert set(np.flatnonzero(kept_n).tolist()) == expected
    assert 8_500 < total <= 9_000


def test_the_cut_is_spread_over_the_documents_and_follows_the_seed() -> None:
    texts = sentences(1, 2000)
    kept = [
        np.flatnonzero(seeded_cut(s.rank_n, s.num_bytes_n, np.ones(2000, bool), int(s.num_bytes_n.sum() // 4)))
        for s in (scan_of(texts, seed=1), scan_of(texts, seed=2))
    ]
    for chosen in kept:
        per_quarter = np.bincount(chosen // 500, minlength=4)
        assert per_quarter.min() > 90, "500 kept of 2000: about 125 of each quarter"
    assert 80 < len(np.intersect1d(*kept)) < 170, "two seeds share about a quarter of 500"


def test_a_document_over_the_limit_does_not_block_the_others() -> None:
    texts = ["x" * 5_000, *sentences(1, 50)]
    for seed in range(5):
        scan = scan_of(texts, seed)
        kept_n = seeded_cut(scan.rank_n, scan.num_bytes_n, np.ones(51, bool), 3_000)
        assert not kept_n[0]
        assert 2_500 < scan.num_bytes_n[kept_n].sum() <= 3_000


def test_what_is_over_the_limit_is_counted() -> None:
    scan = scan_of([*sentences(1, 100), *sentences(1, 3)])
    (chosen,) = select([scan], [source(5_000)], SplitFractions())
    assert chosen.num_duplicate == 3
    assert chosen.num_over_limit == 100 - int((chosen.split_n != DROPPED).sum())


def test_split_shares_are_as_asked_and_depend_on_the_document_alone() -> None:
    identity_n2 = scan_of(sentences(9, 20_000, num_words=1)).identity_n2
    split_n = assign_splits(identity_n2, SplitFractions(validation=0.1, test=0.05))
    shares = np.bincount(split_n) / len(split_n)
    assert np.abs(shares - [0.85, 0.1, 0.05]).max() < 0.01  # 4 standard deviations
    order = np.random.default_rng(0).permutation(20_000)
    assert np.array_equal(assign_splits(identity_n2[order], SplitFractions(validation=0.1, test=0.05)), split_n[order])
    assert np.array_equal(assign_splits(identity_n2[:700], SplitFractions(validation=0.1, test=0.05)), split_n[:700]), (
        "more documents move none"
    )


def test_a_larger_held_out_share_keeps_what_was_validation() -> None:
    identity_n2 = scan_of(sentences(9, 2_000, num_words=1)).identity_n2
    small, large = (assign_splits(identity_n2, SplitFractions(validation=v, test=0.0)) for v in (0.05, 0.1))
    assert set(np.flatnonzero(small == 1)) < set(np.flatnonzero(large == 1))


@pytest.mark.parametrize("count", [3, 4, 10])
@pytest.mark.parametrize("share", [0.01, 0.45])
def test_a_domain_of_few_documents_still_has_one_in_each_split(count: int, share: float) -> None:
    for seed in range(20):
        identity_n2 = scan_of(sentences(seed, count)).identity_n2
        split_n = assign_splits(identity_n2, SplitFractions(validation=share, test=share))
        assert np.bincount(split_n, minlength=3).min() >= 1


@pytest.mark.parametrize("share", [0.01, 0.45])
def test_one_or_two_documents_are_for_training(share: float) -> None:
    for count in (0, 1, 2):
        for seed in range(10):
            identity_n2 = scan_of(sentences(seed, count)).identity_n2
            assert assign_splits(identity_n2, SplitFractions(validation=share, test=share)).tolist() == [0] * count


def test_a_split_of_share_zero_stays_empty() -> None:
    split_n = assign_splits(scan_of(sentences(1, 50)).identity_n2, SplitFractions(validation=0.5, test=0.0))
    assert np.bincount(split_n, minlength=3)[2] == 0
    assert np.bincount(split_n, minlength=3)[1] > 10


def test_excerpts_take_documents_by_rank_and_cut_the_last() -> None:
    rank_n = np.array([5, 1, 3, 2, 4], np.uint64)
    num_bytes_n = np.array([10, 20, 30, 40, 50])
    candidate_n = np.array([True, True, True, False, True])
    assert excerpt_bytes(rank_n, num_bytes_n, candidate_n, 60).tolist() == [0, 20, 30, 0, 10]
    assert excerpt_bytes(rank_n, num_bytes_n, candidate_n, 500).tolist() == [10, 20, 30, 0, 50]
