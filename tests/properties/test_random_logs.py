"""Contracts 1 to 3 of the design on random histories: exact mixtures, every row once, caps, any ranks, any cut."""

from __future__ import annotations

import itertools
from collections import deque
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.entries import PROPORTION_TOTAL, Commit, PolicyEntry
from mixwright.data_mixing.errors import DomainExhausted, JournalError, PlanMismatch
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.plan import Plan, rank_positions
from tests.data_mixing.plan_cases import ordered
from tests.properties.effort import effort
from tests.properties.random_runs import NUM_STEPS, RandomLog, random_logs

MOST_ROWS_OFF = 16
"""Contract 1, for any number of domains up to 10,000."""


def last_step(plan: Plan) -> int:
    """The first step that the plan cannot fill, or the run's end."""
    return NUM_STEPS if plan.stop_step is None else min(plan.stop_step, NUM_STEPS)


def cap_in_force(log: RandomLog, step: int, index: int) -> Cap:
    """By brute force: of the newest commit in force, or the domain's own."""
    domain = log.genesis.domains[index]
    regimes: list[tuple[int, PolicyEntry]] = []
    for commit in log.history.commits:
        regimes = [regime for regime in regimes if regime[0] < commit.effective_step]
        regimes.append((commit.effective_step, commit.policy))
    policy = next(policy for start, policy in reversed(regimes) if start <= step)
    return policy.caps.get(domain.name, domain.cap)


@given(random_logs())
@effort(60)
def test_rows_follow_the_mixture_and_every_row_of_an_epoch_is_read_once(log: RandomLog) -> None:
    plan = log.history.plan()
    size = len(log.genesis.domains)
    cursors_G, requested_G = np.zeros(size, np.int64), np.zeros(size)
    read: dict[tuple[int, int], list[int]] = {}
    for step in range(last_step(plan)):
        share_G = plan.proportions(step)
        assert round(share_G.sum() * PROPORTION_TOTAL) == PROPORTION_TOTAL
        assert np.array_equal(plan.cursors(step), cursors_G)
        assert np.abs(cursors_G - requested_G).max() <= MOST_ROWS_OFF
        rows = plan.rows(step)
        drawn_G = np.bincount(rows.domain_n, minlength=size)
        assert drawn_G.sum() == log.genesis.rows_per_step
        assert not drawn_G[share_G == 0].any()
        cursors_G, requested_G = cursors_G + drawn_G, requested_G + share_G * log.genesis.rows_per_step
        for _, domain, epoch, row in ordered(rows):
            read.setdefault((domain, epoch), []).append(row)
        check_caps(log, step, drawn_G, cursors_G)
    for domain, cursor in enumerate(cursors_G.tolist()):
        check_epochs(read, domain, cursor, log.genesis.domains[domain].num_rows)


def check_caps(log: RandomLog, step: int, drawn_G: np.ndarray, cursors_G: np.ndarray) -> None:
    """No domain that is drawn in `step` has been read more than its cap allows after it."""
    for index in np.flatnonzero(drawn_G).tolist():
        cap = cap_in_force(log, step, index)
        if cap.max_epochs is not None and cap.on_exhaust != "allow":
            limit = Fraction(repr(cap.max_epochs)) * log.genesis.domains[index].num_rows
            assert cursors_G[index] <= limit, (step, index, cap)


def check_epochs(read: dict[tuple[int, int], list[int]], domain: int, cursor: int, num_rows: int) -> None:
    """`cursor` rows were read of the domain: whole epochs of every row, and the beginning of one, none twice."""
    whole, rest = divmod(cursor, num_rows)
    counts = {epoch: len(rows) for (index, epoch), rows in read.items() if index == domain}
    assert counts == {**dict.fromkeys(range(whole), num_rows), **({whole: rest} if rest else {})}
    for epoch in counts:
        rows = read[domain, epoch]
        assert len(set(rows)) == len(rows)
        assert 0 <= min(rows) <= max(rows) < num_rows


@given(random_logs(), st.data())
@effort(60)
def test_ranks_together_read_the_batch_whoever_asks_when(log: RandomLog, data: st.DataObject) -> None:
    plan, fresh = log.history.plan(), Plan(log.genesis, log.history.commits)
    end = last_step(plan)
    for step in data.draw(st.lists(st.integers(0, end - 1), max_size=6)) if end else []:
        world = data.draw(st.integers(1, 2 * log.genesis.rows_per_step))
        slices = [
            ordered(fresh.rows(step, rank_positions(log.genesis.rows_per_step, rank, world))) for rank in range(world)
        ]
        assert list(itertools.chain(*slices)) == ordered(plan.rows(step))
    if end < NUM_STEPS:
        with pytest.raises(DomainExhausted):
            fresh.rows(end)


@given(random_logs(), st.data())
@effort(60)
def test_a_log_that_is_cut_anywhere_is_the_prefix(log: RandomLog, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(log.entries)))
    prefix = RunHistory()
    for entry in log.entries[:cut]:
        prefix.apply(entry)
    assert prefix.state() == log.states[cut - 1]
    later = [entry.body.effective_step for entry in log.entries[cut:] if isinstance(entry.body, Commit)]
    if prefix.commits:
        before, whole = prefix.plan(), log.history.plan()
        for step in range(min([last_step(before), last_step(whole), *later])):
            assert before.digest(step) == whole.digest(step)
    # A snapshot of the prefix, and the entries after it, are the whole.
    resumed = RunHistory.from_state(type(prefix.state()).model_validate_json(prefix.state().model_dump_json()))
    for entry in log.entries[cut:]:
        resumed.apply(entry)
    assert resumed.state() == log.states[-1]
    assert resumed.plan().state_digest(0) == log.history.plan().state_digest(0)


@given(random_logs(), st.data())
@effort(30)
def test_entries_that_are_left_out_or_exchanged_do_not_pass_for_a_history(log: RandomLog, data: st.DataObject) -> None:
    kept = list(log.entries)
    if data.draw(st.booleans()):
        del kept[data.draw(st.integers(0, len(kept) - 2))]
    else:
        place = data.draw(st.integers(0, len(kept) - 2))
        kept[place], kept[place + 1] = kept[place + 1], kept[place]
    history = RunHistory()
    with pytest.raises(JournalError):
        deque(map(history.apply, kept))


@given(random_logs(), st.data())
@effort(30)
def test_a_commit_that_says_another_state_than_it_derives_is_found(log: RandomLog, data: st.DataObject) -> None:
    commits = [entry for entry in log.entries if isinstance(entry.body, Commit)]
    altered = data.draw(st.sampled_from(commits))
    history = RunHistory()
    for entry in log.entries[: altered.lsn]:
        history.apply(entry)
    body = altered.body.model_copy(update={"plan_digest": "0" * 64})
    history.apply(type(altered)(altered.lsn, altered.type, body, "x", 0.0, altered.prev, altered.hash))
    with pytest.raises(PlanMismatch, match="it would read other rows"):
        history.plan()
