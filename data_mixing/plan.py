"""The plan of a run: which row stands at which position of which step. A pure function of (genesis, commits, step).

    counts      apportion.py: rows of each domain before a step and after it, in closed form from the segment's start
    position    -> slot by a permutation keyed by (seed, step); slots are filled domain by domain in order of domain id
    draw        number of a row within its domain = cursor before the step + slot - the domain's first slot
    row         epoch = draw // num_rows; row = permutation keyed by (seed, domain id, epoch) of draw % num_rows

No step depends on ranks, micro-batches or workers, and none needs the ones before it: random access costs
O(domains + rows). Domains are kept in order of their id, so that a re-ordered catalogue reads the same rows.
Repetition caps are part of the function: the first step that would exceed one is found by bisection (`timeline.py`).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.entries import PROPORTION_TOTAL, Genesis, Mark
from mixwright.data_mixing.errors import DomainExhausted
from mixwright.data_mixing.loss_weighting import LossWeighting
from mixwright.data_mixing.permutation import fold_key, mix_key, permute, splitmix64, unpermute
from mixwright.data_mixing.timeline import Catalogue, CommittedPolicy, Exhaustion, PlanState, Stretch, Timeline

__all__ = ["CommittedPolicy", "Exhaustion", "Plan", "PlanState", "RowRefs", "chain_digest", "rank_positions",
           "rows_digest", "run_digest"]  # fmt: skip

_SLOTS, _ROWS, _DIGEST, _CHAIN = range(1, 5)
"""First part of every key, so that no two uses of the seed share a key."""

_RECENT_CURSORS = 4
"""A step needs the cursors before and after it; the latter are the next step's first."""

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class RowRefs:
    """Rows of a step, int64 [n] each: position in the batch, index in genesis.domains, epoch, row of the domain."""

    position_n: Int64s
    domain_n: Int64s
    epoch_n: Int64s
    row_n: Int64s


class Plan:
    """`rows(step)` for a run with these commits; later commits in the sequence supersede earlier ones.

    `known` are states that an earlier process derived (`state`); they only save time. Safe to use from threads.
    Raises ValueError when a policy does not fit the catalogue.
    """

    def __init__(self, genesis: Genesis, commits: Sequence[CommittedPolicy], known: Sequence[PlanState] = ()) -> None:
        catalogue = Catalogue(genesis)
        self._set_up(catalogue, Timeline(catalogue, tuple(commits), tuple(known)))

    def _set_up(self, catalogue: Catalogue, timeline: Timeline) -> None:
        self.genesis, self._catalogue, self._timeline = catalogue.genesis, catalogue, timeline
        self._lock = threading.RLock()
        self._recent_cursors: dict[int, Int64s] = {}
        seed_key = np.array([mix_key(_ROWS, self.genesis.seed)], dtype=np.uint64)
        self._row_key_G = fold_key(seed_key, catalogue.id_G)
        self._id_in_catalogue_G = catalogue.in_catalogue_order(catalogue.id_G)

    def extended(self, commit: CommittedPolicy) -> Plan:
        """This plan with one more commit; what is derived up to its effective step is shared, not derived again."""
        plan = Plan.__new__(Plan)
        with self._lock:
            plan._set_up(self._catalogue, self._timeline.extended(commit))
        return plan

    def __reduce__(self) -> tuple[type[Plan], tuple[Genesis, tuple[CommittedPolicy, ...]]]:
        return Plan, (self.genesis, self._timeline.commits)

    def rows(self, step: int, positions: range | None = None) -> RowRefs:
        """Rows of `step` at `positions` (default: all), in order of position.

        Raises DomainExhausted when the plan ends before, MixingError when no policy is in force.
        """
        positions = range(self.genesis.rows_per_step) if positions is None else positions
        position_n = np.arange(positions.start, positions.stop, positions.step, dtype=np.int64)
        before_G, after_G = self._step_cursors(step)
        drawn_G = after_G - before_G
        end_slot_G = np.cumsum(drawn_G)
        slot_n = permute(position_n, self.genesis.rows_per_step, mix_key(_SLOTS, self.genesis.seed, step))
        domain_n = np.searchsorted(end_slot_G, slot_n, side="right")
        draw_n = (before_G - end_slot_G + drawn_G)[domain_n] + slot_n
        num_rows_n = self._catalogue.num_rows_G[domain_n]
        epoch_n = draw_n // num_rows_n
        key_n = fold_key(self._row_key_G[domain_n], epoch_n.astype(np.uint64))
        row_n = permute(draw_n % num_rows_n, num_rows_n, key_n)
        return RowRefs(position_n, self._catalogue.index_G[domain_n], epoch_n, row_n)

    def cursors(self, step: int) -> Int64s:
        """Rows drawn from each domain [G] before `step`; after the plan's end they no longer grow."""
        with self._lock:
            return self._catalogue.in_catalogue_order(self._cursors(self._timeline.at(step), step))

    def draw_of(self, domain: int, row: int, epoch: int) -> int:
        """The draw (counted from 0 over the whole run) that reads `row` in `epoch` of the domain at this index."""
        place = int(np.flatnonzero(self._catalogue.index_G == domain)[0])
        key = fold_key(self._row_key_G[place : place + 1], np.array([epoch], dtype=np.uint64))
        num_rows = self.genesis.domains[domain].num_rows
        return epoch * num_rows + unpermute(row, num_rows, int(key[0]))

    def proportions(self, step: int) -> NDArray[np.float64]:
        """The mixture [G] that holds at `step`, sum 1, after caps; zeros once the plan has ended."""
        with self._lock:
            stretch = self._timeline.at(step)
            if stretch.apportionment is None:
                return np.zeros(len(self.genesis.domains))
            share_G = self._catalogue.in_catalogue_order(stretch.apportionment.proportions)
            return share_G / PROPORTION_TOTAL

    def policy_lsn(self, step: int) -> int:
        """Journal entry of the POLICY in force at `step`."""
        return self._timeline.regime_at(step).commit.lsn

    def policy_step(self, step: int) -> int:
        """The step from which the policy in force at `step` has been in force."""
        return self._timeline.regime_at(step).start_step

    def weighting(self, step: int) -> tuple[int, LossWeighting] | None:
        """The instance weighting in force at `step` and the step at which it began; None when none was ever asked for.

        A policy without `loss_weighting` leaves the one before in force; `strategy: uniform` ends it.
        """
        regime = self._timeline.weighting_regime_at(step)
        if regime is None or regime.commit.policy.loss_weighting is None:
            return None
        return regime.start_step, regime.commit.policy.loss_weighting

    def mark(self, step: int) -> tuple[int, Mark] | None:
        """The mark at the boundary before `step`, in training steps, and the POLICY entry that set it; or None."""
        found = [regime.mark(step) for regime in self._timeline.regimes_around(step)]
        marks = [(lsn, mark) for lsn, mark in found if mark is not None]
        if not marks:
            return None
        evaluate = any(mark.evaluate for _, mark in marks)
        return marks[0][0], marks[0][1].model_copy(update={"step": step, "evaluate": evaluate})

    def is_waiting(self, step: int, passes: Collection[tuple[int, int]] = ()) -> bool:
        """Whether the rows of `step` depend on a decision that is still to come, for which ranks wait.

        `passes` are (POLICY entry, step) of decisions that nobody waits for any more.
        """
        found = self.mark(step)
        if found is None or found[1].decide != "sync":
            return False
        lsn = found[0]
        return lsn == self.commits[-1].lsn and (lsn, step) not in passes

    @property
    def commits(self) -> tuple[CommittedPolicy, ...]:
        """The commits that this plan knows, in journal order."""
        return self._timeline.commits

    @property
    def stop_step(self) -> int | None:
        """First step of the run that the plan cannot fill; None when it reaches genesis.num_steps."""
        ends = [event.step for event in self.exhaustion() if event.action == "stop"]
        return ends[0] if ends else None

    def exhaustion(self, before_step: int | None = None, from_step: int = 0) -> tuple[Exhaustion, ...]:
        """Every domain that reaches its cap before `before_step` (default: genesis.num_steps), in order of step.

        With `from_step`, only those of the stretch of steps that covers it and of later ones.
        """
        before_step = self.genesis.num_steps if before_step is None else before_step
        with self._lock:
            return tuple(self._timeline.exhaustions(before_step, from_step))

    def digest(self, step: int) -> int:
        """64-bit digest of the ordered global batch of `step`."""
        refs = self.rows(step)
        return _digest(step, self._id_in_catalogue_G[refs.domain_n], refs)

    def state(self, step: int) -> PlanState:
        """Everything that the plan at `step` and later depends on, apart from commits: cursors and credits."""
        with self._lock:
            return self._timeline.state_at(step)

    def state_digest(self, step: int) -> str:
        """SHA-256 of `state(step)` by domain id; equal before and after a commit with this effective step is added."""
        state = self.state(step)
        head = f"plan {self.genesis.plan_version} seed {self.genesis.seed} step {step} domains {len(state.cursor_G)};"
        words = [array.astype("<i8").tobytes() for array in (state.cursor_G, state.credit_G)]
        ids = self._catalogue.id_G.astype("<u8").tobytes()
        return hashlib.sha256(head.encode() + ids + b"".join(words)).hexdigest()

    def _step_cursors(self, step: int) -> tuple[Int64s, Int64s]:
        """Cursors [G], in order of domain id, before `step` and after it."""
        with self._lock:
            stretch = self._timeline.at(step)
            if stretch.ended_by is not None:
                raise DomainExhausted(stretch.ended_by.domain, stretch.start.step, stretch.ended_by.max_epochs)
            return self._cursors(stretch, step), self._cursors(stretch, step + 1)

    def _cursors(self, stretch: Stretch, step: int) -> Int64s:
        """Cursors before `step`, which lies in `stretch` or right behind it; the next stretch says the same there."""
        cursor_G = self._recent_cursors.get(step)
        if cursor_G is None:
            cursor_G = stretch.cursors(step)
            self._recent_cursors[step] = cursor_G
            if len(self._recent_cursors) > _RECENT_CURSORS:
                del self._recent_cursors[next(iter(self._recent_cursors))]
        return cursor_G


def rank_positions(rows_per_step: int, rank: int, world: int) -> range:
    """Positions of the batch that data-parallel `rank` of `world` trains on; ranks in order make up the batch."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is outside range({world})")
    return range(rows_per_step * rank // world, rows_per_step * (rank + 1) // world)


def rows_digest(genesis: Genesis, step: int, refs: RowRefs) -> int:
    """Sum mod 2**64, over rows, of a hash of (step, position, domain id, epoch, row).

    Additive: the digests of the ranks' slices add up to the digest of the batch. Sensitive to order by the position.
    """
    drawn_D, which_n = np.unique(refs.domain_n, return_inverse=True)
    id_D = np.array([genesis.domains[index].id for index in drawn_D], dtype=np.uint64)
    return _digest(step, id_D[which_n], refs)


def _digest(step: int, id_n: NDArray[np.uint64], refs: RowRefs) -> int:
    hash_n = np.full(len(id_n), mix_key(_DIGEST, step), dtype=np.uint64)
    for part_n in (refs.position_n, id_n, refs.epoch_n, refs.row_n):
        hash_n = fold_key(hash_n, part_n.astype(np.uint64))
    return int(splitmix64(hash_n).sum(dtype=np.uint64))


def chain_digest(previous: int, step_digest: int) -> int:
    """Run digest after one more step; the run digest of no steps is 0. Sensitive to the order of steps."""
    return mix_key(_CHAIN, previous, step_digest)


def run_digest(plan: Plan, num_steps: int, first_step: int = 0, previous: int = 0) -> int:
    """Chained digest of the ordered batches of steps 0 to `num_steps` - 1: one number to compare two runs by.

    Goes on from `previous`, the run digest of the steps before `first_step`.
    """
    for step in range(first_step, num_steps):
        previous = chain_digest(previous, plan.digest(step))
    return previous
