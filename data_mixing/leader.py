"""The leader's hand in the journal: commits policies with an effective step, records reports and checkpoints.

Runs on global rank 0. All journal input and output happens on one background thread, never inside a step. The leader
commits what the controller proposed; it does not need the controller to be alive.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType

from mixwright.data_mixing.entries import Commit, EntryBody, Genesis, Lease, Pass, PolicyEntry
from mixwright.data_mixing.errors import JournalConflict, JournalError, PolicyRejected, StoreChanged
from mixwright.data_mixing.history import CommittedPolicy, RunHistory
from mixwright.data_mixing.journal import Journal
from mixwright.data_mixing.snapshot import write_when_due

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.1
RETRY_INTERVAL_S = 5.0
REACH_STEPS, REACH_S = 64, 2.0
"""A policy with `at_step` is committed so many steps early, or so long, so that a slow journal does not make it late.
No earlier: what is submitted from then on cannot take effect before it."""
STILL_WAITING_S = 10.0
FLUSH_TIMEOUT_S = 30.0
COMMIT_TIMEOUT_S = 120.0
"""How long training waits at the edge of a commit that is being written to a slow journal."""


class Leader:
    """Use as a context manager: leaving it writes what is queued and ends the thread."""

    def __init__(
        self, journal: Journal, history: RunHistory, *, start_step: int, lead_steps: int, prefetch_steps: int
    ) -> None:
        """`journal` must hold the trainer's lease and `history` be its fold."""
        self._journal, self._history = journal, history
        self._lead_steps = lead_steps
        # A feeder in step s may hold s+1 .. s+prefetch in its queue and s+prefetch+1 in its hand.
        self._announce_margin = prefetch_steps + 2
        self._announced_lsn = history.last_ruling_lsn
        self._outbox: queue.Queue[EntryBody] = queue.Queue()
        self._failure: Exception | None = None
        self._is_away = False
        self._stopping, self._wake = threading.Event(), threading.Event()
        self._state = threading.Condition()
        self._current_step = start_step
        self._began: deque[tuple[float, int]] = deque(maxlen=8)
        self._writing_effective_step: int | None = None
        self._boundary: int | None = None
        self._give_up_at: int | None = None
        self._thread = threading.Thread(target=self._run, name="leader", daemon=True)

    def __enter__(self) -> Leader:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._wake.set()
        self._thread.join(timeout=COMMIT_TIMEOUT_S)
        if kind is None:
            self._raise_failure()
            if not self._outbox.empty():
                raise JournalError(f"{self._journal.folder}: {self._outbox.qsize()} entries could not be written")

    @property
    def announced_lsn(self) -> int:
        """Entry of the newest commit (or pass) that is safely in the journal."""
        return self._announced_lsn

    def sealed(self) -> tuple[int, int]:
        """(step, entry): steps before this one follow from the journal up to this entry, whatever comes later."""
        with self._state:
            step = self._current_step + self._lead_steps
            if self._writing_effective_step is not None:
                step = min(step, self._writing_effective_step)
            return step, self._announced_lsn

    def begin_step(self, step: int) -> None:
        """Say that `step` begins. Waits only while a commit that this step comes too close to is being written."""
        self._raise_failure()
        with self._state:
            self._current_step = step
            self._began.append((time.monotonic(), step))
            clear = self._state.wait_for(lambda: not self._is_too_close(step), timeout=COMMIT_TIMEOUT_S)
        if not clear:
            raise JournalError(f"{self._journal.folder}: a commit could not be written within {COMMIT_TIMEOUT_S:g} s")

    def await_decision(self, step: int, timeout_s: float) -> int:
        """Wait at the boundary before `step`, where all ranks stand, for the online policy's decision.

        A policy that is accepted meanwhile holds from `step` on. After `timeout_s` the program goes on as it is, and
        the journal says so. Returns the entry that ranks must follow before they read `step`.
        """
        deadline = time.monotonic() + timeout_s
        told = False
        with self._state:
            self._boundary = step
            # A ruling under way at this boundary holds from it: nobody leaves before it is written and announced.
            while self._writing_effective_step is not None or self._is_undecided(step):
                self._raise_failure()
                left = deadline - time.monotonic()
                if left < -COMMIT_TIMEOUT_S:
                    raise JournalError(f"{self._journal.folder}: no entry could be written for {COMMIT_TIMEOUT_S:g} s")
                if left < timeout_s - STILL_WAITING_S and not told:
                    told = True
                    logger.info("step %d: still waiting for the policy's decision (limit %g s)", step, timeout_s)
                if left <= 0:
                    self._give_up_at = step
                self._state.wait(timeout=POLL_INTERVAL_S)
            self._boundary = self._give_up_at = None
        return self._announced_lsn

    def _is_undecided(self, step: int) -> bool:
        return self._history.plan().is_waiting(step, self._history.passes)

    def write(self, body: EntryBody) -> None:
        """Queue an entry (a report, checkpoint or end) for the journal."""
        self._outbox.put(body)

    def flush(self) -> None:
        """Wait until what was queued is in the journal: after a checkpoint its steps are not done again, nor reported.

        Training does not wait for a journal that is away: the queue stays, and is written when it comes back.
        """
        self._wake.set()
        with self._state:
            self._state.wait_for(lambda: self._outbox.empty() or self._is_away, timeout=FLUSH_TIMEOUT_S)
        self._raise_failure()

    def _is_too_close(self, step: int) -> bool:
        """Whether the control word of `step` is the last one that can announce the commit under way in time."""
        effective_step = self._writing_effective_step
        return effective_step is not None and step >= effective_step - self._announce_margin

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        """Thread: write what is queued, read what is new, commit what is due."""
        while True:
            stopping = self._stopping.is_set()
            self._wake.clear()
            try:
                self._write_queued()
                self._read_new()
                if not stopping:
                    self._commit_due()
                    self._pass_due()
            except JournalConflict as error:
                self._fail(error)
                return
            except JournalError as error:
                # Training goes on with the last committed policy while the journal's storage is away.
                logger.warning("the journal cannot be used, trying again in %g s: %s", RETRY_INTERVAL_S, error)
                if stopping:
                    self._fail(error)
                    return
                self._tell(is_away=True)
                self._stopping.wait(RETRY_INTERVAL_S)
            except Exception as error:
                self._fail(error)
                return
            if stopping:
                return
            self._wake.wait(POLL_INTERVAL_S)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._tell(is_away=True)

    def _tell(self, is_away: bool) -> None:
        """Whoever waits for entries to be written looks again."""
        with self._state:
            self._is_away = is_away
            self._state.notify_all()

    def _write_queued(self) -> None:
        while not self._outbox.empty():
            body = self._outbox.queue[0]
            self._journal.append(body)
            self._outbox.get_nowait()
        self._tell(is_away=False)

    def _read_new(self, last_lsn: int | None = None) -> None:
        entries = self._journal.poll(last_lsn)
        for entry in entries:
            self._history.apply(entry)
        if entries:
            write_when_due(self._journal.folder, self._history)

    def _commit_due(self) -> None:
        for lsn, policy in self._history.pending():
            if (lsn, policy) not in self._history.pending():  # cancelled while one before it was committed
                continue
            with self._state:
                effective_step = self._effective_step(policy)
                if effective_step is None:
                    continue
                self._writing_effective_step = effective_step
            with self._announcing():
                self._commit(lsn, policy, effective_step)

    @contextlib.contextmanager
    def _announcing(self) -> Iterator[None]:
        """A ruling is written inside; whoever waits for it goes on behind."""
        try:
            yield
        finally:
            with self._state:
                self._writing_effective_step = None
                self._state.notify_all()

    def _effective_step(self, policy: PolicyEntry) -> int | None:
        """The step from which `policy` can hold, None while its time is not within reach."""
        soonest = self._current_step + self._lead_steps if self._boundary is None else self._boundary
        if self._history.commits:
            soonest = max(soonest, self._history.commits[-1].effective_step)
        wanted = policy.at_step if policy.at_step is not None else soonest
        return None if wanted > soonest + self._reach() else max(wanted, soonest)

    def _reach(self) -> int:
        """Steps that may begin within REACH_S, by the fastest of the newest ones; REACH_STEPS at most."""
        pairs = itertools.pairwise(self._began)
        fastest = min(((after - before) / max(step - last, 1) for (before, last), (after, step) in pairs), default=0.0)
        return math.ceil(REACH_S / max(fastest, REACH_S / REACH_STEPS))

    def _commit(self, lsn: int, policy: PolicyEntry, effective_step: int) -> None:
        """Commit, unless somebody wrote in between (a CANCEL of this policy, maybe): then the next look decides."""
        commit = commit_body(self._history, lsn, policy, effective_step)
        if self._rule(commit):
            logger.info("policy %d is committed: effective from step %d", lsn, effective_step)

    def _rule(self, body: Commit | Pass) -> bool:
        """Write what ranks must follow and announce it, unless something new stands in the journal."""
        entry = self._journal.append_after(self._history.last_lsn, body)
        if entry is None:
            self._read_new()
            return False
        # Not a file further: what is written is announced even if the journal cannot be read from here on.
        self._read_new(entry.lsn)
        self._announced_lsn = entry.lsn
        return True

    def _pass_due(self) -> None:
        """Go on without a decision, unless it came at the last moment."""
        with self._state:
            step = self._give_up_at
            if step is None or not self._is_undecided(step):
                return
            self._writing_effective_step = step
        with self._announcing():
            self._pass(step)

    def _pass(self, step: int) -> None:
        found = self._history.plan().mark(step)
        assert found is not None
        body = Pass(policy_lsn=found[0], step=step, reason="no decision came in time; the mixture stays")
        if self._rule(body):
            logger.warning("step %d: %s", step, body.reason)


def commit_body(history: RunHistory, lsn: int, policy: PolicyEntry, effective_step: int) -> Commit:
    """The COMMIT entry of a policy, with the digest of the plan's state that it leads to."""
    plan = history.plan().extended(CommittedPolicy(effective_step, lsn, policy))
    return Commit(policy_lsn=lsn, effective_step=effective_step, plan_digest=plan.state_digest(effective_step))


def open_run(
    journal: Journal, genesis: Genesis, first_policy: PolicyEntry, history: RunHistory | None = None
) -> tuple[RunHistory, Lease]:
    """Start or continue a run as its trainer: the first entries exist, the trainer's lease is ours.

    `history` is what `journal` has told already (`snapshot.resume`); None for a journal that was not read yet.
    Raises StoreChanged or JournalError when the journal was begun with other settings, PolicyRejected for a first
    policy that is a shadow; nothing is written then.
    """
    history = history or RunHistory()
    _catch_up(journal, history)
    if not history.commits and first_policy.shadow:
        raise PolicyRejected("shadow: a run begins with a policy that is obeyed; submit the shadow once it trains")
    if not history.has_genesis:
        journal.append(genesis)
        _catch_up(journal, history)
    check_genesis(history.genesis, genesis)
    lease = journal.acquire("trainer")
    _catch_up(journal, history)
    if not history.commits:
        lsn = _first_policy_entry(journal, history, first_policy)
        journal.append(commit_body(history, lsn, history.policies[lsn], 0))
        _catch_up(journal, history)
    return history, lease


def _first_policy_entry(journal: Journal, history: RunHistory, first_policy: PolicyEntry) -> int:
    """Entry of the policy to begin with: written now, or by an attempt that was killed before it committed."""
    for lsn, policy in history.policies.items():
        if policy == first_policy:
            return lsn
    entry = journal.append(first_policy)
    _catch_up(journal, history)
    return entry.lsn


def _catch_up(journal: Journal, history: RunHistory) -> None:
    for entry in journal.poll():
        history.apply(entry)


def check_genesis(recorded: Genesis, wanted: Genesis) -> None:
    """Raise when a run is continued with settings that would change what it reads."""
    if recorded.store_fingerprint != wanted.store_fingerprint:
        raise StoreChanged(
            f"the token store has fingerprint {wanted.store_fingerprint}, but the run was started on "
            f"{recorded.store_fingerprint}: restore the old store or start a new run"
        )
    different = [
        f"{name} = {getattr(wanted, name)!r} (the run has {getattr(recorded, name)!r})"
        for name in ("run", "seed", "sequence_length", "rows_per_step", "num_steps", "domains")
        if getattr(recorded, name) != getattr(wanted, name)
    ]
    if different:
        raise JournalError(f"this run was started with other settings; start a new run for: {'; '.join(different)}")
