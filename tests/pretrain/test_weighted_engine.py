"""Instance weights inside DeepSpeed: the same gradients whatever the layout, in every scope, before clipping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.data_mixing.loss_weighting import LossWeighting
from mixwright.pretrain.engine import Engine, decayed_groups, pretrain_settings, start_ranks
from mixwright.pretrain.objective import InForce, Objective, Shape
from mixwright.pretrain.ranks import Ranks
from tests.pretrain.test_engine import ROWS, STEPS, config_for, fixed_model, tokens_of
from tests.ranks import run_ranks

Z_LOSS, R, CLIP_NORM = 1e-3, 0.4, 0.5
RATE = 0.5
"""Small steps: losses stay within the ranges of the step before, so that lagged weights differ."""
DOMAIN_B = torch.arange(ROWS) % 2

DEFERRED = {"scope": "step_deferred", "r": R, "range_memory": 1.0}
TWO_PHASE = {"scope": "step_two_phase", "r": R}
MICRO = {"scope": "micro_step", "r": R}
DOCUMENTS = {"scope": "step_two_phase", "r": R, "sample": "document"}
EOS = 3

Run = tuple[int, int, dict[str, Any]]  # zero stage, micro-batch rows, weighting


def train_weighted(runs: list[Run]) -> list[tuple[list[float], dict[str, Tensor]]]:
    """For each run: gradient norms of three steps and the parameters after them."""
    torch.set_num_threads(1)
    ranks = start_ranks(lambda text: None)
    return [train_one(ranks, run) for run in runs]


def train_one(ranks: Ranks, run: Run) -> tuple[list[float], dict[str, Tensor]]:
    stage, micro, keys = run
    dtype = keys.get("dtype", "float32")
    config = config_for(stage, micro, model__dtype=dtype, training__clip_norm=CLIP_NORM)
    engine = Engine(pretrain_settings(config), fixed_model(config), ranks)
    weighting = LossWeighting(**{key: value for key, value in keys.items() if key != "dtype"})
    objective = Objective(Shape(ROWS, micro, 2, Z_LOSS, eos_id=EOS), ranks)
    return [one_step(engine, objective, weighting, step, micro) for step in range(STEPS)], engine.full_parameters()


def one_step(engine: Engine, objective: Objective, weighting: LossWeighting, step: int, micro: int) -> float:
    ranks, share = engine.ranks, ROWS // engine.ranks.size
    mine = slice(ranks.rank * share, (ranks.rank + 1) * share)
    batches = list(zip(tokens_of(step)[mine].split(micro), DOMAIN_B[mine].split(micro), strict=True))
    objective.begin(InForce(weighting, step), weighting if step else None)
    if objective.has_first_pass:
        with torch.no_grad():
            for tokens_BS, domain_B in batches:
                objective.preview(engine.forward(tokens_BS), tokens_BS, domain_B)
    norm = None
    for tokens_BS, domain_B in batches:
        losses = engine.forward(tokens_BS)
        engine.backward(objective(losses, tokens_BS, domain_B))
        norm = engine.step(RATE, objective.end() if engine.ends_step else 1.0)
    assert norm is not None
    return norm


def reference(scope: str, rows_together: int = ROWS) -> tuple[list[float], dict[str, Tensor]]:
    """The same steps in float64 with plain torch: one process, one batch, weights by the formulas of the paper."""
    model = fixed_model(config_for(0, ROWS)).double()
    optimizer = torch.optim.AdamW(decayed_groups(model, 0.1), lr=RATE, betas=(0.9, 0.95), eps=1.0)
    norms, spreads = [], []
    ends = last = None
    for step in range(STEPS):
        logits_BTV = model.causal_lm(tokens_of(step)[:, :-1], use_cache=False).logits
        nll_BT = torch.nn.functional.cross_entropy(logits_BTV.mT, tokens_of(step)[:, 1:], reduction="none")
        total_B = (nll_BT + Z_LOSS * logits_BTV.logsumexp(-1).square()).mean(dim=1)
        loss_B = nll_BT.mean(dim=1).detach()
        if scope == "step_deferred":
            even_B = torch.full((ROWS,), 1 / ROWS)
            weight_B = even_B if ends is None else torch.softmax(linupper(loss_B, *ends) / R, 0)
            seen = torch.stack([loss_B.min(), loss_B.max()])
            ends, last = (seen if last is None else 2 * seen - last), seen  # Holt's smoothing with a memory of 1
        else:
            exponents = [linupper(part, part.min(), part.max()) / R for part in loss_B.split(rows_together)]
            weight_B = torch.cat([torch.softmax(exponent, 0) for exponent in exponents]) / len(exponents)
        spreads.append(float(weight_B.max() / weight_B.min()))
        (weight_B * total_B).sum().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    assert min(spreads[1:]) > 2, f"the weights of this test hardly differ: {spreads}"
    return norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


def linupper(loss_B: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.clamp(torch.clamp(2 * (loss_B - low) / (high - low) - 1, -1, 1) + 1, max=1.0)


BFLOAT16 = {**DEFERRED, "dtype": "bfloat16"}
ALONE: list[Run] = [(0, 8, DEFERRED), (0, 2, DEFERRED), (2, 2, DEFERRED), (0, 8, TWO_PHASE), (0, 2, TWO_PHASE)]
ALONE += [(0, 8, MICRO), (0, 8, DOCUMENTS), (0, 2, DOCUMENTS), (0, 8, {**DEFERRED, "r": 1e6}), (0, 8, BFLOAT16)]
TWO_RANKS: list[Run] = [(stage, micro, DEFERRED) for stage in (0, 1, 2, 3) for micro in (4, 2)]
TWO_RANKS += [(0, 4, TWO_PHASE), (3, 2, TWO_PHASE), (0, 4, MICRO), (2, 2, DOCUMENTS), (2, 2, BFLOAT16)]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What the leader saw, by ranks and run. One start of the ranks serves all runs."""
    found = {}
    for world, runs in ((1, ALONE), (2, TWO_RANKS)):
        for run, result in zip(runs, run_ranks(train_weighted, world, runs)[0], strict=True):
            found[f"{world} {run}"] = result
    return found


def assert_equal(result: Any, expected: Any, gradient_atol: float = 1e-6) -> None:
    """With AdamW's eps at 1 a parameter moves by about the rate times its gradient."""
    assert result[0] == pytest.approx(expected[0], rel=2e-5)
    atol = RATE * STEPS * gradient_atol
    for name, parameter in expected[1].items():
        torch.testing.assert_close(result[1][name].double(), parameter.double(), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("world", "run"), [(1, run) for run in ALONE[:3]] + [(2, run) for run in TWO_RANKS[:8]], ids=str
)
def test_deferred_weights_equal_plain_float64_in_every_layout_and_stage(
    results: dict[str, Any], world: int, run: Run
) -> None:
    assert_equal(results[f"{world} {run}"], reference("step_deferred"))


@pytest.mark.parametrize(
    ("world", "run"), [(1, ALONE[3]), (1, ALONE[4]), (2, TWO_RANKS[8]), (2, TWO_RANKS[9])], ids=str
)
def test_two_phase_weights_equal_plain_float64_in_every_layout(results: dict[str, Any], world: int, run: Run) -> None:
    assert_equal(results[f"{world} {run}"], reference("step_two_phase"))


@pytest.mark.parametrize(("world", "run"), [(1, ALONE[5]), (2, TWO_RANKS[10])], ids=str)
def test_micro_step_weights_are_normalised_over_the_ranks_of_a_micro_batch(
    results: dict[str, Any], world: int, run: Run
) -> None:
    assert_equal(results[f"{world} {run}"], reference("micro_step", 4 * world if world == 2 else ROWS))


def test_documents_as_samples_give_the_same_gradients_in_every_layout(results: dict[str, Any]) -> None:
    assert_equal(results[f"1 {ALONE[7]}"], results[f"1 {ALONE[6]}"])
    assert_equal(results[f"2 {TWO_RANKS[11]}"], results[f"1 {ALONE[6]}"])
    rows = results[f"1 {ALONE[3]}"]
    assert any(not math.isclose(a, b, rel_tol=1e-3) for a, b in zip(rows[0], results[f"1 {ALONE[6]}"][0], strict=True))


def test_a_large_r_is_uniform_weighting(results: dict[str, Any]) -> None:
    model = fixed_model(config_for(0, ROWS)).double()
    logits_BTV = model.causal_lm(tokens_of(0)[:, :-1], use_cache=False).logits
    nll = torch.nn.functional.cross_entropy(logits_BTV.mT, tokens_of(0)[:, 1:])
    (nll + Z_LOSS * logits_BTV.logsumexp(-1).square().mean()).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf))
    large, weighted = results[f"1 {ALONE[8]}"][0], results[f"1 {ALONE[0]}"][0]
    assert large[0] == pytest.approx(norm, rel=2e-5)
    assert abs(large[1] - weighted[1]) > 1e-3 * weighted[1]


def test_bfloat16_stays_near_float64(results: dict[str, Any]) -> None:
    expected = reference("step_deferred")[0]
    assert results[f"1 {ALONE[9]}"][0] == pytest.approx(expected, rel=0.05)
    assert results[f"2 {TWO_RANKS[12]}"][0] == pytest.approx(expected, rel=0.05)
