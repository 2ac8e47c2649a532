"""The spherical Z-loss head: definition, invariants, moments kept in step with the weight, deferred gradients."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.kernels import spherical_z
from mixwright.kernels.linear_nll import linear_nll
from mixwright.kernels.spherical_z import SphericalZLoss, fit_temperature, spherical_z_reference

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "kernel_vectors.json").read_text())


@pytest.fixture(autouse=True)
def many_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spherical_z, "ROWS_PER_SLICE", 17)


def random_inputs(
    num_tokens: int = 12, hidden_size: int = 6, num_classes: int = 50
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden, weight with an offset, targets with duplicates, upstream gradients: float64."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(num_tokens, hidden_size, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(num_classes, hidden_size, generator=generator, dtype=torch.float64) + 3
    targets_N = torch.randint(0, num_classes // 5, (num_tokens,), generator=generator)
    return hidden_ND, weight_VD, targets_N, torch.randn(num_tokens, generator=generator, dtype=torch.float64)


def run_head(head: SphericalZLoss, hidden_ND: Tensor, targets_N: Tensor, upstream_N: Tensor) -> tuple[Tensor, ...]:
    hidden_ND = hidden_ND.clone().requires_grad_()
    head.weight.grad = None
    loss_N = head(hidden_ND, targets_N)
    loss_N.backward(upstream_N.to(loss_N.dtype))
    head.finish_gradient()
    assert hidden_ND.grad is not None
    assert head.weight.grad is not None
    return loss_N.detach(), hidden_ND.grad, head.weight.grad


def run_reference(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, upstream_N: Tensor, **options: float
) -> tuple[Tensor, ...]:
    leaves = hidden_ND.double().clone().requires_grad_(), weight_VD.double().clone().requires_grad_()
    loss_N = spherical_z_reference(*leaves, targets_N, **options)
    return loss_N.detach(), *torch.autograd.grad(loss_N, leaves, upstream_N)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize(("sharpness", "location"), [(1.0, 0.0), (0.1, 10.0), (5.0, 2.0)])
@pytest.mark.parametrize("num_classes", [5, 50, 103])
def test_loss_and_gradients_equal_the_definition(
    num_classes: int, sharpness: float, location: float, deferred: bool
) -> None:
    hidden_ND, weight_VD, targets_N, upstream_N = random_inputs(num_classes=num_classes)
    head = SphericalZLoss(nn.Parameter(weight_VD), sharpness=sharpness, location=location, deferred=deferred)
    found = run_head(head, hidden_ND, targets_N, upstream_N)
    expected = run_reference(hidden_ND, weight_VD, targets_N, upstream_N, sharpness=sharpness, location=location)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("name", "sharpness", "location"), [("a1_b0", 1.0, 0.0), ("a0.1_b10", 0.1, 10.0)])
def test_golden_values(name: str, sharpness: float, location: float) -> None:
    golden = GOLDEN["spherical_zloss"]
    weight = nn.Parameter(torch.tensor(golden["logits"], dtype=torch.float64)[:, None])
    loss_N = SphericalZLoss(weight, sharpness=sharpness, location=location)(
        torch.ones(1, 1, dtype=torch.float64), torch.tensor([golden["target"]])
    )
    loss_N.sum().backward()
    assert loss_N.item() == pytest.approx(golden[name]["loss"], abs=1e-9)
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == pytest.approx(golden[name]["grad"], abs=1e-9)


def test_gradcheck() -> None:
    hidden_ND, weight_VD, targets_N, _ = random_inputs(4, 3, 7)

    def losses(hidden: Tensor, weight: Tensor) -> Tensor:
        moments = spherical_z._AttachMoments.apply(weight, *spherical_z.class_moments(weight.detach()))
        return spherical_z.SphericalRows.apply(hidden, weight, targets_N, *moments, (1.3, 0.4, -100, 7))

    assert torch.autograd.gradcheck(losses, (hidden_ND.requires_grad_(), weight_VD.requires_grad_()))


def test_invariants_of_scale_and_shift() -> None:
    hidden_ND, weight_VD, targets_N, upstream_N = random_inputs()
    loss_N, dhidden_ND, dweight_VD = run_head(SphericalZLoss(nn.Parameter(weight_VD)), hidden_ND, targets_N, upstream_N)
    moved = SphericalZLoss(nn.Parameter(2.5 * weight_VD + torch.ones(50, 1) * torch.arange(6.0)))
    torch.testing.assert_close(moved(hidden_ND, targets_N), loss_N, rtol=1e-11, atol=1e-12)
    assert (dhidden_ND * hidden_ND).sum(1).abs().max() < 1e-12
    assert dweight_VD.sum(0).abs().max() < 1e-12
    assert (dweight_VD * weight_VD).sum().abs() < 1e-11


def test_float32_keeps_its_digits_under_an_offset_and_an_anisotropic_weight() -> None:
    hidden_ND, weight_VD, targets_N, upstream_N = random_inputs(num_classes=1000)
    weight_VD = weight_VD * torch.tensor([1e-2, 1, 1, 1, 1, 1]) + 10
    hidden_ND[:, 1:] = 0  # only where the weight varies least
    found = run_head(SphericalZLoss(nn.Parameter(weight_VD.float())), hidden_ND.float(), targets_N, upstream_N)
    exact = run_reference(hidden_ND.float(), weight_VD.float(), targets_N, upstream_N)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-4, atol=2e-4)  # raw moments would be 10 % off


OPTIMIZERS = [
    (name, {})
    for name in "SGD Adam AdamW RMSprop Adagrad Adadelta Adamax NAdam RAdam ASGD Rprop Adafactor".split()  # noqa: SIM905
    if hasattr(torch.optim, name)
]
OPTIMIZERS += [(name, {form: True}) for name in ("SGD", "AdamW", "Adagrad") for form in ("fused", "foreach")]


@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS)
@pytest.mark.parametrize("deferred", [False, True])
def test_moments_follow_the_weight_under_every_optimizer(
    optimizer: str, options: dict[str, bool], deferred: bool
) -> None:
    hidden_ND, weight_VD, targets_N, upstream_N = random_inputs()
    head = SphericalZLoss(nn.Parameter(weight_VD.clone()), deferred=deferred)
    stepper = getattr(torch.optim, optimizer)(head.parameters(), lr=0.1, **options)
    for _ in range(3):
        run_head(head, hidden_ND, targets_N, upstream_N)
        before_N = spherical_z_reference(hidden_ND, head.weight.detach(), targets_N)
        stepper.step()
        expected_N = spherical_z_reference(hidden_ND, head.weight.detach(), targets_N)
        assert (expected_N - before_N).abs().max() > 1e-6
        torch.testing.assert_close(head(hidden_ND, targets_N).detach(), expected_N, rtol=1e-11, atol=1e-12)


def test_a_copy_follows_its_own_weight_and_a_dead_head_is_let_go() -> None:
    hidden_ND, weight_VD, targets_N, upstream_N = random_inputs()
    head = SphericalZLoss(nn.Parameter(weight_VD.clone()))
    run_head(head, hidden_ND, targets_N, upstream_N)
    copied = copy.deepcopy(head)
    gone = weakref.ref(head)
    del head
    assert gone() is None
    run_head(copied, hidden_ND, targets_N, upstream_N)
    torch.optim.AdamW(copied.parameters(), lr=0.1, fused=True).step()
    expected_N = spherical_z_reference(hidden_ND, copied.weight.detach(), targets_N)
    torch.testing.assert_close(copied(hidden_ND, targets_N).detach(), expected_N, rtol=1e-11, atol=1e-12)


def test_another_models_optimizer_does_not_disturb_pending_gradients() -> None:
    hidden_ND, weight_VD, targets_N, upstream_N = random_inputs()
    head = SphericalZLoss(nn.Parameter(weight_VD), deferred=True)
    head(hidden_ND, targets_N).backward(upstream_N)
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1).step()
    head(hidden_ND, targets_N).backward(upstream_N)
    head.finish_gradient()
    assert head.weight.grad is not None
    expected_VD = run_reference(hidden_ND, weight_VD.detach(), targets_N, 2 * upstream_N)[2]
    torch.testing.assert_close(head.weight.grad, expected_VD, rtol=1e-11, atol=1e-12)


def test_moments_are_formed_once_while_the_weight_stays_and_again_after_invalidate() -> None:
    hidden_ND, weight_VD, targets_N, _ = random_inputs()
    head = SphericalZLoss(nn.Parameter(weight_VD.clone()))
    head(hidden_ND, targets_N)
    moments = head._moments
    head(hidden_ND, targets_N)
    assert head._moments is moments
    head.weight.data.mul_(torch.linspace(0.5, 2, 50, dtype=torch.float64)[:, None])  # bypasses the version counter
    head.invalidate()
    expected_N = spherical_z_reference(hidden_ND, head.weight.detach(), targets_N)
    torch.testing.assert_close(head(hidden_ND, targets_N).detach(), expected_N, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulated_micro_batches_equal_one_batch_with_one_dense_gradient(parts: int) -> None:
    hidden_ND, weight_VD, targets_N, upstream_N = random_inputs()
    head = SphericalZLoss(nn.Parameter(weight_VD), deferred=True)
    for hidden_nD, targets_n, upstream_n in zip(
        hidden_ND.chunk(parts), targets_N.chunk(parts), upstream_N.chunk(parts), strict=True
    ):
        head(hidden_nD, targets_n).backward(upstream_n)
    head.finish_gradient()
    expected_VD = run_reference(hidden_ND, weight_VD, targets_N, upstream_N)[2]
    assert head.weight.grad is not None
    torch.testing.assert_close(head.weight.grad, expected_VD, rtol=1e-11, atol=1e-12)


def test_a_step_without_finish_gradient_is_refused_and_not_lost() -> None:
    hidden_ND, weight_VD, targets_N, upstream_N = random_inputs()
    head = SphericalZLoss(nn.Parameter(weight_VD), deferred=True)
    head(hidden_ND, targets_N).backward(upstream_N)
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="the weight changed before finish_gradient"):
        head(hidden_ND, targets_N)


def test_tied_embedding_adds_its_gradient() -> None:
    hidden_ND, weight_VD, targets_N, upstream_N = random_inputs()
    embedding = nn.Embedding(50, 6, dtype=torch.float64)
    embedding.weight = nn.Parameter(weight_VD.clone())
    head = SphericalZLoss(embedding.weight)
    inputs_N = targets_N.flip(0)
    head(torch.tanh(embedding(inputs_N)) + hidden_ND, targets_N).backward(upstream_N)
    leaf_VD = weight_VD.clone().requires_grad_()
    spherical_z_reference(torch.tanh(leaf_VD[inputs_N]) + hidden_ND, leaf_VD, targets_N).backward(upstream_N)
    torch.testing.assert_close(embedding.weight.grad, leaf_VD.grad, rtol=1e-10, atol=1e-11)


def test_equal_logits_have_a_finite_loss_and_no_gradient() -> None:
    head = SphericalZLoss(nn.Parameter(torch.ones(7, 3)))
    hidden_ND = torch.randn(4, 3).requires_grad_()
    loss_N = head(hidden_ND, torch.tensor([0, 1, 2, 3]))
    loss_N.sum().backward()
    torch.testing.assert_close(loss_N, torch.full((4,), 2.0).log())
    assert hidden_ND.grad is not None
    assert not hidden_ND.grad.any()


def test_ignored_and_dead_rows_have_no_influence_unless_they_count() -> None:
    hidden_ND, weight_VD, targets_N, upstream_N = random_inputs()
    head = SphericalZLoss(nn.Parameter(weight_VD))
    targets_N[2] = -100
    upstream_N[5] = 0
    expected = run_head(head, hidden_ND, targets_N, upstream_N)
    hidden_ND[[2, 5]] = torch.nan
    found = run_head(head, hidden_ND, targets_N, upstream_N)
    assert found[0][2] == 0
    assert found[0][5].isnan()
    assert torch.equal(found[2], expected[2])
    upstream_N[5] = 1
    assert run_head(head, hidden_ND, targets_N, upstream_N)[2].isnan().any()


def test_empty_and_fully_ignored_batches_keep_the_graph() -> None:
    _, weight_VD, _, _ = random_inputs()
    head = SphericalZLoss(nn.Parameter(weight_VD))
    for targets_N in (torch.zeros(0, dtype=torch.int64), torch.full((3,), -100)):
        loss_N = head(torch.ones(targets_N.shape[0], 6, dtype=torch.float64), targets_N)
        loss_N.sum().backward()
        assert not loss_N.any()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_fitted_temperature_undoes_a_known_scale_and_reports_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(20, 8, generator=generator)
    hidden_ND = torch.randn(4000, 8, generator=generator)
    targets_N = torch.multinomial(torch.softmax(hidden_ND @ weight_VD.T, 1), 1, generator=generator)[:, 0]
    fitted = fit_temperature(hidden_ND, weight_VD * 5, targets_N)
    plain = linear_nll(hidden_ND, weight_VD, targets_N).nll_N.mean().exp().item()
    assert fitted.temperature == pytest.approx(5.0, rel=0.05)
    assert plain * 0.99 < fitted.perplexity <= plain
    assert fitted.num_tokens == 4000


def test_bad_input_is_refused() -> None:
    hidden_ND, weight_VD, targets_N, _ = random_inputs()
    head = SphericalZLoss(nn.Parameter(weight_VD))
    with pytest.raises(ValueError, match=r"expected \[N, D\], \[V, D\], \[N\]"):
        head(hidden_ND[:, :3], targets_N)
    with pytest.raises(TypeError, match=r"weight is torch\.float64 but hidden is torch\.float32"):
        head(hidden_ND.float(), targets_N)
    with pytest.raises(ValueError, match="sharpness is 0"):
        SphericalZLoss(nn.Parameter(weight_VD), sharpness=0.0)
    with pytest.raises(ValueError, match="no row has a target"):
        fit_temperature(hidden_ND, weight_VD, torch.full((12,), -100))
