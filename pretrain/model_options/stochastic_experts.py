"""Stochastic experts (THOR): two passes per step with randomly chosen MLPs, and a loss that makes them agree.

    L = 1/2 [ CE_1 + CE_2 + alpha sum_v 1/2 (p - q)(log p - log q) ]      per token, p and q of the two passes

One draw per (seed, step, layer, pass), so all ranks and all micro-batches of a step use the same experts. Halved, a
step's loss has the scale of one pass. An expert that a step does not use has a gradient of zero, not none: the same
update follows whatever the layout. Evaluation and export use the first expert of every layer.

N tokens, n of a block, D hidden, V vocabulary. Source: spec/methods.md 12; log-softmax, so logits of 120 stay finite.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixwright.data_mixing.permutation import mix_key
from mixwright.kernels.blocks import rows_per_scratch
from mixwright.kernels.distillation import DistillationLosses
from mixwright.kernels.linear_nll import TokenLosses
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.head import Head, LanguageModel, Lesson
from mixwright.pretrain.model_options.config import StochasticExperts


class Paths(nn.Module):
    """Takes the place of an MLP: one of `paths` computes, the first one outside training."""

    def __init__(self, mlp: nn.Module, num_experts: int, *, shuffled: bool) -> None:
        """Copies of `mlp`; shuffled, each is a draw of its own from the distribution of the initial values."""
        super().__init__()
        self.paths = nn.ModuleList([mlp, *(_copied(mlp, shuffled) for _ in range(num_experts - 1))])
        self._chosen = (0, 0)
        self._pass = 0

    def choose(self, first: int, second: int) -> None:
        """Experts of the two passes of the steps to come."""
        self._chosen = (first, second)

    def take(self, which: int) -> None:
        """The pass that begins: 0 or 1."""
        self._pass = which

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        number = self._chosen[self._pass] if self.training else 0
        output: Tensor = self.paths[number](*inputs, **options)
        if self.training and self._pass == 0 and torch.is_grad_enabled():
            output = _ZeroGradients.apply(output, *self._idle_parameters())  # type: ignore[no-untyped-call]
        return output

    def _idle_parameters(self) -> Iterator[nn.Parameter]:
        for number, path in enumerate(self.paths):
            if number not in self._chosen:
                yield from (parameter for parameter in path.parameters() if parameter.requires_grad)


class _ZeroGradients(torch.autograd.Function):
    """The output as it is; in the backward, zeros for parameters that no pass uses."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class StochasticLanguageModel(LanguageModel):
    """A language model with `Paths`: in training, losses are means over two passes.

    The consistency loss enters `nll_N` by its gradient only: its value stays plain cross-entropy, which reports,
    perplexities and instance weights are made of, and a row's weight scales its consistency too.
    """

    def __init__(self, causal_lm: Any, alpha: float) -> None:
        super().__init__(causal_lm)
        self._alpha = alpha

    def forward(self, tokens_BS: Tensor, lesson: Lesson | None = None) -> TokenLosses | DistillationLosses:
        if not self.training:
            return super().forward(tokens_BS)
        if lesson is not None:
            raise TrainingError("options.stochastic_experts and distillation do not go together: leave one of them out")
        targets_N = tokens_BS[:, 1:].reshape(-1)
        first_ND, second_ND = self._hidden_of_pass(tokens_BS, 0), self._hidden_of_pass(tokens_BS, 1)
        first, second = self.head(first_ND, targets_N), self.head(second_ND, targets_N)
        nll_N = (first.nll_N + second.nll_N) / 2
        if self._alpha and torch.is_grad_enabled():
            penalty_N = self._alpha / 2 * consistency(self.head, first_ND, second_ND)
            nll_N = nll_N + (penalty_N - penalty_N.detach())
        return TokenLosses(nll_N, first.lse_N)  # passes are alike: z-loss acts on one of them

    def _hidden_of_pass(self, tokens_BS: Tensor, which: int) -> Tensor:
        for module in paths_of(self):
            module.take(which)
        return self.hidden_states(tokens_BS)


def consistency(head: Head, first_ND: Tensor, second_ND: Tensor) -> Tensor:
    """1/2 sum_v (p - q)(log p - log q) per token, float32 [N]; gradients flow to both and to the head.

    Blocks of tokens are computed again in the backward, so logits of all tokens are never in memory.
    """
    row_dtype = torch.float64 if first_ND.dtype == torch.float64 else torch.float32
    rows = rows_per_scratch(head.weight.shape[0], row_dtype, first_ND.device)
    blocks = zip(torch.split(first_ND, rows), torch.split(second_ND, rows), strict=True)
    parts = [
        checkpoint(_block_consistency, head, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks
    ]
    return torch.cat(parts)


def _block_consistency(head: Head, first_nD: Tensor, second_nD: Tensor) -> Tensor:
    return half_symmetric_kl(head.logits(first_nD), head.logits(second_nD))


def half_symmetric_kl(first_nV: Tensor, second_nV: Tensor) -> Tensor:
    """1/2 [KL(p || q) + KL(q || p)] of two rows of logits, [n], nats."""
    value_n: Tensor = _HalfSymmetricKL.apply(first_nV, second_nV)  # type: ignore[no-untyped-call]
    return value_n


class _HalfSymmetricKL(torch.autograd.Function):
    """d/dz_p = 1/2 [ p (log p - log q - KL(p || q)) + p - q ], and with p and q exchanged for z_q."""

    @staticmethod
    def forward(ctx: Any, first_nV: Tensor, second_nV: Tensor) -> Tensor:
        log_p_nV, log_q_nV = first_nV.log_softmax(-1), second_nV.log_softmax(-1)
        ratio_nV = log_p_nV - log_q_nV
        p_nV, q_nV = log_p_nV.exp_(), log_q_nV.exp_()
        ctx.save_for_backward(p_nV, q_nV, ratio_nV)
        return torch.einsum("nv,nv->n", p_nV - q_nV, ratio_nV) / 2

    @staticmethod
    def backward(ctx: Any, upstream_n: Tensor) -> tuple[Tensor, Tensor]:
        p_nV, q_nV, ratio_nV = ctx.saved_tensors
        gap_nV, half_n1 = p_nV - q_nV, upstream_n[:, None] / 2
        forward_n1 = torch.einsum("nv,nv->n", p_nV, ratio_nV)[:, None]
        backward_n1 = torch.einsum("nv,nv->n", q_nV, ratio_nV)[:, None]
        first_nV = torch.addcmul(gap_nV, p_nV, ratio_nV - forward_n1).mul_(half_n1)
        second_nV = torch.addcmul(gap_nV, q_nV, ratio_nV - backward_n1).mul_(-half_n1)
        return first_nV, second_nV


def install(causal_lm: Any, config: StochasticExperts, *, is_new: bool) -> None:
    """Replace the MLP of every `every`-th layer by `Paths`; experts of a loaded model begin as equal copies.

    Raises TrainingError when layers have no plain `mlp`.
    """
    layers = _layers(causal_lm)
    for layer in layers[:: config.every]:
        mlp = getattr(layer, "mlp", None)
        if not isinstance(mlp, nn.Module) or any(parameter.ndim > 2 for parameter in mlp.parameters()):
            children = ", ".join(name for name, _ in layer.named_children())
            raise TrainingError(
                f"options.stochastic_experts: layers of model type {causal_lm.config.model_type!r} have no plain "
                f"`mlp` to replicate, they hold {children}"
            )
        layer.mlp = Paths(mlp, config.num_experts, shuffled=is_new)


def choose_experts(model: nn.Module, num_experts: int, seed: int, step: int) -> None:
    """Draw the experts of one step, alike on all ranks."""
    for layer, module in enumerate(paths_of(model)):
        first, second = (mix_key(seed, step, layer, which) % num_experts for which in (0, 1))
        module.choose(first, second)


def paths_of(model: nn.Module) -> list[Paths]:
    """In the order of layers."""
    return [module for module in model.modules() if isinstance(module, Paths)]


def first_paths(state: dict[str, Tensor], causal_lm: nn.Module) -> dict[str, Tensor]:
    """`state` of the plain model whose MLPs are the first experts."""
    prefixes = tuple(f"{name}.paths." for name, module in causal_lm.named_modules() if isinstance(module, Paths))
    kept: dict[str, Tensor] = {}
    for name, value in state.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            kept[name] = value
        elif name.startswith(f"{prefix}0."):
            kept[prefix.removesuffix("paths.") + name.removeprefix(f"{prefix}0.")] = value
    return kept


def _layers(causal_lm: Any) -> nn.ModuleList:
    number = causal_lm.config.num_hidden_layers
    found = [m for m in causal_lm.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    if not found:
        raise TrainingError(f"options.stochastic_experts: no list of {number} layers in this model")
    return found[0]


@torch.no_grad()
def _copied(mlp: nn.Module, shuffled: bool) -> nn.Module:
    """Values of an initial matrix are independent: in a random order they are another draw, whatever drew them."""
    expert = copy.deepcopy(mlp)
    for parameter in expert.parameters():
        if shuffled and parameter.ndim == 2:
            order = torch.randperm(parameter.numel())
            parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
    return expert
