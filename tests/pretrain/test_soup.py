"""Soups: branches of one checkpoint may be averaged, models of different seeds may not; T18."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.ensemble.curve import validation_loss
from mixwright.pretrain.ensemble.member import Member, inspect_member, load_member
from mixwright.pretrain.ensemble.soup import check_soup, greedy_soup, uniform_soup, write_soup
from mixwright.pretrain.errors import EnsembleError
from mixwright.pretrain.head import LanguageModel
from tests.pretrain.members import write_member


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> TokenStore:
    return TokenStore.open(tiny_store)


@pytest.fixture(scope="module")
def branches(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    """Members of one beginning that read rows in different orders."""
    folder = tmp_path_factory.mktemp("branches")
    return [write_member(folder / f"branch-{seed}", store, seed, init_seed=7, num_steps=4) for seed in range(3)]


def test_branches_are_averaged_and_seeds_are_refused_with_the_reason(
    branches: list[Member], members: list[Member]
) -> None:
    check_soup(branches)
    with pytest.raises(EnsembleError, match=r"began from different parameters .* predicts next to nothing; average"):
        check_soup(members)
    unknown = [replace(member, origin=None) for member in branches]
    with pytest.raises(EnsembleError, match=r"does not say .* If they are, say --assume-one-origin"):
        check_soup(unknown)
    check_soup(unknown, assume_one_origin=True)
    with pytest.raises(EnsembleError, match="different architectures: their parameters have no mean"):
        check_soup([branches[0], replace(branches[1], architecture="other")], assume_one_origin=True)


def test_a_greedy_soup_is_no_worse_than_its_best_single(branches: list[Member], store: TokenStore) -> None:
    score = validation_loss(branches[0], store, 16)
    soup = greedy_soup(branches, score)
    assert soup.loss <= soup.singles[0][1]
    assert soup.taken[0] == soup.singles[0][0]
    assert [loss for _, loss in soup.singles] == sorted(loss for _, loss in soup.singles)


def test_a_soup_of_different_seeds_predicts_next_to_nothing(store: TokenStore, tmp_path: Path) -> None:
    members = [write_member(tmp_path / f"seed-{seed}", store, seed, num_steps=100) for seed in range(3)]
    score = validation_loss(members[0], store, 16)
    soup = uniform_soup(members, score)
    assert soup.loss > soup.singles[-1][1] + 0.5
    assert greedy_soup(members, score).taken == (soup.singles[0][0],)


def test_the_uniform_soup_is_the_mean_of_parameters(branches: list[Member], store: TokenStore) -> None:
    soup = uniform_soup(branches, lambda model: 0.0)
    states = [load_member(member).causal_lm.state_dict() for member in branches]
    for name, value in soup.parameters.items():
        expected = torch.stack([state[name].double() for state in states]).mean(0)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_ties_keep_the_earlier_and_one_member_is_its_own_soup(branches: list[Member]) -> None:
    assert greedy_soup(branches, lambda model: 1.0).taken == (branches[0].name,)
    alone = uniform_soup(branches[1:2], lambda model: 2.0)
    state = load_member(branches[1]).causal_lm.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in alone.parameters.items())


def test_a_worse_candidate_leaves_the_soup_as_it_was(branches: list[Member]) -> None:
    losses = iter([1.0, 2.0, 3.0, 5.0, 0.5])  # three singles, then with the second, then with the third

    def score(model: LanguageModel) -> float:
        return next(losses)

    soup = greedy_soup(branches, score)
    assert soup.taken == (branches[0].name, branches[2].name)
    states = [load_member(branches[one]).causal_lm.state_dict() for one in (0, 2)]
    name = "model.norm.weight"
    torch.testing.assert_close(soup.parameters[name], (states[0][name] + states[1][name]) / 2)


def test_a_soup_is_written_as_a_model_that_scores_the_same(
    branches: list[Member], store: TokenStore, tmp_path: Path
) -> None:
    score = validation_loss(branches[0], store, 8)
    soup = uniform_soup(branches, score)
    write_soup(soup, branches[0], tmp_path / "soup")
    written = inspect_member(tmp_path / "soup")
    assert score(load_member(written)) == pytest.approx(soup.loss, rel=1e-6)
    assert written.tokenizer_hash == branches[0].tokenizer_hash
    with pytest.raises(EnsembleError, match="exists already"):
        write_soup(soup, branches[0], tmp_path / "soup")
