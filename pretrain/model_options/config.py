"""What `options:` in a run's configuration may say. Needs no torch, like every configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mixwright.data_mixing.config_file import StrictModel

Probability = Annotated[float, Field(gt=0, lt=1)]
Exceeding = Annotated[float, Field(gt=1)]

ZERO_STAGES = {"backslash": 2, "stochastic_experts": 2}
"""Options that need whole parameters in the optimizer or in the forward, and the highest ZeRO stage that has them."""


class LateDropout(StrictModel):
    """No dropout before `start_step`, then `p`, reached linearly over `ramp_steps` (0: at once)."""

    p: Probability
    start_step: int = Field(ge=0)
    ramp_steps: int = Field(default=0, ge=0)


class GeneralisedGaussianInit(StrictModel):
    """Matrices drawn with density ~ exp(-|x / a|**shape) and variance xi / fan-in; 2 is Gaussian, 1 Laplace.

    `residual_scaling` divides the variance of what writes into the residual stream by 2 x layers. Tails grow heavy
    below shape 1: at 0.5 the largest of 400,000 values is about 21 standard deviations.
    """

    shape: float = Field(ge=0.3, le=10)
    xi: float = Field(default=1.0, gt=0)
    residual_scaling: bool = True


class BackSlash(StrictModel):
    """After each update, matrices shrink by lr * strength * nu * (|theta| + epsilon)**(nu - 1), and stop at 0.

    `strength` is lambda / number of values, so it means the same for every model size.
    """

    strength: float = Field(gt=0)
    epsilon: float = Field(default=1.0, gt=0)


class StochasticExperts(StrictModel):
    """`num_experts` MLPs in every `every`-th layer, of which a random one is used in each of two passes of a step.

    `alpha` is the coefficient of the consistency loss beside the sum of both cross-entropies, as in the paper.
    """

    num_experts: int = Field(default=2, ge=2, le=64)
    every: int = Field(default=2, ge=1)
    alpha: float = Field(default=1.0, ge=0)


class WeightCompander(StrictModel):
    """Linear weights w = a arctan(v / b): slope a / b at 0, |w| < `headroom` times the largest initial weight.

    a and b are learned per matrix unless `learn` is false. A function in the style of the paper, not the paper's own.
    """

    slope: Exceeding = 1.5
    headroom: Exceeding = 2.0
    learn: bool = True


class NormalisedSoftmax(StrictModel):
    """Logits of L2-normalised output embeddings, hidden states or both, times a scale.

    `scale` is its first value; by default the one that gives logits of about unit variance.
    """

    normalise: Literal["output", "hidden", "both"] = "output"
    scale: float | None = Field(default=None, gt=0)
    learn_scale: bool = True


class ModelOptions(StrictModel):
    """Everything that is off unless a run asks for it."""

    late_dropout: LateDropout | None = None
    generalised_gaussian_init: GeneralisedGaussianInit | None = None
    backslash: BackSlash | None = None
    stochastic_experts: StochasticExperts | None = None
    weight_compander: WeightCompander | None = None
    normalised_softmax: NormalisedSoftmax | None = None

    def check_fit(
        self, *, is_new_model: bool, zero_stage: int, gradient_checkpointing: bool, num_steps: int, drops_already: bool
    ) -> None:
        """Raise ValueError, in one line, for what does not go together with the rest of the configuration."""
        for name, highest in ZERO_STAGES.items():
            if getattr(self, name) is not None and zero_stage > highest:
                raise ValueError(
                    f"options.{name} supports training.zero_stage 0 to {highest}, found {zero_stage}, which cuts "
                    "single parameters into parts"
                )
        if self.generalised_gaussian_init and not is_new_model:
            raise ValueError("options.generalised_gaussian_init draws a new model: use model.config, not model.path")
        if self.stochastic_experts and gradient_checkpointing:
            raise ValueError(
                "options.stochastic_experts does not go with model.gradient_checkpointing, which would compute the "
                "first pass again with the experts of the second"
            )
        if self.late_dropout and drops_already:
            raise ValueError("options.late_dropout and training.dropout both set dropout: use one of them")
        if self.late_dropout and self.late_dropout.start_step >= num_steps:
            raise ValueError(
                f"options.late_dropout.start_step = {self.late_dropout.start_step} is never reached: "
                f"training.num_steps = {num_steps}"
            )
