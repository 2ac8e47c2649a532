"""The run as its journal tells it: a fold of the entries, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.entries import (
    Cancel,
    Checkpoint,
    Commit,
    Decision,
    End,
    Genesis,
    Lease,
    Pass,
    Pause,
    PolicyEntry,
    Report,
)
from mixwright.data_mixing.entry_file import Entry
from mixwright.data_mixing.errors import JournalError, PlanMismatch, nearest
from mixwright.data_mixing.measured import still_needed, with_report
from mixwright.data_mixing.plan import CommittedPolicy, Plan, PlanState
from mixwright.data_mixing.timeline import check_fits

__all__ = ["CommittedPolicy", "HistoryState", "RunHistory"]

KEEP_REPORTS = 64


class CommitRecord(StrictModel):
    """A COMMIT as a snapshot keeps it: entry of its policy, effective step, fingerprint of the plan's state there."""

    policy_lsn: int
    effective_step: int
    plan_digest: str


class HistoryState(StrictModel):
    """A RunHistory as plain data, with the plan's state at the last commit (in order of domain id) to go on from."""

    genesis: Genesis
    policies: tuple[tuple[int, PolicyEntry], ...]
    settled: tuple[int, ...]
    commits: tuple[CommitRecord, ...]
    cursors: tuple[int, ...]
    credits: tuple[int, ...]
    leases: tuple[Lease, ...]
    checkpoints: tuple[Checkpoint, ...]
    reports: tuple[Report, ...]
    keep_reports: int
    end: End | None
    last_step: int
    last_lsn: int
    last_hash: str
    last_ruling_lsn: int
    measures_from: tuple[tuple[int, int], ...] = ()
    decisions: tuple[tuple[int, Decision], ...] = ()
    passes: tuple[tuple[int, int], ...] = ()
    measured: tuple[Report, ...] = ()
    is_held: bool = False


class RunHistory:
    """What has happened in a run so far. Feed it every entry of the journal with `apply`.

    policies: POLICY entries by their number; commits: in journal order; leases: the newest of each role;
    reports: the newest few; last_step: the last step reported as trained, -1 at the start; end: None while the run can
    go on; last_lsn and last_ruling_lsn: numbers of the newest entry and of the newest COMMIT or PASS, -1 at the start.

    Of online policies: measures_from: the step from which on the next decision looks at losses, by the entry of each
    policy that is in force or a shadow; decisions: the newest of each, with its entry number, by the entry of the
    policy; passes: (entry of the policy in force, step) of decisions that did not come in time; measured: the reports
    that the next decisions need; is_held: whether people have told online policies to hold their mixture.
    """

    def __init__(self, keep_reports: int = KEEP_REPORTS) -> None:
        self._genesis: Genesis | None = None
        self.policies: dict[int, PolicyEntry] = {}
        self.commits: list[CommittedPolicy] = []
        self.leases: dict[str, Lease] = {}
        self.checkpoints: list[Checkpoint] = []
        self.reports: deque[Report] = deque(maxlen=keep_reports)
        self.end: End | None = None
        self.last_step = -1
        self.last_lsn = -1
        self.last_hash = ""
        self.last_ruling_lsn = -1
        self.measures_from: dict[int, int] = {}
        self.decisions: dict[int, tuple[int, Decision]] = {}
        self.passes: set[tuple[int, int]] = set()
        self.measured: list[Report] = []
        self.is_held = False
        self._settled: set[int] = set()
        self._records: list[CommitRecord] = []
        self._plan: Plan | None = None

    @property
    def has_genesis(self) -> bool:
        """Whether the run has begun."""
        return self._genesis is not None

    @property
    def genesis(self) -> Genesis:
        """What the run is; raises JournalError before the first entry."""
        if self._genesis is None:
            raise JournalError("the journal is empty: the run has no GENESIS entry yet")
        return self._genesis

    def apply(self, entry: Entry) -> None:
        """Take in the next entry; one that was applied before is passed over.

        Raises JournalError when the entry does not follow from those before it; the history is then unchanged.
        """
        if entry.lsn <= self.last_lsn:
            return
        if entry.lsn != self.last_lsn + 1:
            raise JournalError(f"entry {entry.lsn} was applied after entry {self.last_lsn}: those between are missing")
        if isinstance(entry.body, Genesis) != (entry.lsn == 0):
            raise JournalError(f"entry {entry.lsn} is a {entry.type}: GENESIS is entry 0 and no other")
        self._fold(entry)
        self.last_lsn, self.last_hash = entry.lsn, entry.hash

    def _fold(self, entry: Entry) -> None:
        match entry.body:
            case Genesis():
                self._genesis = entry.body
            case Report():
                self._report(entry.body)
            case Checkpoint():
                self.checkpoints.append(entry.body)
                self.last_step = max(self.last_step, entry.body.step - 1)
            case Lease():
                self.leases[entry.body.role] = entry.body
            case End():
                self.end = entry.body
                self.last_step = entry.body.step - 1
            case _:
                self._fold_policy(entry)

    def _fold_policy(self, entry: Entry) -> None:
        """Entries that say what is read."""
        match entry.body:
            case PolicyEntry():
                self._check_policy(entry.lsn, entry.body)
                self._propose(entry.lsn, entry.body)
            case Commit():
                self._commit(entry.lsn, entry.body)
            case Cancel():
                self._policy(entry.lsn, entry.body.policy_lsn)
                self._settled.add(entry.body.policy_lsn)
                self.measures_from.pop(entry.body.policy_lsn, None)
            case Decision():
                self._policy(entry.lsn, entry.body.policy_lsn)
                self._decide(entry.lsn, entry.body)
            case Pass():
                self.passes.add((entry.body.policy_lsn, entry.body.step))
                self.last_ruling_lsn = entry.lsn
            case Pause():
                self.is_held = entry.body.held

    def _propose(self, lsn: int, policy: PolicyEntry) -> None:
        self.policies[lsn] = policy
        if policy.shadow and policy.marks and policy.root is None:
            self.measures_from[lsn] = max(policy.at_step or 0, self.last_step + 1)

    def _decide(self, lsn: int, decision: Decision) -> None:
        self.decisions[decision.policy_lsn] = (lsn, decision)
        if decision.policy_lsn in self.measures_from:
            self.measures_from[decision.policy_lsn] = decision.step
        self.measured = still_needed(self.measured, self._measured_since(self.last_step))

    def _policy(self, lsn: int, policy_lsn: int) -> PolicyEntry:
        policy = self.policies.get(policy_lsn)
        if policy is None:
            hint = nearest(str(policy_lsn), map(str, self.policies))
            raise JournalError(f"entry {lsn}: policy_lsn={policy_lsn} is no POLICY entry before it{hint}")
        return policy

    def _check_policy(self, lsn: int, policy: PolicyEntry) -> None:
        try:
            check_fits(self.genesis, lsn, policy)
        except ValueError as error:
            raise JournalError(f"entry {lsn}: {error}") from None

    def _commit(self, lsn: int, commit: Commit) -> None:
        policy = self._policy(lsn, commit.policy_lsn)
        if policy.shadow:
            raise JournalError(f"entry {lsn}: commits policy {commit.policy_lsn}, which is a shadow")
        self._settled.add(commit.policy_lsn)
        # The record first: a thread that derives the plan meanwhile takes as many records as there are commits.
        self._records.append(CommitRecord(**commit.model_dump()))
        self.commits.append(CommittedPolicy(commit.effective_step, commit.policy_lsn, policy))
        self.last_ruling_lsn = lsn
        self._follow_root(commit)

    def _follow_root(self, commit: Commit) -> None:
        """The online policy that is in force measures, those that it supersedes no longer do."""
        active = self.active_root()
        for root in [root for root in self.measures_from if root != active and not self.policies[root].shadow]:
            del self.measures_from[root]
        if active == commit.policy_lsn:
            self.measures_from[active] = commit.effective_step
        self.measured = still_needed(self.measured, self._measured_since(self.last_step))

    def _report(self, report: Report) -> None:
        self.reports.append(report)
        since = self._measured_since(report.last_step)
        if since is not None and report.last_step >= since - 1:
            longer = with_report(self.measured, report, len(self.genesis.domains), self._marks)
            self.measured = still_needed(longer, since)
        if report.kind == "train":
            self.last_step = report.last_step
            # A run that was over, by an exhausted domain, and trains again has been continued.
            self.end = None

    def active_root(self) -> int | None:
        """Entry of the online policy whose program was committed last; None for a policy that decides nothing."""
        if not self.commits:
            return None
        newest = self.commits[-1]
        if newest.policy.root is not None:
            return newest.policy.root
        return newest.lsn if newest.policy.marks else None

    def shadow_roots(self) -> list[int]:
        """Entries of the online policies that decide without being obeyed."""
        return [root for root in self.measures_from if self.policies[root].shadow]

    def _measured_since(self, last_step: int) -> int | None:
        """The first step whose losses an online policy needs after `last_step`; None when there is no such policy."""
        starts = [last_step + 1 if self._waits(root) else step for root, step in self.measures_from.items()]
        return min(starts, default=None)

    def _waits(self, root: int) -> bool:
        """Whether an online policy's decisions are held: it measures anew from the step at which they go on."""
        return root in self.decisions and not self.decisions[root][1].stretches

    def _marks(self, since: int) -> set[int]:
        """Boundaries that commits have set at `since` or later, also those that a later commit took away."""
        found: set[int] = set()
        for commit in reversed(self.commits):
            origin = commit.policy.origin(commit.effective_step)
            found |= {origin + mark.step for mark in commit.policy.marks}
            if commit.effective_step <= since:
                break
        return found

    @property
    def num_commits(self) -> int:
        """COMMIT entries so far."""
        return len(self.commits)

    def pending(self) -> list[tuple[int, PolicyEntry]]:
        """Policies that wait for a COMMIT, with their entry numbers, in order; shadows never do.

        Nor does what an online policy decided when another policy has been committed meanwhile: it would undo that one.
        """
        waiting = [(lsn, p) for lsn, p in self.policies.items() if lsn not in self._settled and not p.shadow]
        active = self.active_root()
        return [(lsn, policy) for lsn, policy in waiting if policy.root is None or policy.root == active]

    def plan(self) -> Plan:
        """The plan of all commits so far; equal histories return equal plans, and one history extends its own.

        Raises PlanMismatch when a commit's recorded fingerprint is not the one derived here.
        """
        plan = self._plan or Plan(self.genesis, ())
        for commit, record in list(zip(self.commits, self._records, strict=False))[len(plan.commits) :]:
            plan = plan.extended(commit)
            check_digest(plan, record)
        self._plan = plan
        return plan

    def adopt(self, plan: Plan) -> None:
        """Go on from a plan that was derived from the first of these commits, without looking at their fingerprints."""
        self._plan = plan

    def state(self) -> HistoryState:
        """This history as data."""
        plan_state = self.plan().state(self.commits[-1].effective_step) if self.commits else None
        return HistoryState(
            genesis=self.genesis,
            policies=tuple(self.policies.items()),
            settled=tuple(sorted(self._settled)),
            commits=tuple(self._records),
            cursors=tuple(plan_state.cursor_G.tolist()) if plan_state else (),
            credits=tuple(plan_state.credit_G.tolist()) if plan_state else (),
            leases=tuple(self.leases.values()),
            checkpoints=tuple(self.checkpoints),
            reports=tuple(self.reports),
            keep_reports=self.reports.maxlen or KEEP_REPORTS,
            end=self.end,
            last_step=self.last_step,
            last_lsn=self.last_lsn,
            last_hash=self.last_hash,
            last_ruling_lsn=self.last_ruling_lsn,
            measures_from=tuple(self.measures_from.items()),
            decisions=tuple(self.decisions.values()),
            passes=tuple(sorted(self.passes)),
            measured=tuple(self.measured),
            is_held=self.is_held,
        )

    @classmethod
    def from_state(cls, state: HistoryState) -> RunHistory:
        """The history that `state` describes. Raises PlanMismatch when its plan state is not the committed one."""
        history = cls(state.keep_reports)
        history._genesis = state.genesis
        history.policies = dict(state.policies)
        history._settled = set(state.settled)
        history._records = list(state.commits)
        history.commits = [
            CommittedPolicy(record.effective_step, record.policy_lsn, history.policies[record.policy_lsn])
            for record in state.commits
        ]
        history.leases = {lease.role: lease for lease in state.leases}
        history.checkpoints = list(state.checkpoints)
        history.reports.extend(state.reports)
        history.end, history.last_step, history.last_ruling_lsn = state.end, state.last_step, state.last_ruling_lsn
        history.last_lsn, history.last_hash = state.last_lsn, state.last_hash
        history.measures_from = dict(state.measures_from)
        history.decisions = {decision.policy_lsn: (lsn, decision) for lsn, decision in state.decisions}
        history.passes, history.measured, history.is_held = set(state.passes), list(state.measured), state.is_held
        if history.commits:
            history._plan = _plan_from(state, history.commits)
        return history


def _plan_from(state: HistoryState, commits: Sequence[CommittedPolicy]) -> Plan:
    cursor_G, credit_G = np.array(state.cursors, np.int64), np.array(state.credits, np.int64)
    known = PlanState(commits[-1].effective_step, cursor_G, credit_G, np.zeros(len(cursor_G), np.bool_))
    plan = Plan(state.genesis, commits, (known,))
    check_digest(plan, state.commits[-1])
    return plan


def check_digest(plan: Plan, record: CommitRecord) -> None:
    """Raise PlanMismatch unless `plan` derives the state that was recorded with a commit."""
    derived = plan.state_digest(record.effective_step)
    if derived != record.plan_digest:
        raise PlanMismatch(
            f"the COMMIT entry of policy {record.policy_lsn} at step {record.effective_step} recorded plan state "
            f"{record.plan_digest[:12]!r}, but this installation derives {derived[:12]!r}: it would read other rows"
        )
