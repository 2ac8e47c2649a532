"""Random heads for the tests of `kernels`, and gradients of a loss with random signed upstream gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mixwright.kernels.linear_nll import TokenLosses, linear_nll_reference

Head = Callable[..., TokenLosses]


@dataclass(frozen=True)
class Problem:
    """A head, a micro-batch, and upstream gradients: random, signed, some of them zero, never all equal."""

    hidden_ND: Tensor
    weight_VD: Tensor
    targets_N: Tensor
    dnll_N: Tensor
    dlse_N: Tensor
    bias_V: Tensor | None = None
    dentropy_N: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem in another dtype; upstream gradients stay in the dtype of losses."""
        row_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return replace(
            self,
            hidden_ND=self.hidden_ND.to(dtype),
            weight_VD=self.weight_VD.to(dtype),
            bias_V=None if self.bias_V is None else self.bias_V.to(dtype),
            dnll_N=self.dnll_N.to(row_dtype),
            dlse_N=self.dlse_N.to(row_dtype),
            dentropy_N=None if self.dentropy_N is None else self.dentropy_N.to(row_dtype),
        )

    def run(self, head: Head, **options: Any) -> list[Tensor]:
        """[nll, lse (, entropy), dhidden, dweight (, dbias)] of sum(dnll * nll + dlse * lse (+ dentropy * entropy))."""
        leaves = [t.detach().clone().requires_grad_() for t in (self.hidden_ND, self.weight_VD)]
        bias_V = None if self.bias_V is None else self.bias_V.detach().clone().requires_grad_()
        if self.dentropy_N is not None and head is not linear_nll_reference:
            options["entropy"] = True
        losses = head(*leaves, self.targets_N, bias_V=bias_V, **self.options, **options)
        found, upstream = [losses.nll_N, losses.lse_N], [self.dnll_N, self.dlse_N]
        if self.dentropy_N is not None and losses.entropy_N is not None:
            found, upstream = [*found, losses.entropy_N], [*upstream, self.dentropy_N]
        torch.autograd.backward(found, upstream)
        grads = [leaf.grad for leaf in (*leaves, *([] if bias_V is None else [bias_V]))]
        return [*(value.detach() for value in found), *(g for g in grads if g is not None)]


def random_problem(
    num_tokens: int,
    hidden_size: int,
    vocabulary: int,
    *,
    bias: bool = False,
    ignored: float = 0.0,
    entropy: bool = False,
    scale: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """A float64 problem whose logits have about the given scale; `options` go to the head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets_N = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    targets_N[torch.rand(num_tokens, generator=generator) < ignored] = options.get("ignore_index", -100)
    upstream = [normal(num_tokens) * (torch.rand(num_tokens, generator=generator) > 0.2) for _ in ("nll", "lse")]
    return Problem(
        hidden_ND=normal(num_tokens, hidden_size),
        weight_VD=normal(vocabulary, hidden_size) * scale / hidden_size**0.5,
        targets_N=targets_N,
        dnll_N=upstream[0],
        dlse_N=upstream[1],
        bias_V=normal(vocabulary) if bias else None,
        dentropy_N=normal(num_tokens) if entropy else None,
        options=options,
    )


OVERFLOWS = {"float16": torch.float16, "float32": torch.float32, "inf - inf": torch.float32}


def overflowing(problem: Problem, kind: str, row: int, weight: float) -> tuple[Problem, Problem]:
    """The problem, in 8 dimensions and without targets 5, and with a finite hidden row whose logit 5 overflows.

    All upstream gradients of the row are `weight`. The kind "inf - inf" takes a bias of -inf there: the logit is NaN.
    """
    dtype = OVERFLOWS[kind]
    problem = replace(problem.to(dtype), targets_N=torch.where(problem.targets_N == 5, 6, problem.targets_N))
    problem.weight_VD[5] = 60
    if kind == "inf - inf" and problem.bias_V is not None:
        problem.bias_V[5] = -torch.inf
    for upstream_N in (problem.dnll_N, problem.dlse_N, problem.dentropy_N):
        if upstream_N is not None:
            upstream_N[row] = weight  # a copy: the problem was float64
    hidden_ND = problem.hidden_ND.clone()
    hidden_ND[row] = 6e4 if dtype == torch.float16 else 4e37
    return problem, replace(problem, hidden_ND=hidden_ND)


def assert_all_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Largest error of each tensor at most `tolerance` times its largest value."""
    assert len(found) == len(expected)
    for position, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        if b.numel():
            error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
            assert error <= tolerance, f"output {position}: relative error {error:.3g}, allowed {tolerance:.3g}"
