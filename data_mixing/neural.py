"""A small network that learns online: one hidden layer, an ensemble of perturbed predictions.

After "Contextual bandits with online neural regression" (Deb et al., 2312.07145): member s predicts

    f_s(x) = net(w, x) + c sum_i e_si (w - w0)_i / width^(1/4)        e: fixed random signs

and learns by gradient descent; the perturbation makes the online regression strongly convex. Their mean is squashed
to (0, 1). All numbers are kept in plain lists, so that a decision can be recomputed from the journal; the first ones
come from a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.permutation import mix_key, splitmix64

Floats = NDArray[np.float64]
Loss = Literal["squared", "kl"]

_FIRST, _SIGNS = range(2)


def keyed_uniform(size: int, *parts: int) -> Floats:
    """Numbers in [0, 1) [size] that depend on the key alone."""
    counter_n = np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(mix_key(*parts))
    return np.asarray((splitmix64(counter_n) >> np.uint64(11)).astype(np.float64) * 2.0**-53, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Ensemble:
    """S networks with D inputs and H hidden units. parameter_SP: W [H, D], b [H], v [H] and a constant, flat.

    first_SP: where they started; sign_SP: the signs of the perturbation; scale: c / H^(1/4).
    """

    parameter_SP: Floats
    first_SP: Floats
    sign_SP: Floats
    num_inputs: int
    num_hidden: int
    scale: float

    @classmethod
    def start(cls, num_members: int, num_inputs: int, num_hidden: int, perturbation: float, seed: int) -> Ensemble:
        """The ensemble of a seed, before it has seen anything: it predicts 1/2."""
        size = num_hidden * (num_inputs + 2) + 1
        first_SP = np.stack([keyed_uniform(size, _FIRST, seed, member) for member in range(num_members)]) * 2 - 1
        first_SP[:, : num_hidden * num_inputs] /= num_inputs**0.5
        first_SP[:, num_hidden * (num_inputs + 1) :] = 0.0
        sign_SP = np.stack([keyed_uniform(size, _SIGNS, seed, member) for member in range(num_members)])
        scale = perturbation / num_hidden**0.25
        return cls(first_SP.copy(), first_SP, np.where(sign_SP < 0.5, -1.0, 1.0), num_inputs, num_hidden, scale)

    def loaded(self, state: Mapping[str, Any]) -> Ensemble:
        """The same ensemble with the parameters of `state`."""
        parameter_SP = np.array(state["parameters"], dtype=np.float64)
        if parameter_SP.shape != self.first_SP.shape:
            raise ValueError(f"parameters of shape {parameter_SP.shape} do not fit a network of {self.first_SP.shape}")
        return self._with(parameter_SP)

    def state(self) -> dict[str, Any]:
        """Plain JSON data; starting points and signs come from the seed again."""
        return {"parameters": self.parameter_SP.tolist()}

    def predict(self, input_ND: Floats) -> Floats:
        """Mean prediction of each row [N], in (0, 1)."""
        return np.asarray(_squashed(self._logits(input_ND)[0]).mean(axis=0), dtype=np.float64)

    def learn(self, input_D: Floats, target: float, loss: Loss, rate: float) -> Ensemble:
        """One step of gradient descent on one observation, target in [0, 1]."""
        logit_S, hidden_SH = (part[:, 0] for part in self._logits(input_D[None]))
        predicted_S = _squashed(logit_S)
        slope_S = predicted_S - target
        if loss == "squared":
            slope_S = 2 * slope_S * predicted_S * (1 - predicted_S)
        _, _, out_SH, _ = self._parts()
        inner_SH = out_SH * (1 - hidden_SH**2)
        gradient_SP = np.concatenate(
            [
                (inner_SH[:, :, None] * input_D).reshape(len(out_SH), -1),
                inner_SH,
                hidden_SH,
                np.ones((len(out_SH), 1)),
            ],
            axis=1,
        )
        return self._with(self.parameter_SP - rate * slope_S[:, None] * (gradient_SP + self.scale * self.sign_SP))

    def _logits(self, input_ND: Floats) -> tuple[Floats, Floats]:
        """Perturbed outputs [S, N] and hidden units [S, N, H]."""
        weight_SHD, bias_SH, out_SH, constant_S = self._parts()
        hidden_SNH = np.tanh(np.einsum("shd,nd->snh", weight_SHD, input_ND) + bias_SH[:, None, :])
        moved_S = ((self.parameter_SP - self.first_SP) * self.sign_SP).sum(axis=1)
        offset_S = constant_S + self.scale * moved_S
        return np.einsum("snh,sh->sn", hidden_SNH, out_SH) + offset_S[:, None], hidden_SNH

    def _parts(self) -> tuple[Floats, Floats, Floats, Floats]:
        split = np.cumsum([self.num_hidden * self.num_inputs, self.num_hidden, self.num_hidden])
        weight_SW, bias_SH, out_SH, constant_S1 = np.split(self.parameter_SP, split, axis=1)
        return weight_SW.reshape(-1, self.num_hidden, self.num_inputs), bias_SH, out_SH, constant_S1[:, 0]

    def _with(self, parameter_SP: Floats) -> Ensemble:
        return Ensemble(parameter_SP, self.first_SP, self.sign_SP, self.num_inputs, self.num_hidden, self.scale)


def _squashed(logit: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(logit, -30, 30))), dtype=np.float64)
