"""The controller of a run: checks and journals policies. Its Ray actor, and the one door to Ray.

`MixingController` is a plain class over the journal; `ControllerActor` makes it the detached actor `mixing/<run>`.
Everything it knows is in the journal, so a restarted controller goes on where the killed one stopped: requests carry
an id and are journaled once, however often Ray repeats them (actor calls are at-least-once, spec/mixing.md 3.4).

Of two controllers on one journal the newer lease wins; the older one refuses every verb and ends its actor.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.actor
import ray.exceptions
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mixwright.data_mixing.answers import Answer, failure, one_line, unpack
from mixwright.data_mixing.entries import Cancel, EntryBody, Lease, PolicyEntry, Reject
from mixwright.data_mixing.entry_file import Entry
from mixwright.data_mixing.errors import (
    JournalConflict,
    MixingError,
    PolicyRejected,
    ServiceUnavailable,
    nearest,
)
from mixwright.data_mixing.forecast import expected_commits, remarks
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import Journal, read_entries
from mixwright.data_mixing.policy import accept, recordable
from mixwright.data_mixing.run_status import entry_record, run_status
from mixwright.data_mixing.service import TOKEN_REMEDY

logger = logging.getLogger(__name__)

NAMESPACE = "mixwright"
OBJECT_STORE_BYTES = 80 << 20
"""Ray's smallest is 75 MiB; the service stores no objects."""
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
                commits = expected_commits(self._history, (entry.lsn, entry.body))
                return {"lsn": entry.lsn, "remarks": remarks(self._history.genesis, commits, entry.lsn)}
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
        """Who answers, how far it has read, and whether the run is over."""
        self._catch_up()
        return {
            "holder": self._holder,
            "journal": str(self._journal.folder),
            "pid": os.getpid(),
            "lsn": self._history.last_lsn,
            "is_over": self._history.end is not None,
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


class ControllerActor:
    """MixingController as a Ray actor: plain data in, `{"ok": ...}` or `{"error": class, "message": ...}` out.

    The controller is built at the first call, and again after the journal could not be used: a constructor that fails
    would end the actor for good.
    """

    def __init__(self, journal_folder: str, holder: str) -> None:
        self._journal_folder, self._holder = Path(journal_folder), holder
        self._controller: MixingController | None = None

    def submit(self, document: Any, request_id: str = "") -> Answer:
        return self._answer(lambda controller: controller.submit(document, request_id))

    def cancel(self, policy_lsn: int, request_id: str = "", author: str = "", why: str = "") -> Answer:
        return self._answer(lambda controller: controller.cancel(policy_lsn, request_id, author, why))

    def status(self) -> Answer:
        return self._answer(MixingController.status)

    def history(self, since_lsn: int = 0) -> Answer:
        return self._answer(lambda controller: controller.history(since_lsn))

    def ping(self) -> Answer:
        return self._answer(MixingController.ping)

    def _answer(self, verb: Callable[[MixingController], Answer]) -> Answer:
        try:
            if self._controller is None:
                self._controller = MixingController(self._journal_folder, self._holder)
            return {"ok": verb(self._controller)}
        except JournalConflict as error:
            logger.error("this controller ends: %s", error)
            ray.actor.exit_actor()  # raises; an actor that ends itself is not restarted
            raise
        except (PolicyRejected, ServiceUnavailable) as error:
            return failure(error)
        except MixingError as error:
            self._controller = None
            return failure(error)


def start_private_ray(folder: Path) -> str:
    """Start a Ray of this process's own with its files in `folder`; returns its address. It ends with this process.

    The caller has set the environment (`launch/ray_environment.py`). Raises ServiceUnavailable.
    """
    try:
        context = ray.init(
            address="local",
            namespace=NAMESPACE,
            num_cpus=0,
            num_gpus=0,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=str(folder),
        )
    except Exception as error:  # Ray documents none of what a failing start raises
        raise ServiceUnavailable(f"Ray cannot be started: {one_line(error)}") from None
    return str(context.address_info["gcs_address"])


def attach_ray(address: str, timeout_s: float) -> str:
    """Become a driver of the Ray cluster at `address` (`host:port` or `auto`); returns its address.

    Raises ServiceUnavailable, at once when nobody listens there or the token is not the cluster's.
    """
    if address != "auto":
        check_reachable(address, timeout_s)
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, RayError ...: Ray documents none of them
        raise ServiceUnavailable(f"the Ray cluster at {address} cannot be used: {one_line(error)}") from None
    return str(ray.get_runtime_context().gcs_address)


def check_reachable(address: str, timeout_s: float) -> None:
    """Raise ServiceUnavailable unless a Ray head listens at `address` and takes our token.

    `ray.init` would retry a closed port or a wrong token for 20 to 40 s and say neither.
    """
    check_listening(address, timeout_s)
    try:
        GcsClient(address=address)
    except ray.exceptions.AuthenticationError:
        raise ServiceUnavailable(f"the Ray cluster at {address} refuses our token: {TOKEN_REMEDY}") from None
    except ray.exceptions.RayError as error:
        raise ServiceUnavailable(f"the Ray cluster at {address} does not answer: {one_line(error)}") from None


def check_listening(address: str, timeout_s: float) -> None:
    """Raise ServiceUnavailable unless something listens at `address`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ServiceUnavailable(f"Ray address {address!r}: expected HOST:PORT, e.g. 10.0.0.5:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except (OSError, OverflowError) as error:
        raise ServiceUnavailable(f"no Ray at {address}: {one_line(error)}") from None


def actor_name(run: str) -> str:
    """Name of a run's controller among the actors of NAMESPACE."""
    return f"mixing/{run}"


def create_controller(run: str, journal_folder: Path, holder: str, timeout_s: float) -> tuple[Any, str]:
    """The run's actor in the cluster that this process is attached to, created or found; it answers.

    Returns it and its name in the journal, which is another than `holder` for one that was found. Raises
    ServiceUnavailable when it does not answer, or when a run of the same name in another folder has it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = ray.remote(ControllerActor).options(
        name=actor_name(run),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=here,
    )
    actor = options.remote(str(journal_folder), holder)
    pong = call(actor, "ping", {}, timeout_s)
    if pong["journal"] != str(journal_folder):
        raise ServiceUnavailable(
            f"actor {actor_name(run)!r} of this cluster serves {pong['journal']}; give the run of {journal_folder} "
            "another name"
        )
    return actor, str(pong["holder"])


def find_controller(run_actor: str) -> Any:
    """The actor by its name; raises ServiceUnavailable."""
    try:
        return ray.get_actor(run_actor, namespace=NAMESPACE)
    except (ValueError, ray.exceptions.RayError) as error:
        raise ServiceUnavailable(f"the cluster has no controller {run_actor!r}: {one_line(error)}") from None


def call(actor: Any, verb: str, arguments: Mapping[str, Any], timeout_s: float) -> Answer:
    """Answer of one verb; raises what the verb raises, and ServiceUnavailable when there is no answer in time."""
    try:
        answer = ray.get(getattr(actor, verb).remote(**arguments), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise ServiceUnavailable(f"{verb}: the controller gave no answer within {timeout_s:g} s") from None
    except ray.exceptions.RayError as error:
        raise ServiceUnavailable(f"{verb}: the controller failed: {one_line(error)}") from None
    return unpack(answer)


def end_controller(actor: Any) -> None:
    """End the actor for good; the journal stays."""
    ray.kill(actor, no_restart=True)


def leave_ray(actor: Any) -> None:
    """End the actor, if there is one, and this process's part in Ray: a private Ray ends, a cluster goes on."""
    if actor is not None:
        end_controller(actor)
    ray.shutdown()
