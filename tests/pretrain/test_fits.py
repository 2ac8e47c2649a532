"""Fits ask for the right runs and end in the right document, on real runs and on records made by a known law."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mixwright.data_mixing.errors import ConfigError
from mixwright.data_mixing.policy import parse
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.proxy import LossPoint, ProxyRecord, ProxyRun, ProxyTrainer, genesis_of
from mixwright.pretrain.proxy_mixture import MixturePoint, steering
from mixwright.pretrain.sweeps.doge import DogeRun, train_doge
from mixwright.pretrain.sweeps.fits import Fitted, average_shares, begin_fit, drive
from mixwright.pretrain.sweeps.mixing_law import MixingLaw, best_mixture
from mixwright.pretrain.sweeps.perform import in_process
from tests.pretrain.proxies import DOMAINS, problem, proxy_run

LAW = MixingLaw(np.array([2.0, 1.5, 2.5]), np.array([[-2.0, -0.3, 0.1], [-0.1, -1.0, 0.0], [0.2, -0.2, -0.7]]))


def by_law(runs: Sequence[ProxyRun]) -> list[ProxyRecord]:
    """Records as if the law were the world."""
    return [made_up(run, dict(zip(DOMAINS, LAW.predict(shares_of(run)), strict=True))) for run in runs]


def shares_of(run: ProxyRun) -> list[float]:
    return [run.policy["mixture"][name] for name in DOMAINS]


def made_up(run: ProxyRun, losses: dict[str, float]) -> ProxyRecord:
    start = LossPoint(step=0, loss=dict.fromkeys(losses, 4.0))
    return ProxyRecord(
        key="", run=run, num_parameters=1, tokens=10, seconds=0.0, test=losses, mixtures=(), decisions=(), rows={},
        validation=(start, LossPoint(step=4, loss=losses)),
    )  # fmt: skip


def fit(kind: str, **options: object) -> Fitted:
    (fitted,) = drive([begin_fit(kind, problem(Path("store")), dict(options))], by_law)
    parse(fitted.document)
    return fitted


def test_the_mixing_law_fit_ends_near_the_optimum_of_the_law_that_made_its_losses() -> None:
    fitted = fit("mixing_law", floor=0.0)
    assert len(fitted.records) == 8
    found = [fitted.document["mixture"][name] for name in DOMAINS]
    np.testing.assert_allclose(found, best_mixture(LAW, np.ones(3) / 3), atol=0.01)
    assert fitted.figures["leave-one-out error, nats (rms)"] < 1e-3


def test_the_regmix_fit_ends_near_the_optimum_of_the_law_that_made_its_losses() -> None:
    fitted = fit("regmix", num_runs=64, num_simulated=20_000, num_best=32)
    found = np.array([fitted.document["mixture"][name] for name in DOMAINS])
    losses = [LAW.predict(p).mean() for p in (np.ones(3) / 3, found, best_mixture(LAW, np.ones(3) / 3))]
    assert losses[0] - losses[1] > 0.7 * (losses[0] - losses[2])
    assert fitted.figures["leave-one-out rank correlation"] > 0.95


def test_row_i_of_the_skill_graph_is_the_run_that_reads_domain_i_only() -> None:
    graph = fit("skill_it").document["graph"]
    for trained, one_hot in zip(DOMAINS, np.eye(3), strict=True):
        for seen, loss in zip(DOMAINS, LAW.predict(one_hot), strict=True):
            assert graph[trained][seen] == pytest.approx((4.0 - loss) / 4.0)


def test_on_real_runs_a_domain_helps_itself_most(tiny_store: Path, tmp_path: Path) -> None:
    begun = begin_fit("skill_it", problem(tiny_store, num_steps=25), {"policy": {"eta": 0.3}})
    (fitted,) = drive([begun], in_process(tmp_path))
    graph = fitted.document["graph"]
    for name in DOMAINS:
        assert max(DOMAINS, key=lambda trained: graph[trained][name]) == name
    assert fitted.document["eta"] == 0.3
    assert fitted.records[0].rows == {"letters": 150, "numbers": 0, "colours": 0}


def test_doremi_runs_a_reference_then_a_proxy_and_averages_its_mixtures(tiny_store: Path, tmp_path: Path) -> None:
    options = {"policy": {"round_steps": 1, "mu": 5.0}}
    (fitted,) = drive([begin_fit("doremi", problem(tiny_store, num_steps=6), options)], in_process(tmp_path))
    reference, proxy = fitted.records
    assert reference.run.policy["kind"] == "static"
    assert proxy.run.policy["reference"] == reference.last
    assert proxy.run.seed != reference.run.seed
    total = np.zeros(3)
    for step in range(6):
        share = [p for p in proxy.mixtures if p.step <= step][-1].shares
        total += [share[name] for name in DOMAINS]
    assert [fitted.document["mixture"][name] for name in DOMAINS] == pytest.approx((total / 6).tolist())
    assert max(fitted.document["mixture"].values()) > 1 / 3 + 1e-6


def test_average_shares_weigh_mixtures_by_their_steps(tiny_store: Path) -> None:
    points = (
        MixturePoint(step=0, shares=dict(zip(DOMAINS, (1.0, 0.0, 0.0), strict=True))),
        MixturePoint(step=1, shares=dict(zip(DOMAINS, (0.0, 0.5, 0.5), strict=True))),
    )
    run = proxy_run(tiny_store, num_steps=4)
    record = made_up(run, dict.fromkeys(DOMAINS, 1.0)).model_copy(update={"mixtures": points})
    assert average_shares(record) == pytest.approx([0.25, 0.375, 0.375])


def test_doge_is_what_autograd_says_step_by_step(tiny_store: Path) -> None:
    torch.set_num_threads(1)
    store = TokenStore.open(tiny_store)
    run = DogeRun(**dict(proxy_run(tiny_store, num_steps=3)), mu=0.05, validation_batch=2)
    record = train_doge(run, store)

    genesis = genesis_of(run, store)
    trainer, plan = ProxyTrainer(run, store, genesis), steering(run.policy, genesis).plan
    parameters = list(trainer.model.parameters())

    def flat(tokens_BS: torch.Tensor) -> torch.Tensor:
        logits = trainer.model.causal_lm(input_ids=tokens_BS[:, :-1]).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens_BS[:, 1:].flatten())
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        return gradient / max(1.0, float(gradient.norm()))

    log_weight, total = np.zeros(3), np.zeros(3)
    for step in range(3):
        refs, tokens_BS = plan.rows(step), trainer.gather(plan.rows(step))
        target = flat(tokens_BS[4:])
        grads = [
            flat(tokens_BS[:4][refs.domain_n[:4] == g]) if (refs.domain_n[:4] == g).any() else 0 * target
            for g in range(3)
        ]
        rate = [0.005, 0.01][step] if step < 2 else 0.001
        mean_norm = np.mean([float(g.norm()) for g in grads]) + 1e-6
        log_weight += [min(max(rate * float(g @ target) / mean_norm, 0), 5 * rate) / 0.05 for g in grads]
        weight = np.exp(log_weight) / np.exp(log_weight).sum()
        total += weight
        combined = sum(w * g for w, g in zip(weight, grads, strict=True))
        for parameter, part in zip(parameters, combined.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.reshape(parameter.shape)
        assert trainer.update(step) == pytest.approx(rate)
    expected = dict(zip(DOMAINS, (total / 3).tolist(), strict=True))
    assert record.average_weights == pytest.approx(expected, rel=1e-3)


def test_the_doge_fit_is_reused(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = lambda: begin_fit("doge", problem(tiny_store), {"mu": 0.05})  # noqa: E731
    (first,) = drive([begin()], in_process(tmp_path))
    monkeypatch.setattr("mixwright.pretrain.sweeps.perform.train_doge", None)
    (second,) = drive([begin()], in_process(tmp_path))
    assert first.document == second.document
    assert sum(first.document["mixture"].values()) == pytest.approx(1)


def test_fits_that_ask_together_are_performed_together() -> None:
    asked: list[int] = []

    def counted(runs: Sequence[ProxyRun]) -> list[ProxyRecord]:
        asked.append(len(runs))
        return by_law(runs)

    kinds = ("skill_it", "mixing_law")
    fitted = drive([begin_fit(kind, problem(Path("store")), {}) for kind in kinds], counted)
    assert asked[0] == 3 + 8
    assert [f.document["kind"] for f in fitted] == ["skill_it", "static"]


def test_bad_input_of_a_fit_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="no fit of kind 'regmx'; did you mean 'regmix'"):
        begin_fit("regmx", problem(Path("s")), {})
    with pytest.raises(ConfigError, match="skill_it: found one domain, 'letters'; there is nothing to mix"):
        begin_fit("skill_it", problem(Path("s"), ("letters",)), {})
    with pytest.raises(ConfigError, match="options of mixing_law: num_run: unknown key; did you mean 'num_runs'"):
        begin_fit("mixing_law", problem(Path("s")), {"num_run": 3})
    with pytest.raises(ConfigError, match="num_runs: 4 runs cannot check a law of 3 domains; at least 5"):
        drive([begin_fit("mixing_law", problem(Path("s")), {"num_runs": 4})], by_law)
