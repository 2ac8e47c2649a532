"""Losses of ensembles over subsets of members, beside brute force in float64; temperatures; errors paired over rows."""

from __future__ import annotations

import itertools
import math
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixwright.data_mixing.held_out import HeldOut
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.ensemble import spool as spool_module
from mixwright.pretrain.ensemble.curve import (
    EnsembleEvaluation,
    _genesis,
    choose_subsets,
    evaluate_ensemble,
    fit_temperature,
    load_evaluation,
    paired,
    save_evaluation,
)
from mixwright.pretrain.ensemble.member import Member, load_member
from mixwright.pretrain.ensemble.pooling import pool
from mixwright.pretrain.ensemble.spool import spool
from mixwright.pretrain.errors import EnsembleError

ROWS = 20


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> TokenStore:
    return TokenStore.open(tiny_store)


@pytest.fixture(scope="module")
def evaluation(
    members: list[Member], store: TokenStore, tmp_path_factory: pytest.TempPathFactory
) -> EnsembleEvaluation:
    return evaluate(members, store, tmp_path_factory.mktemp("spool"))


def evaluate(members: list[Member], store: TokenStore, folder: Path, **changes: Any) -> EnsembleEvaluation:
    options: dict[str, Any] = {"rows_per_domain": ROWS, "calibration_rows_per_domain": ROWS, **changes}
    return evaluate_ensemble(members, store, folder=folder, **options)


def brute_force(members: list[Member], store: TokenStore, split: str, pooling: str, temperature: float) -> np.ndarray:
    """Loss of every row from all logits at once, in float64."""
    rows = HeldOut.read(store, _genesis(members[0], store, ()), split, ROWS)
    tokens_BS = torch.from_numpy(rows.tokens_nS)
    with torch.no_grad():
        logits = torch.stack([load_member(m).causal_lm(input_ids=tokens_BS[:, :-1]).logits.double() for m in members])
    log_p = (
        torch.log_softmax(logits.mean(0) / temperature, -1)
        if pooling == "logits"
        else torch.log_softmax(torch.softmax(logits, -1).mean(0).log() / temperature, -1)
    )
    nll_BT = -log_p.gather(2, tokens_BS[:, 1:, None])[..., 0]
    found: np.ndarray = nll_BT.mean(1).numpy()
    return found


@pytest.mark.parametrize("pooling", ["logits", "arithmetic"])
def test_losses_of_every_subset_are_those_of_all_logits_at_once(
    members: list[Member], store: TokenStore, tmp_path: Path, pooling: str
) -> None:
    found = evaluate(members, store, tmp_path, pooling=pooling)
    assert found.subsets == ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))
    for number, subset in enumerate(found.subsets):
        chosen = [members[one] for one in subset]
        temperature = float(found.temperature_S[number])
        np.testing.assert_allclose(found.plain_SR[number], brute_force(chosen, store, "test", pooling, 1.0), atol=2e-5)
        expected_R = brute_force(chosen, store, "test", pooling, temperature)
        np.testing.assert_allclose(found.fitted_SR[number], expected_R, atol=2e-5)


@pytest.mark.parametrize("pooling", ["logits", "arithmetic"])
def test_the_temperature_is_the_best_one_on_the_calibration_split(
    members: list[Member], store: TokenStore, tmp_path: Path, pooling: Any
) -> None:
    found = fit_temperature(members, store, pooling=pooling, rows_per_domain=ROWS, folder=tmp_path)
    around = [found * factor for factor in (0.97, 0.99, 1.0, 1.01, 1.03)]
    losses = [float(brute_force(members, store, "validation", pooling, t).mean()) for t in around]
    assert losses.index(min(losses)) == 2
    evaluation = evaluate(members, store, tmp_path, pooling=pooling)
    assert evaluation.temperature_S[-1] == pytest.approx(found, rel=1e-3)


def test_mean_logits_never_lose_more_than_the_mean_member_on_any_token(
    members: list[Member], evaluation: EnsembleEvaluation
) -> None:
    """T17: log-sum-exp is convex, so it holds on every row, not in the mean alone."""
    for number, subset in enumerate(evaluation.subsets):
        mean_R = evaluation.plain_SR[list(subset)].mean(axis=0)
        assert (evaluation.plain_SR[number] <= mean_R + 1e-6).all()
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 30.0):
        logits = [scale * torch.randn(200, 40, generator=generator, dtype=torch.float64) for _ in range(4)]
        labels = torch.randint(0, 40, (200,), generator=generator)
        together = torch.nn.functional.cross_entropy(pool(logits, "logits"), labels, reduction="none")
        alone = torch.stack([torch.nn.functional.cross_entropy(one, labels, reduction="none") for one in logits])
        assert bool((together <= alone.mean(0) + 1e-9).all())


@pytest.mark.parametrize(("pooling", "loss"), [("logits", 0.3137808633372582), ("arithmetic", 0.3439761111839984)])
def test_golden_pooled_losses(pooling: Any, loss: float) -> None:
    """Two members, three classes (spec/golden_vectors.json, ensemble)."""
    logits = [torch.tensor(z, dtype=torch.float64) for z in ([2.0, 0.0, -1.0], [1.0, 0.5, -1.0])]
    assert float(-torch.log_softmax(pool(logits, pooling), 0)[0]) == pytest.approx(loss, abs=1e-12)


def test_points_of_the_curve_are_means_over_subsets_with_errors_paired_over_rows(
    evaluation: EnsembleEvaluation,
) -> None:
    points = evaluation.curve(fitted=False)
    assert [point.k for point in points] == [1, 2, 3]
    assert [point.num_subsets for point in points] == [3, 3, 1]
    pairs_R = evaluation.plain_SR[3:6].mean(axis=0)
    singles_R = evaluation.plain_SR[:3].mean(axis=0)
    assert points[1].loss == pytest.approx(pairs_R.mean())
    assert points[1].gain == pytest.approx((singles_R - pairs_R).mean())
    expected = (singles_R - pairs_R).std(ddof=1) / math.sqrt(len(pairs_R))
    assert points[1].gain_error == pytest.approx(expected)
    assert points[2].step == pytest.approx(points[1].loss - points[2].loss)
    assert points[1].gain_error < points[1].error
    assert paired(singles_R, singles_R) == (0.0, 0.0)


def test_a_domain_of_its_own_has_a_curve_of_its_own(evaluation: EnsembleEvaluation) -> None:
    whole = evaluation.curve(fitted=True)[-1].loss
    parts = [evaluation.curve(fitted=True, domain=name)[-1].loss for name in evaluation.domains]
    counts = np.bincount(evaluation.domain_R)
    assert whole == pytest.approx(np.average(parts, weights=counts))
    assert len(set(parts)) == 3


def test_what_was_spooled_is_found_again_and_a_new_member_is_run_alone(
    members: list[Member], store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(member: Member) -> Any:
        loaded.append(member.name)
        return load_member(member)

    monkeypatch.setattr(spool_module, "load_member", load)
    first = evaluate(members[:2], store, tmp_path)
    assert loaded == ["member-0", "member-1"] * 2  # validation rows, then test rows
    loaded.clear()
    again = evaluate(members, store, tmp_path)
    assert loaded == ["member-2"] * 2
    np.testing.assert_array_equal(again.plain_SR[:2], first.plain_SR[:2])


def test_an_interrupted_spool_is_begun_again(members: list[Member], store: TokenStore, tmp_path: Path) -> None:
    rows_nS = HeldOut.read(store, _genesis(members[0], store, ()), "test", 4).tokens_nS
    whole = spool(members[:1], rows_nS, tmp_path)[0]
    (next(tmp_path.iterdir()) / "head.json").unlink()
    features = next(tmp_path.iterdir()) / "features.npy"
    features.unlink()  # what is mapped lives on
    features.write_bytes(b"half")
    again = spool(members[:1], rows_nS, tmp_path)[0]
    np.testing.assert_array_equal(again.features_ND, whole.features_ND)


def test_memory_does_not_grow_with_the_number_of_members(
    members: list[Member], store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of a block of tokens shrink with K; torch's own memory is not traced, so blocks are counted instead."""
    monkeypatch.setattr(spool_module, "BLOCK_BYTES", 1 << 16)
    for num_members in (1, 4, 16):
        blocks = list(spool_module.spans(1000, 300, num_members))
        assert blocks[0].start == 0
        assert blocks[-1].stop == 1000
        assert [b.start for b in blocks[1:]] == [b.stop for b in blocks[:-1]]
        largest = max(b.stop - b.start for b in blocks)
        assert 4 * 300 * largest * num_members <= (1 << 16) or largest == 16
    many = [replace(members[0], name=str(i)) for i in range(8)]
    rows_nS = HeldOut.read(store, _genesis(members[0], store, ()), "test", 4).tokens_nS
    spool(many, rows_nS, tmp_path)
    tracemalloc.start()
    spool(many, rows_nS, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_subsets_are_all_of_them_or_distinct_ones_drawn_with_the_seed() -> None:
    every = choose_subsets(5, 64, seed=0)
    assert every == [s for k in range(1, 6) for s in itertools.combinations(range(5), k)]
    drawn = choose_subsets(10, 12, seed=3)
    by_size = {k: [s for s in drawn if len(s) == k] for k in range(1, 11)}
    assert [len(by_size[k]) for k in range(1, 11)] == [10, 12, 12, 12, 12, 12, 12, 12, 10, 1]
    assert all(len(set(subsets)) == len(subsets) for subsets in by_size.values())
    assert drawn == choose_subsets(10, 12, seed=3)
    assert drawn != choose_subsets(10, 12, seed=4)


def test_an_evaluation_is_read_back_as_it_was_written(evaluation: EnsembleEvaluation, tmp_path: Path) -> None:
    save_evaluation(evaluation, tmp_path)
    again = load_evaluation(tmp_path)
    assert again.curve(fitted=True)[1:] == evaluation.curve(fitted=True)[1:]
    assert again.subsets == evaluation.subsets
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()
    (tmp_path / "evaluation.npz").write_bytes(b"no")
    with pytest.raises(EnsembleError, match="no evaluation of an ensemble"):
        load_evaluation(tmp_path)


def test_what_cannot_be_scored_is_refused(members: list[Member], store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(EnsembleError, match=r"no domain 'colour'; did you mean 'colours'"):
        evaluate(members, store, tmp_path, domains=["colour"])
    other = [replace(member, tokenizer_hash="f" * 64) for member in members]
    with pytest.raises(EnsembleError, match="trained with another tokenizer than the one of"):
        evaluate(other, store, tmp_path)
    folder = tmp_path / "gone"
    shutil.copytree(members[0].folder, folder)
    gone = replace(members[0], folder=folder, fingerprint="0" * 64)
    (folder / "model.safetensors").unlink()
    with pytest.raises(EnsembleError, match=r"gone: cannot be loaded"):
        evaluate([gone], store, tmp_path / "spool")
