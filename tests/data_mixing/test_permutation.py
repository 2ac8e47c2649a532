"""Keyed permutations: bijective for every size, and as random as they need to be in every digit."""

import itertools
import math

import numpy as np
import pytest

from mixwright.data_mixing.permutation import fold_key, mix_key, permute, splitmix64, unpermute
from tests.data_mixing import plan_reference

PRIMES = [2, 3, 5, 7, 11, 13, 127, 251, 509, 1021, 4093, 65521]


def test_splitmix64_gives_the_published_stream_of_state_1234567() -> None:
    golden = np.uint64(0x9E3779B97F4A7C15)
    states = np.uint64(1234567) + np.arange(5, dtype=np.uint64) * golden
    assert splitmix64(states).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_keys_depend_on_every_part_and_on_their_order() -> None:
    keys = {mix_key(), mix_key(0), mix_key(0, 0), mix_key(1), mix_key(1, 2), mix_key(2, 1), mix_key(1, 2, 3)}
    assert len(keys) == 7
    assert mix_key(1, 2**64 + 5) == mix_key(1, 5) == plan_reference.mix_key(1, 5)
    folded = fold_key(np.array([mix_key(7)], np.uint64), np.array([8, 9], np.uint64))
    assert folded.tolist() == [mix_key(7, 8), mix_key(7, 9)]


@pytest.mark.parametrize("size", [*range(1, 34), 63, 64, 65, 100, 1000, 2**16 - 1])
def test_matches_the_plain_integer_reference(size: int) -> None:
    index_n = np.unique(np.linspace(0, size - 1, 25).astype(np.int64))
    for key in (0, 1, 2**64 - 1, mix_key(size)):
        assert permute(index_n, size, key).tolist() == [plan_reference.permute(int(i), size, key) for i in index_n]


def test_is_a_bijection_for_every_size_up_to_700() -> None:
    for size in range(1, 701):
        image_n = permute(np.arange(size), size, mix_key(3, size))
        assert np.array_equal(np.sort(image_n), np.arange(size)), size


@pytest.mark.parametrize("size", [2**12 - 1, 2**12, 2**12 + 1, 2**17 - 1, 2**17, 2**17 + 1, 65521, 10**6, 1000003])
def test_is_a_bijection_for_large_sizes(size: int) -> None:
    image_n = permute(np.arange(size), size, mix_key(4, size))
    assert np.array_equal(np.bincount(image_n, minlength=size), np.ones(size, np.int64))


@pytest.mark.parametrize("size", [1, 2, 3, 31, 32, 33, 64, 1000, 4097, 10**12 + 39, 1 << 62])
def test_the_inverse_gives_back_every_index(size: int) -> None:
    indices = np.unique(np.linspace(0, size - 1, 40).astype(np.int64)).clip(0, size - 1)
    images = permute(indices, size, 77)
    assert [unpermute(image, size, 77) for image in images.tolist()] == indices.tolist()


@pytest.mark.parametrize("image", [-1, 5])
def test_the_inverse_names_an_image_outside_the_range(image: int) -> None:
    with pytest.raises(ValueError, match=rf"image {image} is outside range\(5\)"):
        unpermute(image, 5, 1)


def test_different_keys_give_different_orders() -> None:
    orders = {tuple(permute(np.arange(50), 50, mix_key(epoch)).tolist()) for epoch in range(200)}
    assert len(orders) == 200


def test_rows_of_different_sizes_and_keys_go_together_as_they_go_alone() -> None:
    rng = np.random.default_rng(0)
    size_n = rng.integers(1, 5000, 400)
    size_n[:8] = [1, 2, 3, 1, 31, 32, 33, 2**62]
    key_n = rng.integers(0, 2**63, 400).astype(np.uint64)
    index_n = rng.integers(0, 2**62, 400) % size_n
    alone = [int(permute(i, s, k)[0]) for i, s, k in zip(index_n, size_n, key_n, strict=True)]
    assert permute(index_n, size_n, key_n).tolist() == alone


@pytest.mark.parametrize(("index", "size"), [(-1, 5), (5, 5), (0, 0)])
def test_an_index_outside_the_range_is_an_error_that_names_both(index: int, size: int) -> None:
    with pytest.raises(ValueError, match=rf"index {index} is outside range\({size}\)"):
        permute([0 if size else index, index], size, 1)


def test_no_index_gives_no_image() -> None:
    assert permute([], 10, 1).tolist() == []


def chi_square_per_df(label_n: np.ndarray, expected: np.ndarray, batch_size: int) -> float:
    """Mean over consecutive batches of chi2/df of the labels, corrected for drawing without replacement."""
    num_batches = len(label_n) // batch_size
    batch_n = np.repeat(np.arange(num_batches), batch_size)
    cells = np.bincount(batch_n * len(expected) + label_n[: len(batch_n)], minlength=num_batches * len(expected))
    wanted = batch_size * expected / expected.sum()
    chi2 = ((cells.reshape(num_batches, -1) - wanted) ** 2 / wanted).sum(axis=1).mean()
    return float(chi2 / (len(expected) - 1) / (1 - batch_size / expected.sum()))


def label_counts(label_of: object, size: int) -> np.ndarray:
    return np.bincount(label_of(np.arange(size)))  # type: ignore[operator]


SHUFFLED = [2**18, 2**18 - 1, 2**18 + 1, 262147, 300007, 2**17 + 29]


@pytest.mark.parametrize("size", SHUFFLED)
def test_batches_are_composed_like_random_ones_in_low_digits_and_high_digits(size: int) -> None:
    image_n = np.concatenate([permute(np.arange(size), size, mix_key(11, epoch)) for epoch in range(2)])
    labels = {f"mod {m}": (lambda x, m=m: x % m) for m in (2, 3, 4, 5, 7, 8, 16, 31, 32, 64)}
    labels |= {f"top {b} bits": (lambda x, b=b: (x << b) // size) for b in (1, 3, 6)}
    labels |= {"bits 5-8": lambda x: (x >> 5) & 15}
    for name, label_of in labels.items():
        ratio = chi_square_per_df(label_of(image_n), label_counts(label_of, size), 256)
        assert 0.9 < ratio < 1.1, (size, name, ratio)


def test_the_statistic_catches_a_shuffle_that_is_affine_in_its_low_bits() -> None:
    size = 2**18
    image_n = (np.arange(size) * 4097 * 64 + np.arange(size) // 64) % size
    assert chi_square_per_df(image_n % 64, np.full(64, size // 64), 256) > 3


def test_every_parity_pattern_of_a_batch_occurs() -> None:
    """Levanter's shuffle gave batches of one parity only (spec/mixing.md, finding 4)."""
    parity = permute(np.arange(2**18), 2**18, mix_key(5)).reshape(-1, 1024) % 2
    odd = parity.sum(axis=1)
    assert 400 < odd.min() < 500 < 520 < odd.max() < 624


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_small_sizes_reach_every_order_about_equally_often(size: int) -> None:
    num_keys = 60_000
    key_n = fold_key(np.array([mix_key(17)], np.uint64), np.arange(num_keys, dtype=np.uint64))
    code_n = sum(permute(np.full(num_keys, i), size, key_n) * size**i for i in range(size))
    codes = [sum(value * size**i for i, value in enumerate(order)) for order in itertools.permutations(range(size))]
    count = np.array([np.count_nonzero(code_n == code) for code in codes])
    wanted = num_keys / math.factorial(size)
    ratio = ((count - wanted) ** 2 / wanted).sum() / (len(codes) - 1)
    spread = 4 * math.sqrt(2 / (len(codes) - 1))
    assert abs(ratio - 1) < spread


def test_neighbours_are_torn_apart() -> None:
    image_n = permute(np.arange(2**17 + 1), 2**17 + 1, mix_key(23)).astype(np.float64)
    assert abs(np.corrcoef(image_n[:-1], image_n[1:])[0, 1]) < 0.01
    other_n = permute(np.arange(2**17 + 1), 2**17 + 1, mix_key(24)).astype(np.float64)
    assert abs(np.corrcoef(image_n, other_n)[0, 1]) < 0.01
