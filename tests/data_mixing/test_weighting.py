"""Instance weights: golden values, numerics of float32, what is left out, temperatures, lag, two-term losses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixwright.data_mixing.config_file import validate
from mixwright.data_mixing.errors import ConfigError
from mixwright.data_mixing.loss_weighting import LossWeighting
from mixwright.data_mixing.weighting import (
    Samples,
    WeightingState,
    bag_instance_loss,
    domain_means,
    effective_samples,
    exact_weights,
    exponents,
    find_range,
    lagged_factors,
    mirror_descent_logit,
    normalised,
    per_domain,
    two_term_loss,
    updated,
)
from tests.data_mixing.online_cases import GOLDEN

LOSSES = (2.0, 2.5, 3.0, 4.0)


def weighting(**keys: Any) -> LossWeighting:
    return validate(LossWeighting, keys, "loss_weighting")


def samples(losses: Any, tokens: Any = None, domains: Any = None) -> Samples:
    loss_S = torch.tensor(losses, dtype=torch.float32)
    return Samples(
        loss_S,
        torch.full_like(loss_S, 8.0) if tokens is None else torch.tensor(tokens, dtype=torch.float32),
        torch.zeros(len(loss_S), dtype=torch.int64) if domains is None else torch.tensor(domains),
    )


def weights(these: Samples, num_domains: int = 1, state: WeightingState | None = None, **keys: Any) -> Tensor:
    asked = weighting(**keys)
    known = state or WeightingState.none(num_domains)
    return exact_weights(asked, these, known, asked.inverse_temperature(10**6))


@pytest.mark.parametrize("r", [0.4, 1.0])
@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes"])
def test_golden_weights(strategy: str, r: float) -> None:
    golden = GOLDEN["dynamic_reweighting"][f"{strategy}_r{r}"]
    weight_S = weights(samples(LOSSES), strategy=strategy, r=r)
    assert weight_S.tolist() == pytest.approx(golden["w"], abs=1e-6)
    assert 4 * float(effective_samples(weight_S, samples(LOSSES).tokens_S)) == pytest.approx(golden["ess"], rel=1e-5)
    assert float((weight_S * torch.tensor(LOSSES)).sum()) == pytest.approx(golden["weighted_loss"], rel=1e-6)


def test_upper_is_linear_and_tilted_is_the_softmax_of_the_losses() -> None:
    assert weights(samples(LOSSES), strategy="upper", r=0.4).tolist() == pytest.approx(
        torch.softmax(torch.tensor([0.0, 0.25, 0.5, 1.0]) / 0.4, 0).tolist(), abs=1e-6
    )
    assert weights(samples(LOSSES), strategy="tilted", r=2.0).tolist() == pytest.approx(
        torch.softmax(torch.tensor(LOSSES) / 2, 0).tolist(), abs=1e-6
    )


@pytest.mark.parametrize("strategy", ["uniform", "linupper", "quadratic", "extremes", "upper", "tilted"])
def test_a_large_r_counts_every_token_alike(strategy: str) -> None:
    tokens = [8.0, 4.0, 2.0, 2.0]
    assert weights(samples(LOSSES, tokens), strategy=strategy, r=1e6).tolist() == pytest.approx(
        [0.5, 0.25, 0.125, 0.125], abs=1e-6
    )


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes", "tilted"])
def test_equal_losses_and_a_single_sample_weigh_alike(strategy: str) -> None:
    assert weights(samples([3.0] * 4), strategy=strategy, r=0.1).tolist() == [0.25] * 4
    assert weights(samples([3.0]), strategy=strategy, r=0.1).tolist() == [1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_without_a_finite_loss_or_without_tokens_is_left_out_and_changes_nothing_else(bad: float) -> None:
    alone = weights(samples(LOSSES), r=0.4).tolist()
    found = weights(samples([bad, *LOSSES, 9.0], [8.0] * 5 + [0.0]), r=0.4).tolist()
    assert found == [0.0, *alone, 0.0]
    assert weights(samples([bad, bad]), r=0.4).tolist() == [0.0, 0.0]


def test_a_narrow_range_of_float32_losses_is_not_lost_to_rounding() -> None:
    loss_S = torch.tensor([3.0, 3.000003, 3.000007, 3.00001], dtype=torch.float32)
    low, high = loss_S.min(), loss_S.max()
    h_S = exponents(weighting(strategy="upper"), loss_S, torch.zeros(4, dtype=torch.int64), low[None], high[None])
    exact = loss_S.double()
    exact = (exact - exact[0]) / (exact[-1] - exact[0]) - 1  # f - 1 = (h + 1) / 2 - 1
    assert h_S.tolist() == pytest.approx(exact.tolist(), abs=1e-6)


def test_quantiles_keep_an_outlier_from_flattening_the_others() -> None:
    losses = [2.0 + 0.01 * place for place in range(99)] + [50.0]
    plain = weights(samples(losses), strategy="upper", r=0.4)
    clipped = weights(samples(losses), strategy="upper", r=0.4, quantiles=(0.05, 0.95))
    assert float(plain[98] / plain[0]) < 1.1
    assert float(clipped[98] / clipped[0]) == pytest.approx(math.exp(1 / 0.4), rel=1e-4)
    assert float(clipped[99]) == float(clipped[98])


def test_the_target_effective_sample_size_is_reached() -> None:
    losses = torch.linspace(2.0, 4.0, 64).tolist()
    these = samples(losses)
    for target in (0.3, 0.6, 0.9):
        weight_S = weights(these, strategy="upper", target_ess=target)
        assert float(effective_samples(weight_S, these.tokens_S)) == pytest.approx(target, abs=0.01)


def test_normalising_inside_domains_leaves_each_domain_its_part() -> None:
    these = samples([2.0, 2.2, 2.4, 5.0, 5.5, 7.0], domains=[0, 0, 0, 1, 1, 1], tokens=[4, 4, 4, 8, 8, 8])
    weight_S = weights(these, 2, within="domain", r=0.4)
    assert weight_S[:3].sum().item() == pytest.approx(1 / 3, abs=1e-6)
    assert weight_S[:3].tolist() == pytest.approx((weights(samples([2.0, 2.2, 2.4]), r=0.4) / 3).tolist(), abs=1e-6)
    across = weights(these, 2, within="batch", r=0.4)
    assert across[:3].sum().item() < 0.2


@pytest.mark.parametrize("quantiles", [(0.0, 1.0), (0.1, 0.8)])
def test_sums_and_ranges_by_domain_are_those_of_a_loop_over_domains(quantiles: tuple[float, float]) -> None:
    chance, num_domains = torch.Generator().manual_seed(0), 40
    domain_S = torch.randint(0, 30, (400,), generator=chance)  # ten domains are not seen
    loss_S = 3 * torch.rand(400, generator=chance)
    loss_S[::17] = math.nan
    loss_S[domain_S == 5] = math.inf  # one has nothing but samples that are left out
    tokens_S = torch.randint(0, 512, (400,), generator=chance).float()
    these = Samples(loss_S, tokens_S, domain_S)
    low_G, high_G = find_range(weighting(within="domain", quantiles=quantiles), loss_S, domain_S, num_domains)
    sum_G, mean_G = per_domain(tokens_S, these, num_domains), domain_means(these, num_domains)
    for domain in range(num_domains):
        ours = [place for place in (domain_S == domain).nonzero().flatten().tolist() if math.isfinite(loss_S[place])]
        tokens = [tokens_S[place].item() for place in ours]
        expected = [math.nan, math.nan, math.nan]
        if ours:
            ends = torch.quantile(loss_S[ours], torch.tensor(quantiles)).tolist()
            expected = [*ends, sum((loss_S[ours] * tokens_S[ours]).tolist()) / sum(tokens)]
        assert [low_G[domain].item(), high_G[domain].item()] == pytest.approx(expected[:2], rel=0, abs=0, nan_ok=True)
        assert sum_G[domain] == sum(tokens)
        assert mean_G[domain].item() == pytest.approx(expected[2], rel=1e-14, nan_ok=True)
    assert len(ours) == 0


class _Work(TorchDispatchMode):
    """Counts operations and keeps the size of the largest tensor that one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        sizes = [part.numel() for part in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(part)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.parametrize("within", ["batch", "domain"])
def test_work_grows_with_samples_plus_domains_and_not_with_their_product(within: str) -> None:
    these = samples([2.0, 2.5, 3.0, 4.0] * 8, domains=[3, 1, 0, 2] * 8)
    work: dict[int, _Work] = {}
    for num_domains in (4, 4000):
        with _Work() as work[num_domains]:
            updated(WeightingState.none(num_domains), weighting(within=within, rho=0.5), these, 1.0)
            weights(these, num_domains, within=within, rho=0.5)
    assert work[4].operations == work[4000].operations > 0
    assert work[4000].largest <= 2 * 4000  # two ends of the range


def test_excess_compares_with_what_is_usual_in_the_domain() -> None:
    usual = WeightingState.none(2)
    usual = replace(usual, mean_G=torch.tensor([2.0, 6.0]).double())
    these = samples([2.5, 6.0, 5.5, 3.0], domains=[0, 1, 1, 0])
    plain = weights(samples([0.5, 0.0, -0.5, 1.0]), strategy="upper", r=0.5).tolist()
    assert weights(these, 2, usual, score="excess", strategy="upper", r=0.5).tolist() == pytest.approx(plain, abs=1e-6)


def test_rho_goes_from_the_mean_of_the_bag_to_the_instance() -> None:
    these = samples([1.0, 3.0, 4.0, 8.0], domains=[0, 0, 1, 1])
    bags = weights(these, 2, rho=0.0, strategy="upper", r=0.5)
    assert bags[0] == bags[1]
    assert bags[2] == bags[3]
    assert (
        weights(these, 2, rho=1.0, strategy="upper", r=0.5).tolist()
        == weights(these, 2, strategy="upper", r=0.5).tolist()
    )
    half = weights(samples([1.5, 2.5, 5.0, 7.0]), strategy="upper", r=0.5)
    assert weights(these, 2, rho=0.5, strategy="upper", r=0.5).tolist() == pytest.approx(half.tolist(), abs=1e-6)


def test_the_temperature_warms_up_and_follows_its_points_in_the_logarithm() -> None:
    assert [weighting(r=0.5, warmup_steps=4).inverse_temperature(age) for age in (0, 1, 4, 9)] == [0.0, 0.5, 2.0, 2.0]
    points = weighting(r=[{"step": 10, "r": 4.0}, {"step": 20, "r": 1.0}])
    assert [1 / points.inverse_temperature(age) for age in (0, 10, 15, 20, 99)] == pytest.approx([4, 4, 2, 1, 1])


def test_lagged_factors_of_known_ranges_are_the_exact_weights_times_one_number() -> None:
    asked, these = weighting(r=0.4), samples(LOSSES)
    state = updated(WeightingState.none(1), asked, these, asked.inverse_temperature(0))
    factor_S = lagged_factors(asked, these, state, asked.inverse_temperature(0))
    assert normalised(factor_S, these).tolist() == pytest.approx(weights(these, r=0.4).tolist(), abs=1e-7)
    assert lagged_factors(asked, these, WeightingState.none(1), 2.5).tolist() == [1.0] * 4


def test_a_range_that_falls_steadily_is_met_and_not_run_after() -> None:
    asked, state = weighting(range_memory=4.0), WeightingState.none(1)
    for step in range(60):
        state = updated(state, asked, samples([6.0 - 0.1 * step, 7.0 - 0.1 * step]), 1.0)
    low_G, high_G = state.range_G
    assert (low_G.item(), high_G.item()) == pytest.approx((0.0, 1.0), abs=1e-3)


def test_ranges_are_averaged_and_a_domain_that_is_not_seen_keeps_what_it_had() -> None:
    asked = weighting(within="domain", range_memory=2.0, mean_memory=4.0)
    state = updated(WeightingState.none(2), asked, samples([2.0, 4.0, 7.0, 9.0], domains=[0, 0, 1, 1]), 1.0)
    state = updated(state, asked, samples([3.0, 4.0, math.nan], domains=[0, 0, 1]), 1.0)
    assert (state.low_G.tolist(), state.low_trend_G.tolist()) == ([2.5, 7.0], [0.25, 0.0])
    assert (state.high_G.tolist(), state.high_trend_G.tolist()) == ([4.0, 9.0], [0.0, 0.0])
    assert [end.tolist() for end in state.range_G] == [[2.75, 7.0], [4.0, 9.0]]
    assert state.mean_G.tolist() == [3.125, 8.0]
    again = WeightingState.from_json(json.loads(json.dumps(state.to_json())))
    assert again.to_json() == state.to_json()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"strategy": "linuper"}, r"strategy.*'linupper'.*found 'linuper'"),
        ({"r": 0}, r"r.*greater than 0"),
        ({"r": 1.0, "target_ess": 0.5}, r"give one of them"),
        ({"r": [{"step": 5, "r": 1}, {"step": 5, "r": 2}]}, r"increasing steps, found steps \[5, 5\]"),
        ({"quantiles": (0.9, 0.1)}, r"0 <= low < high <= 1, found 0.9 and 0.1"),
        ({"z_loss": "tokens"}, r"micro_step or step_two_phase, found step_deferred"),
        ({"temperatur": 1}, r"temperatur"),
    ],
)
def test_a_wrong_key_or_value_is_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        weighting(**keys)


def test_adawac_in_the_logit_equals_the_naive_update_until_that_saturates_and_never_overflows() -> None:
    golden = GOLDEN["adawac"]
    ce, dac = torch.tensor([golden["ce"]]), torch.tensor([golden["dac"]])
    start = torch.logit(torch.tensor([golden["beta"]]))
    assert torch.sigmoid(mirror_descent_logit(start, ce, dac, golden["eta"])).item() == pytest.approx(
        golden["beta_new"]
    )
    beta_S, logit_S = torch.full((3,), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    gap_S = torch.tensor([0.5, -0.3, 0.01], dtype=torch.float64)
    for step in range(10_000):
        logit_S = mirror_descent_logit(logit_S, gap_S, torch.zeros(3), 1.0)
        if step < 20:
            grown_S = beta_S * torch.exp(gap_S)
            beta_S = grown_S / (grown_S + 1 - beta_S)
            assert torch.sigmoid(logit_S).tolist() == pytest.approx(beta_S.tolist(), rel=1e-9)
    loss = two_term_loss(logit_S, gap_S.clone().requires_grad_(), torch.zeros(3, dtype=torch.float64))
    assert bool(torch.isfinite(loss))
    assert float(mirror_descent_logit(torch.tensor([2.0]), torch.zeros(1), torch.zeros(1), 0.5, entropy=1.0)) == 1.0


def test_bag_and_instance_losses() -> None:
    golden = GOLDEN["aggregate"]
    prediction_S, bag_S = torch.tensor(golden["pred"]), torch.zeros(3, dtype=torch.int64)
    response_K = torch.tensor([golden["bag_label"]])
    for rho, key in ((0.0, "bag"), (1.0, "instance"), (0.5, "interp_rho0.5")):
        assert float(bag_instance_loss(prediction_S, bag_S, response_K, rho)) == pytest.approx(golden[key], rel=1e-5)


def test_lagged_factors_inside_domains_keep_each_domains_part_and_lagged_temperatures_the_effective_size() -> None:
    these = samples([2.0, 2.2, 2.4, 5.0, 5.5, 7.0], domains=[0, 0, 0, 1, 1, 1])
    inside = weighting(within="domain", r=0.4)
    state = updated(WeightingState.none(2), inside, these, inside.inverse_temperature(0))
    weight_S = normalised(lagged_factors(inside, these, state, inside.inverse_temperature(0)), these)
    assert weight_S[:3].sum().item() == pytest.approx(0.5, abs=1e-6)
    many = samples(torch.linspace(2.0, 4.0, 64).tolist())
    sized = weighting(strategy="upper", target_ess=0.5)
    state = updated(WeightingState.none(1), sized, many, sized.inverse_temperature(0))
    weight_S = normalised(lagged_factors(sized, many, state, sized.inverse_temperature(0)), many)
    assert float(effective_samples(weight_S, many.tokens_S)) == pytest.approx(0.5, abs=0.01)


def test_a_tilted_sample_far_above_the_lagged_range_is_bounded() -> None:
    asked = weighting(strategy="tilted", r=0.1)
    state = updated(WeightingState.none(1), asked, samples([2.0, 3.0]), asked.inverse_temperature(0))
    factor_S = lagged_factors(asked, samples([3.0, 30.0]), state, asked.inverse_temperature(0))
    assert factor_S.tolist() == pytest.approx([1.0, math.exp(5)])
