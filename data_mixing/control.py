"""What the controller of a run does: checks and journals policies, and lets online policies decide.

A plain class over the journal, without Ray; `controller.py` makes it an actor. Everything it knows is in the journal,
so a restarted controller goes on where the killed one stopped: requests carry an id and are journaled once, however
often Ray repeats them (actor calls are at-least-once, spec/mixing.md 3.4), and so are decisions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.answers import Answer
from mixwright.data_mixing.deciding import cost_remarks, due_entry
from mixwright.data_mixing.entries import Cancel, EntryBody, Lease, Pause, PolicyEntry, Reject
from mixwright.data_mixing.entry_file import Entry
from mixwright.data_mixing.errors import JournalConflict, PolicyRejected, ServiceUnavailable, nearest
from mixwright.data_mixing.forecast import expected_plan, remarks
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import Journal, read_entries
from mixwright.data_mixing.policy import recordable
from mixwright.data_mixing.rollback import rollback_document
from mixwright.data_mixing.run_status import entry_record, run_status

logger = logging.getLogger(__name__)

JOURNAL_S = 30.0
"""Of the time of a decision, what reading and writing the journal may take."""
MAX_HISTORY_ENTRIES = 1000


class MixingController:
    """Checks, journals and withdraws policies of the run whose journal is in `journal_folder`.

    `holder` names this controller in the journal. A restarted controller has the name of the one that it replaces;
    another name is another controller, and takes over. The verbs raise PolicyRejected, JournalError, or
    JournalConflict once another controller has taken over.
    """

    def __init__(self, journal_folder: Path, holder: str) -> None:
        self._journal = Journal(journal_folder, writer=holder)
        self._holder = holder
        self._history = RunHistory()
        self._requests: dict[str, Entry] = {}
        self._has_held_lease = False
        self._lease: Lease | None = None
        self._catch_up()

    def submit(self, document: Any, request_id: str = "") -> Answer:
        """Journal a policy document (a mapping or YAML text) as POLICY, or as REJECT and raise PolicyRejected.

        Returns its entry number `lsn` and `remarks` for the user.
        """
        self._require_lease()
        entry = self._requests.get(request_id) or self._journal_policy(document, request_id)
        match entry.body:
            case Reject():
                raise PolicyRejected(entry.body.reason)
            case PolicyEntry():
                genesis = self._history.genesis
                plan = expected_plan(genesis, self._history, (entry.lsn, entry.body))
                notes = remarks(plan, entry.lsn) + cost_remarks(entry.body, genesis)
                return {"lsn": entry.lsn, "remarks": notes}
        raise PolicyRejected(f"request {request_id!r} was a {entry.type}, entry {entry.lsn}; choose another id")

    def cancel(self, policy_lsn: int, request_id: str = "", author: str = "", why: str = "") -> Answer:
        """Withdraw a policy that has not been committed. Returns the entry number `lsn` of the CANCEL."""
        self._require_lease()
        entry = self._requests.get(request_id)
        while entry is None:
            # Decided on the newest state: a COMMIT that comes in between makes the append fail and is seen.
            self._check_cancel(policy_lsn)
            body = Cancel(policy_lsn=policy_lsn, author=author, why=why, request_id=request_id)
            entry = self._journal.append_after(self._history.last_lsn, body)
            self._catch_up()
        return {"lsn": entry.lsn}

    def advance(self) -> int:
        """Make and journal the decisions of online policies that are due; returns the number of entries written."""
        self._catch_up()
        written, body = 0, None
        while self._lease is not None and (body := due_entry(self._history, body)) is not None:
            # Decided on the newest state: whatever comes in between makes the append fail, and is looked at first.
            written += self._journal.append_after(self._history.last_lsn, body) is not None
            self._catch_up()
        return written

    def decision_limit_s(self) -> float:
        """How long `advance` may take: what the policies that decide are given, and some time for the journal."""
        policies = [self._history.policies[root] for root in self._history.measures_from]
        return JOURNAL_S + sum(max((mark.timeout_s for mark in policy.marks), default=0.0) for policy in policies)

    def pause(self, held: bool, request_id: str = "", author: str = "", why: str = "") -> Answer:
        """Hold the mixture of online policies from their next decision on, or let them decide again.

        Returns the entry number `lsn` of the PAUSE. Raises PolicyRejected when nothing would change.
        """
        self._require_lease()
        entry = self._requests.get(request_id)
        if entry is None:
            if self._history.is_held == held:
                raise PolicyRejected(f"online decisions are {'already held' if held else 'not held'}")
            entry = self._journal.append(Pause(held=held, author=author, why=why, request_id=request_id))
            self._catch_up()
        return {"lsn": entry.lsn}

    def roll_back(self, policy_lsn: int, request_id: str = "", author: str = "", why: str = "") -> Answer:
        """Submit the mixture of an earlier policy again, as a policy of its own (`rollback.py`)."""
        self._require_lease()
        document = rollback_document(self._history, policy_lsn)
        return self.submit({**document, "author": author, "why": why or f"rollback to policy {policy_lsn}"}, request_id)

    def status(self) -> Answer:
        """`RunStatus` as plain data."""
        self._require_lease()
        return run_status(self._history).model_dump(mode="json")

    def history(self, since_lsn: int = 0) -> Answer:
        """Up to MAX_HISTORY_ENTRIES `entries` from `since_lsn` on."""
        self._require_lease()
        entries = read_entries(self._journal.folder, max(since_lsn, 0))
        return {"entries": [entry_record(entry) for entry in entries[:MAX_HISTORY_ENTRIES]]}

    def ping(self) -> Answer:
        """Who answers, how far it has read, whether the run is over, how long its newest append took."""
        self._catch_up()
        return {
            "holder": self._holder,
            "journal": str(self._journal.folder),
            "pid": os.getpid(),
            "lsn": self._history.last_lsn,
            "is_over": self._history.end is not None,
            "append_seconds": self._journal.append_seconds,
        }

    def _journal_policy(self, document: Any, request_id: str) -> Entry:
        body: EntryBody
        try:
            if self._history.end is not None:
                raise PolicyRejected(f"the run is {self._history.end.reason} after step {self._history.end.step}")
            body = accept(document, self._history.genesis, history=self._history, request_id=request_id)
        except PolicyRejected as error:
            author = document.get("author", "") if isinstance(document, Mapping) else ""
            body = Reject(
                document=recordable(document), reason=str(error), author=str(author)[:500], request_id=request_id
            )
        entry = self._journal.append(body)
        self._catch_up()
        return entry

    def _check_cancel(self, policy_lsn: int) -> None:
        pending = {lsn for lsn, _ in self._history.pending()}
        if policy_lsn in pending:
            return
        committed = next((c for c in self._history.commits if c.lsn == policy_lsn), None)
        if committed is not None:
            raise PolicyRejected(
                f"policy {policy_lsn} is committed from step {committed.effective_step} on; submit another one instead"
            )
        if policy_lsn in self._history.policies:
            raise PolicyRejected(f"policy {policy_lsn} waits for nothing: it was cancelled, or is a shadow")
        raise PolicyRejected(f"policy {policy_lsn} does not exist{nearest(str(policy_lsn), map(str, pending))}")

    def _catch_up(self) -> None:
        """Read what is new, take the lease when the run has begun. Raises JournalConflict when it was taken from us."""
        for entry in self._journal.poll():
            self._history.apply(entry)
            request_id = getattr(entry.body, "request_id", "")
            if request_id:
                self._requests.setdefault(request_id, entry)
            if isinstance(entry.body, Lease) and entry.body.role == "controller":
                self._has_held_lease |= entry.body.holder == self._holder
        newest = self._history.leases.get("controller")
        if newest is not None and self._is_taken_over(newest):
            raise JournalConflict(
                f"{newest.holder!r} has taken over as controller of run {self._history.genesis.run!r}"
            )
        if self._lease is None and self._history.has_genesis:
            self._lease = self._journal.acquire("controller")
            self._catch_up()

    def _is_taken_over(self, newest: Lease) -> bool:
        """Whether a newer controller holds the role: another one, or a restarted incarnation of this one."""
        if self._lease is None:
            return self._has_held_lease and newest.holder != self._holder
        return newest.epoch > self._lease.epoch

    def _require_lease(self) -> None:
        self._catch_up()
        if self._lease is None:
            raise ServiceUnavailable(
                f"{self._journal.folder}: the run has not begun (no GENESIS entry); policies are taken once it trains"
            )
