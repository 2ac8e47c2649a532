"""DoGE: a proxy run that re-weights its domains by how their gradients agree with that of a mixed validation batch.

Fan, Pagliardini, Jaggi, "DoGE: Domain reweighting with generalization estimation" (arXiv 2310.15393), as the Aioli
repository runs it (spec/methods.md 1.4). Every step reads rows of all domains alike; some of them are the validation
batch. With g_j the gradient (clipped to norm 1) of the loss on domain j's other rows and g_val that of the batch:

    s_j = lr <g_j, g_val> / (mean_i ||g_i|| + 1e-6), within [0, 5 lr]      w_j <- w_j exp(s_j / mu) / Z
    the model moves along sum_j w_j g_j                                    result: the average of w over the steps

A domain that has no row in a step has s_j = 0 there. G domains, P parameters, B rows.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from mixwright.data_mixing.plan import RowRefs
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.proxy import Curve, ProxyRecord, ProxyRun, ProxyTrainer, finished, genesis_of
from mixwright.pretrain.proxy_mixture import steering
from mixwright.pretrain.schedules import learning_rate

LARGEST_SCORE = 5.0
"""Bound on s_j, in learning rates (the Aioli repository's)."""


class DogeRun(ProxyRun):
    """`policy` says what is read; the last `validation_batch` positions of each step make the validation batch.

    `mu` is the Bregman coefficient: 0.05 in the original code's default, 0.01 in its configuration and in the Aioli
    repository's scripts for 2 and 3 domains, 0.1 for 7.
    """

    mu: float = Field(default=0.01, gt=0)
    validation_batch: int = Field(gt=0)

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> DogeRun:
        if self.validation_batch >= self.config.rows_per_step:
            raise ValueError(
                f"validation_batch = {self.validation_batch} leaves no row of {self.config.rows_per_step} to train on"
            )
        return self


def train_doge(run: DogeRun, store: TokenStore) -> ProxyRecord:
    """Train to the last step; the record's `average_weights` are the result. Raises as train_proxy does."""
    began = time.perf_counter()
    genesis = genesis_of(run, store)
    mixture = steering(run.policy, genesis)
    trainer = ProxyTrainer(run, store, genesis)
    curve = Curve(trainer)
    curve.measure(0)
    weight_G = np.full(len(genesis.domains), 1 / len(genesis.domains))
    total_G = np.zeros_like(weight_G)
    num_training = run.config.rows_per_step - run.validation_batch
    for step in range(run.config.num_steps):
        trainer.begin_step(step)
        refs = mixture.plan.rows(step)
        rate = learning_rate(run.config.schedule, run.config.optimizer.lr, step, run.config.num_steps)
        target_P = clipped(_gradient(trainer, _part(refs, np.arange(num_training, len(refs.row_n)))))
        gradient_GP = _domain_gradients(trainer, _part(refs, np.arange(num_training)), len(weight_G))
        weight_G = updated(weight_G, scores(gradient_GP, target_P, rate), run.mu)
        total_G += weight_G
        _set_gradient(trainer, torch.from_numpy(weight_G).to(gradient_GP.dtype) @ gradient_GP)
        trainer.update(step)
    weights = {d.name: float(w) for d, w in zip(genesis.domains, total_G / run.config.num_steps, strict=True)}
    return finished(run, trainer, curve, mixture, began, average_weights=weights)


def scores(gradient_GP: Tensor, target_P: Tensor, rate: float) -> np.ndarray:
    """s_j of the domains, float64 [G]; a domain without rows has a gradient of zeros."""
    norm = float(gradient_GP.norm(dim=1).mean())
    score_G = rate * (gradient_GP @ target_P) / (norm + 1e-6)
    return np.asarray(score_G.clamp(0.0, LARGEST_SCORE * rate).double().numpy())


def updated(weight_G: np.ndarray, score_G: np.ndarray, mu: float) -> np.ndarray:
    """w_j exp(s_j / mu) / Z."""
    log_G = np.log(weight_G) + score_G / mu
    raised_G = np.exp(log_G - log_G.max())
    return np.asarray(raised_G / raised_G.sum())


def clipped(gradient_P: Tensor) -> Tensor:
    """The gradient with norm at most 1."""
    return gradient_P / max(1.0, float(gradient_P.norm()))


def _domain_gradients(trainer: ProxyTrainer, refs: RowRefs, num_domains: int) -> Tensor:
    """Clipped gradient of each domain's mean loss [G, P]."""
    gradients = []
    for domain in range(num_domains):
        rows = np.flatnonzero(refs.domain_n == domain)
        gradients.append(clipped(_gradient(trainer, _part(refs, rows))) if len(rows) else None)
    zero_P = torch.zeros(sum(p.numel() for p in trainer.model.parameters()))
    return torch.stack([zero_P if gradient is None else gradient for gradient in gradients])


def _gradient(trainer: ProxyTrainer, refs: RowRefs) -> Tensor:
    """Gradient of the mean loss of the rows, flat [P]."""
    parameters = list(trainer.model.parameters())
    loss = trainer.model(trainer.gather(refs)).nll_N.mean()
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])


def _set_gradient(trainer: ProxyTrainer, gradient_P: Tensor) -> None:
    parameters = list(trainer.model.parameters())
    for parameter, part in zip(parameters, torch.split(gradient_P, [p.numel() for p in parameters]), strict=True):
        parameter.grad = part.reshape(parameter.shape).clone()


def _part(refs: RowRefs, which: np.ndarray) -> RowRefs:
    return RowRefs(refs.position_n[which], refs.domain_n[which], refs.epoch_n[which], refs.row_n[which])
