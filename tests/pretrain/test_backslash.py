from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixwright.pretrain.model_options.backslash import ShapeTable, Shrinking, attach, moment_ratio, shrink_
from mixwright.pretrain.model_options.config import BackSlash
from mixwright.pretrain.model_options.generalised_gaussian import draw

CPU = torch.device("cpu")
STRONG = BackSlash(strength=0.5)


def alone(sums: Tensor) -> Tensor:
    return sums


def shape_of(values: Tensor) -> float:
    return float(Shrinking(STRONG, [values], values.numel(), alone).shape([values]))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [(0.1, 216.83), (0.3, 6.661), (0.5, 3.3333), (1, 2), (1.36, 1.7552), (1.5, 1.6981), (2, math.pi / 2), (3, 1.4610)],
)
def test_moment_ratios_are_those_of_the_paper(shape: float, expected: float) -> None:
    assert moment_ratio(shape) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [0.5, 1.0, 1.5, 2.0])
def test_the_shape_of_a_sample_is_found(shape: float) -> None:
    torch.manual_seed(0)
    assert shape_of(draw(shape, 0.02, torch.Size((400_000,)))) == pytest.approx(shape, abs=0.05)


def test_parts_with_padding_have_the_shape_of_the_whole() -> None:
    torch.manual_seed(0)
    values = draw(1.0, 0.02, torch.Size((10_000,)))
    first, second = values[:4000], torch.cat([values[4000:], torch.zeros(64)])
    sums = [
        torch.stack([v.square().sum(dtype=torch.float64), v.abs().sum(dtype=torch.float64)]) for v in (first, second)
    ]
    parts = Shrinking(STRONG, [first], 10_000, lambda own: own + sums[1])
    assert float(parts.shape([first])) == shape_of(values)


def test_small_weights_become_exactly_zero_and_large_ones_shrink_by_the_step() -> None:
    theta = torch.tensor([0.5, -0.5, 0.01, -0.01, 0.0])
    shrink_(theta, torch.tensor(1.0), strength=0.1, epsilon=1.0)
    assert torch.equal(theta, torch.tensor([0.4, -0.4, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize(("nu", "epsilon"), [(0.7, 0.1), (1.4, 1.0), (2.0, 1.0)])
def test_a_step_is_the_gradient_of_the_rate(nu: float, epsilon: float) -> None:
    theta = torch.tensor([0.3, -0.8, 2.0], dtype=torch.float64, requires_grad=True)
    (theta.abs() + epsilon).pow(nu).sum().backward()
    moved = theta.detach().clone()
    shrink_(moved, torch.tensor(nu), strength=1e-3, epsilon=epsilon)
    torch.testing.assert_close(moved, theta.detach() - 1e-3 * theta.grad)


def test_repeated_shrinking_leaves_zeros_at_zero_and_never_changes_a_sign() -> None:
    torch.manual_seed(0)
    theta = draw(1.5, 0.02, torch.Size((1000,)))
    before = theta.clone()
    for _ in range(30):
        shrink_(theta, torch.tensor(0.8), strength=1e-3, epsilon=1.0)
    assert (theta * before >= 0).all()
    assert 500 < int((theta == 0).sum()) < 1000


def test_matrices_shrink_after_the_update_by_the_learning_rate_and_vectors_do_not() -> None:
    matrix, vector = torch.full((8, 8), 0.5), torch.full((8,), 0.5)
    optimizer = torch.optim.SGD([{"params": [matrix]}, {"params": [vector]}], lr=0.1)
    attach(BackSlash(strength=0.2), optimizer, matrix.numel(), alone)
    matrix.grad, vector.grad = torch.full_like(matrix, 1.0), torch.full_like(vector, 1.0)
    optimizer.step()
    nu = float(ShapeTable(CPU).shape(torch.tensor(64 * 0.16), torch.tensor(64 * 0.4), 64))
    torch.testing.assert_close(matrix, torch.full((8, 8), 0.4 - 0.1 * 0.2 * nu * 1.4 ** (nu - 1)))
    assert torch.equal(vector, torch.full((8,), 0.4))


def test_more_parameters_of_the_same_kind_shrink_alike() -> None:
    torch.manual_seed(0)
    small = draw(1.0, 0.02, torch.Size((1000,)))
    large = small.repeat(7)
    for theta in (small, large):
        optimizer = torch.optim.SGD([theta], lr=0.1)
        attach(BackSlash(strength=0.05), optimizer, theta.numel(), alone)
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
    assert torch.equal(large, small.repeat(7))


def test_weights_that_are_all_zero_stay_finite() -> None:
    theta = torch.zeros(4, 4)
    optimizer = torch.optim.SGD([theta], lr=0.1)
    attach(STRONG, optimizer, 16, alone)
    theta.grad = torch.zeros_like(theta)
    optimizer.step()
    assert torch.equal(theta, torch.zeros(4, 4))
