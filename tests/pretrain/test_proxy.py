"""Proxy runs: they read what the plan says, decide where they say, are the same every time, and are run once."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from mixwright.data_mixing import policies
from mixwright.data_mixing.errors import ConfigError, DataError, DomainExhausted, PolicyRejected
from mixwright.data_mixing.online import OnlineDocument, Proposal, Stretch, Window
from mixwright.data_mixing.plan import Plan, RowRefs
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain import proxy as proxy_module
from mixwright.pretrain.errors import NonFiniteLoss, TrainingError
from mixwright.pretrain.proxy import ProxyRun, ProxyTrainer, genesis_of, run_key, train_proxy
from mixwright.pretrain.proxy_mixture import OnlineSteering, steering
from mixwright.pretrain.sweeps.perform import find_record, perform
from tests.pretrain.proxies import ALIKE, DOMAINS, proxy_run

AIOLI = {
    "kind": "aioli", "variant": "paper", "eta": 2.0, "sweeps": 1, "sweep_steps": 1, "round_steps": 5,
    "guard": {"max_l1_change": 2.0},
}  # fmt: skip


@pytest.fixture
def store(tiny_store: Path) -> TokenStore:
    torch.set_num_threads(1)
    return TokenStore.open(tiny_store)


def train(run: ProxyRun) -> Any:
    return train_proxy(run, TokenStore.open(run.store))


def test_two_runs_that_are_equal_give_equal_losses(store: TokenStore) -> None:
    one, other = (train(proxy_run(store.folder, policy=AIOLI, num_steps=8)) for _ in range(2))
    assert one.model_dump(exclude={"seconds"}) == other.model_dump(exclude={"seconds"})


def test_the_seed_changes_initial_parameters_and_the_order_of_rows(store: TokenStore) -> None:
    one, other = (proxy_run(store.folder, seed=seed) for seed in (0, 1))
    assert train(one).first != train(other).first
    rows = [steering(run.policy, genesis_of(run, store)).plan.rows(0).row_n.tolist() for run in (one, other)]
    assert rows[0] != rows[1]


def test_a_run_learns(store: TokenStore) -> None:
    record = train(proxy_run(store.folder, num_steps=30))
    assert all(record.last[name] < record.first[name] - 0.5 for name in DOMAINS)
    assert [point.step for point in record.validation] == [0, 30]


def test_rows_really_trained_on_are_those_of_the_plan(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[RowRefs] = []
    gather = ProxyTrainer.gather

    def watched(self: ProxyTrainer, refs: RowRefs) -> torch.Tensor:
        read.append(refs)
        return gather(self, refs)

    monkeypatch.setattr(ProxyTrainer, "gather", watched)
    run = proxy_run(store.folder, policy={"kind": "static", "mixture": {"letters": 3, "colours": 1}}, num_steps=10)
    record = train(run)
    counts = np.bincount(np.concatenate([refs.domain_n for refs in read]), minlength=3)
    assert dict(zip(DOMAINS, counts.tolist(), strict=True)) == record.rows
    assert record.rows["numbers"] == 0
    assert record.rows["letters"] == 45
    assert record.tokens == 60 * 16


def test_a_subset_of_domains_in_another_order_reads_those_domains(store: TokenStore) -> None:
    run = proxy_run(store.folder, domains=("colours", "letters"), policy={"kind": "static", "mixture": {"colours": 1}})
    genesis = genesis_of(run, store)
    trainer = ProxyTrainer(run, store, genesis)
    refs = steering(run.policy, genesis).plan.rows(0)
    expected = store.gather(np.full(6, store.index("colours")), refs.row_n)
    assert trainer.gather(refs).tolist() == expected.tolist()


def test_the_loss_gradient_is_that_of_the_mean_over_the_batch(store: TokenStore) -> None:
    run = proxy_run(store.folder)
    genesis = genesis_of(run, store)
    trainer = ProxyTrainer(run, store, genesis)
    refs = steering(run.policy, genesis).plan.rows(0)
    trainer.forward_backward(refs)
    found = [p.grad.clone() for p in trainer.model.parameters()]
    logits = trainer.model.causal_lm(input_ids=trainer.gather(refs)[:, :-1]).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, trainer.gather(refs)[:, 1:].flatten())
    expected = torch.autograd.grad(loss, list(trainer.model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_an_online_policy_changes_the_mixture_at_the_step_that_it_says(store: TokenStore) -> None:
    record = train(proxy_run(store.folder, policy=AIOLI, num_steps=12))
    # A sweep of three steps, one per domain, then rounds of five.
    assert [note.step for note in record.decisions] == [3, 8]
    assert [point.step for point in record.mixtures] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [point.is_perturbation for point in record.mixtures][:4] == [True, True, True, False]
    chosen = record.mixtures[3].shares
    assert chosen == pytest.approx(record.decisions[0].shares, abs=1e-8)
    assert max(chosen.values()) > 1 / 3 + 1e-6


class Toy(OnlineDocument):
    kind: Literal["toy"]


@pytest.fixture
def toy_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Window]:
    """An online kind that reads the first arm only after its first decision, and what it was shown."""
    windows: list[Window] = []
    keys: list[int] = []
    module: Any = types.ModuleType(f"{policies.__name__}.toy")
    (tmp_path / "toy.py").write_text("")
    module.__file__ = str(tmp_path / "toy.py")
    module.Document = Toy

    def stretches(document: Any, shares: Sequence[float], decision: int, key: int) -> tuple[Stretch, ...]:
        uniform = tuple([1 / len(shares)] * len(shares))
        keys.append(key)
        return (Stretch(num_steps=1, shares=uniform, evaluate=True), Stretch(num_steps=2, shares=tuple(shares)))

    def propose(document: Any, window: Window, state: Mapping[str, Any]) -> Proposal:
        windows.append(window)
        assert len(set(keys)) == len(keys) == window.decision + 1, "every round has a key of its own"
        count = state.get("count", 0) + 1
        return Proposal(shares=(1.0, *[0.0] * (len(window.arms) - 1)), state={"count": count})

    module.stretches, module.propose = stretches, propose
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    return windows


def test_a_decision_sees_what_happened_since_the_last_one(store: TokenStore, toy_windows: list[Window]) -> None:
    policy = {"kind": "toy", "guard": {"floor": 0.0, "max_l1_change": 2.0}}
    record = train(proxy_run(store.folder, policy=policy, num_steps=8))
    first, second = toy_windows
    assert (first.step, first.decision, second.step, second.decision) == (3, 0, 6, 1)
    assert [(i.first_step, i.last_step) for i in second.intervals] == [(3, 3), (4, 5)]
    assert second.shares == (1.0, 0.0, 0.0)
    assert second.intervals[1].rows == (12, 0, 0)
    assert second.intervals[1].train_tokens == (12 * 16, 0, 0)
    assert second.intervals[1].train_loss[1:] == (None, None)
    assert first.intervals[0].before == tuple(record.first.values())
    assert first.intervals[0].after == tuple(record.validation[1].loss.values())
    assert first.intervals[1].before == first.intervals[0].after
    assert first.intervals[1].after == (None, None, None)
    assert second.intervals[0].before == (None, None, None)
    assert first.intervals[0].learning_rate == pytest.approx(5e-3)
    assert record.rows["letters"] > 20
    assert [note.action for note in record.decisions] == ["propose", "propose"]


def test_realised_counts_follow_the_plan_of_all_commits(store: TokenStore, toy_windows: list[Window]) -> None:
    run = proxy_run(store.folder, policy={"kind": "toy", "guard": {"floor": 0.0, "max_l1_change": 2.0}}, num_steps=8)
    mixture = steering(run.policy, genesis_of(run, store))
    assert isinstance(mixture, OnlineSteering)
    sums = np.ones((3, 4))
    mixture.begin(sums)
    read = []
    for step in range(8):
        read.append(mixture.plan.rows(step))
        mixture.note_rate(0.1)
        stretch = mixture.mark_after(step)
        if stretch is not None:
            mixture.measure(step + 1, sums, sums if stretch.evaluate else None)
    again = Plan(genesis_of(run, store), mixture.plan.commits)
    for step, refs in enumerate(read):
        expected = again.rows(step)
        assert refs.domain_n.tolist() == expected.domain_n.tolist()
        assert refs.row_n.tolist() == expected.row_n.tolist()
    assert np.bincount(np.concatenate([r.domain_n for r in read]), minlength=3).tolist() == again.cursors(8).tolist()


def test_a_proxy_run_needs_neither_deepspeed_nor_ray() -> None:
    code = "import sys, mixwright.pretrain.sweeps.fits; print([m for m in ('deepspeed', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_finished_run_is_read_again_instead_of_run_again(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = proxy_run(store.folder)
    first = perform(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{first.key}.json"]
    monkeypatch.setattr("mixwright.pretrain.sweeps.perform.train_proxy", None)
    assert perform(run, tmp_path) == first


def test_the_key_knows_everything_that_changes_the_result(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = proxy_run(store.folder)
    keys = {run_key(run, "a"), run_key(run, "b")}
    other = {"kind": "temperature", "temperature": 9}
    changes = ({"seed": 1}, {"num_steps": 7}, {"domains": DOMAINS[::-1]}, {"policy": other})
    keys |= {run_key(proxy_run(store.folder, **change), "a") for change in changes}
    monkeypatch.setattr(proxy_module, "CODE_VERSION", 0)
    keys.add(run_key(run, "a"))
    assert len(keys) == 7
    assert run_key(run.model_copy(update={"store": tmp_path}), "a") == run_key(run, "a")


def test_the_key_knows_the_code_of_the_policy(store: TokenStore, toy_windows: list[Window], tmp_path: Path) -> None:
    run = proxy_run(store.folder, policy={"kind": "toy"})
    before = run_key(run, "a")
    (tmp_path / "toy.py").write_text("# a remark\n")
    assert run_key(run, "a") == before
    (tmp_path / "toy.py").write_text("ETA = 2\n")
    assert run_key(run, "a") != before


def test_a_failed_run_leaves_nothing_behind(store: TokenStore, tmp_path: Path) -> None:
    tree = proxy_run(store.folder).config.model_dump() | {"optimizer": {"lr": 1e30}}
    run = proxy_run(store.folder, config=tree)
    with pytest.raises(NonFiniteLoss, match=r"proxy run, step \d+: the gradient is .*lower optimizer\.lr"):
        perform(run, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("garbage", ["", "{", "[]", '{"key": 3}', json.dumps({"key": "x", "rows": {}})])
def test_a_damaged_record_is_one_clear_line(store: TokenStore, tmp_path: Path, garbage: str) -> None:
    run = proxy_run(store.folder)
    path = tmp_path / f"{run_key(run, store.fingerprint)}.json"
    path.write_text(garbage)
    with pytest.raises(ConfigError, match=path.name):
        find_record(run, tmp_path, store.fingerprint)


def test_bad_input_is_one_clear_line(store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no domain 'leters'; did you mean 'letters'"):
        train(proxy_run(store.folder, domains=("leters", "numbers")))
    with pytest.raises(PolicyRejected, match=r"mixture\.code"):
        train(proxy_run(store.folder, policy={"kind": "static", "mixture": {"code": 1}}))
    with pytest.raises(PolicyRejected, match="no policy of kind 'statik'"):
        train(proxy_run(store.folder, policy={"kind": "statik"}))
    with pytest.raises(DataError, match=str(tmp_path)):
        perform(proxy_run(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="distinct"):
        proxy_run(store.folder, domains=("letters", "letters"))
    caps = {"caps": {"colours": {"max_epochs": 0.01, "on_exhaust": "stop"}}}
    with pytest.raises(DomainExhausted):
        train(proxy_run(store.folder, policy={**ALIKE, **caps}, num_steps=40))
    wrong = proxy_run(store.folder).config.model_dump() | {"model": {"config": {"model_type": "lama"}}}
    with pytest.raises(TrainingError, match="did you mean 'llama'"):
        train(proxy_run(store.folder, config=wrong))


def test_a_weighting_in_the_policy_weighs_the_samples_and_damage_spoils_them(tiny_store: Path) -> None:
    store = TokenStore.open(tiny_store)
    plain = train_proxy(proxy_run(tiny_store), store)
    weighting = {
        **proxy_run(tiny_store).policy,
        "loss_weighting": {"scope": "step_two_phase", "strategy": "extremes", "r": 0.2},
    }
    weighted = train_proxy(proxy_run(tiny_store, policy=weighting), store)
    uniform = {**weighting, "loss_weighting": {"strategy": "extremes", "r": 1e6}}
    same = train_proxy(proxy_run(tiny_store, policy=uniform), store)
    spoilt = train_proxy(proxy_run(tiny_store, damage={"noised": 1.0}), store)
    assert plain.effective_sample_size is None
    assert weighted.effective_sample_size is not None
    assert weighted.effective_sample_size < 0.95
    assert same.test == pytest.approx(plain.test, rel=1e-4)
    assert all(abs(weighted.test[name] - plain.test[name]) > 1e-4 for name in plain.test)
    assert all(spoilt.test[name] > plain.test[name] for name in plain.test)
