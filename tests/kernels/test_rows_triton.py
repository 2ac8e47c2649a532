"""The Triton row kernels under the interpreter, beside the torch form, and the whole head on top of them."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from mixwright.kernels import blocks, rows_torch, rows_triton
from mixwright.kernels.linear_loss import linear_loss
from mixwright.kernels.linear_nll import linear_nll, linear_nll_reference
from tests.kernels.problems import OVERFLOWS, Problem, assert_all_close, overflowing, random_problem

FEATURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "softcap": {"softcap": 3.0},
    "temperature": {"inv_temperature_n": torch.linspace(0.5, 2.0, 5)},
    "statistics": {"entropy": True, "correct": True},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_triton, "_columns_per_block", lambda logits_nv: 32)


def run_unit(rows: ModuleType, logits_nv: Tensor, targets_n: Tensor, **options: Any) -> list[Tensor]:
    logits_nv = logits_nv.clone()
    defaults = {"softcap": None, "inv_temperature_n": None, "logits_of": lambda index: logits_before[index].clone()}
    logits_before = logits_nv.clone()
    stats = rows.unit_gradient_(logits_nv, targets_n, **(defaults | options))
    return [logits_nv, *(value.double() for value in stats if value is not None)]


def random_logits(columns: int, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(columns)
    logits_nv = torch.randn(5, columns, generator=generator) * 4 + offset
    return logits_nv, torch.randint(0, columns, (5,), generator=generator)


@pytest.mark.parametrize("columns", [1, 7, 64, 65, 257])
@pytest.mark.parametrize(("first", "second"), list(itertools.combinations_with_replacement(FEATURES, 2)))
def test_unit_gradient_equals_the_float64_torch_form(first: str, second: str, columns: int) -> None:
    logits_nv, targets_n = random_logits(columns)
    options = FEATURES[first] | FEATURES[second]
    exact = run_unit(rows_torch, logits_nv.double(), targets_n, **options)
    assert_all_close(run_unit(rows_triton, logits_nv, targets_n, **options), exact, 2e-6)


@pytest.mark.parametrize("offset", [-10_000.0, -20.0, 20.0, 10_000.0])
def test_padded_lanes_never_enter_the_sum_whatever_the_offset(offset: float) -> None:
    logits_nv, targets_n = random_logits(65)
    logits_nv = (logits_nv * 8).round() / 8  # so that adding the offset is exact
    base = run_unit(rows_triton, logits_nv, targets_n)
    moved = run_unit(rows_triton, logits_nv + offset, targets_n)
    assert_all_close(moved[:2], base[:2], 1e-6)


@pytest.mark.parametrize("shift", [0.0, -20.0])
def test_softcap_does_not_revive_the_tail(shift: float) -> None:
    logits_nv, targets_n = random_logits(100, shift)
    exact = run_unit(rows_torch, logits_nv.double(), targets_n, softcap=5.0)
    assert_all_close(run_unit(rows_triton, logits_nv, targets_n, softcap=5.0), exact, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rows_have_float32_statistics_and_gradients_rounded_once(dtype: torch.dtype) -> None:
    logits_nv, targets_n = random_logits(257)
    logits_nv = logits_nv.to(dtype)
    exact = run_unit(rows_torch, logits_nv.double(), targets_n)
    found = run_unit(rows_triton, logits_nv, targets_n)
    assert found[0].dtype == dtype
    assert torch.equal(found[0], exact[0].float().to(dtype)) or (found[0].double() - exact[0]).abs().max() < 4e-3
    assert_all_close(found[1:], exact[1:], 1e-6)


def test_rows_with_infinities_give_exact_losses_or_a_zero_gradient() -> None:
    logits_nv = torch.tensor([[0.0, -torch.inf, 0.0], [torch.inf, 0.0, 0.0], [-torch.inf] * 3])
    gradient_nv, nll_n, lse_n = run_unit(rows_triton, logits_nv, torch.tensor([0, 1, 2]))[:3]
    assert gradient_nv[0].tolist() == [-0.5, 0.0, 0.5]
    assert nll_n[0].item() == pytest.approx(torch.tensor(2.0).log().item())
    assert not gradient_nv[1:].any()
    assert not lse_n[1:].isfinite().any()


def test_nothing_outside_the_rows_is_read_or_written() -> None:
    logits_nv, targets_n = random_logits(65)
    storage = torch.full((9, 80), torch.nan)
    view_nv = storage[2:7, 6:71]
    view_nv.copy_(logits_nv)
    stats = rows_triton.unit_gradient_(view_nv, targets_n, None, None, lambda rows: rows)
    expected = run_unit(rows_triton, logits_nv, targets_n)
    assert torch.equal(view_nv, expected[0])
    assert torch.equal(stats.nll_n.double(), expected[1])
    storage[2:7, 6:71] = torch.nan
    assert storage.isnan().all()


def test_rows_beyond_two_to_the_31_elements_are_addressed() -> None:
    """CCE, TRL, fla, mamba: a 32-bit row times stride wraps. Untouched pages of the huge tensor cost nothing."""
    row_stride = 1 << 30
    logits_nv = torch.empty(2 * row_stride + 64, dtype=torch.bfloat16).as_strided((3, 64), (row_stride, 1))
    values_nv, targets_n = random_logits(64)
    logits_nv.copy_(values_nv[:3])
    before_nv = logits_nv.clone()
    stats = rows_triton.unit_gradient_(logits_nv, targets_n[:3], None, None, lambda rows: rows)
    expected = run_unit(rows_triton, before_nv, targets_n[:3])
    assert torch.equal(logits_nv, expected[0])
    assert torch.equal(stats.lse_n.double(), expected[2])


def test_a_slice_beyond_two_to_the_31_elements_is_addressed_and_nothing_outside_it_is_touched() -> None:
    row_stride = 1 << 30
    storage = torch.empty(2 * row_stride + 200, dtype=torch.bfloat16)
    guarded_nv = storage.as_strided((3, 165), (row_stride, 1))
    guarded_nv.fill_(torch.nan)
    values_nv, columns_n = random_logits(65)
    row_n = {"lse_n": torch.linspace(8, 12, 3), "lse_error_n": torch.zeros(3)}
    slices = [guarded_nv[:, 50:115], values_nv[:3].bfloat16()]
    slices[0].copy_(values_nv[:3])
    for slice_nv in slices:
        rows_triton.sliced_gradient_(slice_nv, columns_n[:3], None, None, **row_n)
    assert torch.equal(*slices)
    assert guarded_nv[:, :50].isnan().all()
    assert guarded_nv[:, 115:].isnan().all()


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"inv_temperature_n": torch.linspace(0.5, 2.0, 5)}])
def test_sliced_gradient_equals_the_torch_form(options: dict[str, Any]) -> None:
    logits_nv, targets_n = random_logits(100)
    settings = {"softcap": None, "inv_temperature_n": None} | options
    lse_n, lse_error_n = torch.linspace(8, 12, 5), torch.linspace(-1e-3, 1e-3, 5)
    slices = []
    for rows, dtype in ((rows_torch, torch.float64), (rows_triton, torch.float32)):
        slice_nv = logits_nv[:, 30:95].to(dtype).contiguous()
        rows.sliced_gradient_(
            slice_nv, targets_n - 30, lse_n=lse_n.to(dtype), lse_error_n=lse_error_n.to(dtype), **settings
        )
        slices.append(slice_nv)
    assert_all_close([slices[1]], [slices[0]], 2e-6)


@pytest.mark.parametrize("columns", [1, 7, 65, 257])
@pytest.mark.parametrize("feature", FEATURES)
def test_shard_gradient_equals_the_float64_torch_form(feature: str, columns: int) -> None:
    """Targets inside, before and behind the shard; the torch form is held against the definition elsewhere."""
    logits_nv, columns_n = random_logits(columns)
    columns_n[1:4] = torch.tensor([-1, columns, 10 * columns])
    options = {"softcap": None, "inv_temperature_n": None} | FEATURES[feature]
    options.pop("correct", None)
    found = []
    for rows, dtype in ((rows_torch, torch.float64), (rows_triton, torch.float32)):
        gradient_nv = logits_nv.to(dtype)
        stats = rows.shard_gradient_(gradient_nv, columns_n, **options)
        found.append([gradient_nv, *(value for value in stats if value is not None)])
    assert_all_close(found[1], found[0], 2e-6)


@pytest.mark.parametrize("rows", [rows_torch, rows_triton])
def test_a_shard_without_columns_or_without_a_finite_logit_has_no_mass(rows: ModuleType) -> None:
    for logits_nv in (torch.empty(3, 0), torch.full((3, 5), -torch.inf)):
        stats = rows.shard_gradient_(logits_nv, torch.tensor([0, 7, -1]), None, None, entropy=True)
        assert (stats.peak_n == -torch.inf).all()
        assert (stats.log_sum_n == -torch.inf).all()
        assert not logits_nv.any()


def test_a_target_out_of_range_poisons_its_loss_and_reads_nothing_outside() -> None:
    logits_nv, targets_n = random_logits(65)
    targets_n[2], targets_n[4] = 65, -3
    stats = rows_triton.unit_gradient_(logits_nv, targets_n, None, None, lambda rows: rows)
    assert stats.nll_n.isnan().tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"inv_temperature_n": torch.linspace(0.5, 2.0, 5)}])
def test_sliced_gradient_with_entropy_equals_the_torch_form(options: dict[str, Any]) -> None:
    logits_nv, targets_n = random_logits(100)
    settings = {"softcap": None, "inv_temperature_n": None} | options
    row_n = torch.linspace(8, 12, 5), torch.linspace(-1e-3, 1e-3, 5)
    terms = [torch.linspace(-1, 1, 5), torch.linspace(0.5, -0.5, 5), torch.linspace(0, 4, 5)]
    slices = []
    for rows, dtype in ((rows_torch, torch.float64), (rows_triton, torch.float32)):
        slice_nv = logits_nv[:, 30:95].to(dtype).contiguous()
        entropy_terms = rows_torch.EntropyTerms(*(term_n.to(dtype) for term_n in terms))
        lse_n, lse_error_n = (value_n.to(dtype) for value_n in row_n)
        rows.sliced_gradient_(
            slice_nv, targets_n - 30, lse_n=lse_n, lse_error_n=lse_error_n, entropy_terms=entropy_terms, **settings
        )
        slices.append(slice_nv)
    assert_all_close([slices[1]], [slices[0]], 2e-6)


@pytest.mark.parametrize("engine", ["cached", "recompute"])
@pytest.mark.parametrize(
    "options", [{"softcap": 3.0}, {"temperature": 0.6, "bias": True, "ignored": 0.3}, {"entropy": True, "softcap": 3.0}]
)
def test_the_whole_head_on_triton_rows(options: Any, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "row_kernels", lambda device, dtype: rows_triton)
    problem = random_problem(12, 8, 70, **options)
    found = problem.to(torch.float32).run(linear_nll, engine=engine)
    assert_all_close(found, problem.run(linear_nll_reference), 5e-6)


@pytest.mark.parametrize("engine", ["cached", "recompute"])
def test_the_whole_head_on_16_bit_triton_rows(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "row_kernels", lambda device, dtype: rows_triton)
    problem = random_problem(12, 8, 70).to(torch.bfloat16)
    exact = problem.to(torch.float64).run(linear_nll_reference)
    found, precise = (problem.run(linear_nll, engine=engine, precise=precise) for precise in (False, True))
    assert_all_close(found, exact, 2e-2)
    assert_all_close(precise[:2], exact[:2], 1e-6)


@pytest.mark.parametrize("rows", [rows_torch, rows_triton])
def test_a_capped_logit_that_is_nan_leaves_a_zero_gradient_and_slope_in_its_row(rows: ModuleType) -> None:
    logits_nv, columns_n = random_logits(7)
    logits_nv[2, columns_n[2]] = torch.nan
    stats = rows.shard_gradient_(logits_nv, columns_n, 3.0, None)
    assert not logits_nv[2].any()
    assert stats.target_slope_n[2] == 0
    assert logits_nv.isfinite().all()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("head", ["cached", "recompute", "entropy", "linear_loss"])
@pytest.mark.parametrize("kind", OVERFLOWS)
def test_a_row_whose_logits_overflow_is_lost_only_if_it_counts(
    kind: str, head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "row_kernels", lambda device, dtype: rows_triton)
    options: dict[str, Any] = {"softcap": 3.0} if kind == "inf - inf" else {}
    problem = random_problem(12, 8, 70, bias=True, entropy=head == "entropy", **options)

    def dweight_VD(problem: Problem) -> Tensor:
        if head != "linear_loss":
            return problem.run(linear_nll, engine="cached" if head == "cached" else "recompute")[-2]
        weight_VD = problem.weight_VD.clone().requires_grad_()
        z_loss: dict[str, Any] = {"z_loss": 0.1, "z_weight_N": problem.dlse_N, "bias_V": problem.bias_V}
        inputs = problem.hidden_ND, weight_VD, problem.targets_N, problem.dnll_N
        linear_loss(*inputs, **z_loss, **problem.options).loss_sum.backward()
        assert weight_VD.grad is not None
        return weight_VD.grad

    base_VD, silent_VD = (dweight_VD(p) for p in overflowing(problem, kind, 3, 0.0))
    assert torch.equal(silent_VD, base_VD)
    assert dweight_VD(overflowing(problem, kind, 3, 1.0)[1]).isnan().all()


def test_kernels_are_launched_under_the_device_of_their_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Any] = []

    @contextmanager
    def device_of(tensor: Any) -> Iterator[None]:
        current.append(tensor.device)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, **__: launches.append(list(current))

    launches: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(rows_triton, "_unit_gradient_kernel", Kernel())
    monkeypatch.setattr(rows_triton, "_sliced_gradient_kernel", Kernel())
    logits_nv, targets_n = random_logits(7)
    rows_triton.unit_gradient_(logits_nv, targets_n, None, None, lambda rows: rows)
    rows_triton.sliced_gradient_(logits_nv, targets_n, None, None, logits_nv[:, 0], logits_nv[:, 0])
    assert launches == [[logits_nv.device]] * 2


COMPILE = """
import itertools
import torch, triton
from triton.backends.compiler import GPUTarget
from mixwright.kernels import rows_triton as rows

flags = ("HAS_CAP", "HAS_TEMPERATURE", "ENTROPY")
scalars = {"row_stride": "i64", "columns": "i32", "softcap": "fp32"}
special = {"logits_ptr": "*bf16", "targets_ptr": "*i64"}
for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)):
    for kernel, on in itertools.product((rows._unit_gradient_kernel, rows._sliced_gradient_kernel), (True, False)):
        constants = {name: on for name in flags if name in kernel.arg_names} | {"BLOCK": 4096}
        signature = {name: special.get(name, scalars.get(name, "*fp32")) for name in kernel.arg_names}
        signature |= {name: "constexpr" for name in constants}
        source = triton.compiler.ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=target, options={"num_warps": rows.NUM_WARPS})
        assert "atom" not in compiled.asm["ptx"]
        print(kernel.fn.__name__, target.arch, len(compiled.asm["ptx"]))
"""


def test_the_kernels_compile_for_gpus_without_one_and_use_no_atomics() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8
