"""Where the options of a run touch its training: when the model is built, before every step, after every update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.model_options.backslash import attach
from mixwright.pretrain.model_options.compander import compand
from mixwright.pretrain.model_options.config import ModelOptions
from mixwright.pretrain.model_options.generalised_gaussian import initialise
from mixwright.pretrain.model_options.late_dropout import check_can_drop, late_dropout_probability
from mixwright.pretrain.model_options.normalised_head import NormalisedHead
from mixwright.pretrain.model_options.stochastic_experts import (
    StochasticLanguageModel,
    choose_experts,
    install,
)
from mixwright.pretrain.schedules import apply_dropout


def language_model(causal_lm: Any, options: ModelOptions, *, is_new: bool) -> LanguageModel:
    """The model with everything but its head as the options ask for; its losses are still those of its own logits.

    Raises TrainingError for an option that this model has no place for.
    """
    if options.late_dropout:
        check_can_drop(causal_lm, causal_lm.config.model_type)
    if options.generalised_gaussian_init:
        initialise(causal_lm, options.generalised_gaussian_init)
    if options.stochastic_experts:
        install(causal_lm, options.stochastic_experts, is_new=is_new)
    if options.weight_compander:
        compand(causal_lm, options.weight_compander)
    if options.stochastic_experts:
        return StochasticLanguageModel(causal_lm, options.stochastic_experts.alpha)
    return LanguageModel(causal_lm)


def fit_head(model: LanguageModel, options: ModelOptions) -> None:
    """Put the head in place that the options ask for."""
    if options.normalised_softmax:
        model.head = NormalisedHead(model.head, options.normalised_softmax)


def begin_step(model: nn.Module, options: ModelOptions, seed: int, step: int) -> None:
    """Set what depends on the optimizer step: a function of (seed, step), alike on all ranks."""
    if options.late_dropout:
        apply_dropout(model, late_dropout_probability(options.late_dropout, step))
    if options.stochastic_experts:
        choose_experts(model, options.stochastic_experts.num_experts, seed, step)


def follow_updates(
    options: ModelOptions,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    add_over_ranks: Callable[[Tensor], Tensor],
) -> None:
    """Act after every step of `optimizer`, whose first group holds the model's matrices, or this rank's part of them.

    `add_over_ranks` sums what ranks know of their parts; where every rank holds all values it is the identity.
    """
    if options.backslash:
        num_values = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim >= 2)
        attach(options.backslash, optimizer, num_values, add_over_ranks)
