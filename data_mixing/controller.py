"""The controller of a run as the detached Ray actor `mixing/<run>`, and the one door to Ray.

The actor is thin: what it does is in `control.py`. Verbs that change something need the run's token
(`run_token.py`). Of two controllers on one journal the newer lease wins; the older one refuses every verb and ends its
actor.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.actor
import ray.exceptions
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mixwright.data_mixing.answers import Answer, failure, one_line, unpack
from mixwright.data_mixing.control import MixingController
from mixwright.data_mixing.errors import AccessRefused, JournalConflict, MixingError, PolicyRejected, ServiceUnavailable
from mixwright.data_mixing.run_token import TOKEN_FILE, TOKEN_VARIABLE, check_token
from mixwright.data_mixing.service import TOKEN_REMEDY, check_listening

logger = logging.getLogger(__name__)

NAMESPACE = "mixwright"
OBJECT_STORE_BYTES = 80 << 20
"""Ray's smallest is 75 MiB; the service stores no objects."""
DECIDE_INTERVAL_S = 0.05
"""How often a controller looks for decisions that are due: one `stat` when there is nothing new."""
RETRY_INTERVAL_S = 5.0
BUSY_S = 8.0
"""How long a verb waits for a decision under way. Pings queue behind it, and their host gives them 10 s."""


class ControllerActor:
    """MixingController as a Ray actor: plain data in, `{"ok": ...}` or `{"error": class, "message": ...}` out.

    The controller is built at the first call, and again after the journal could not be used: a constructor that fails
    would end the actor for good. A thread makes the decisions of online policies; verbs wait for one under way, but not
    long. A ping does not wait while the decision has its time still: a user's code may think for minutes.
    """

    def __init__(self, journal_folder: str, holder: str, token_digest: str) -> None:
        self._journal_folder, self._holder, self._token_digest = Path(journal_folder), holder, token_digest
        self._controller: MixingController | None = None
        self._lock = threading.RLock()
        self._pong: Answer = {}
        self._decides_until = 0.0
        threading.Thread(target=self._decide, name="decide", daemon=True).start()

    def submit(self, document: Any, request_id: str = "", token: str | None = None) -> Answer:
        return self._change("submit", token, lambda controller: controller.submit(document, request_id))

    def cancel(
        self, policy_lsn: int, request_id: str = "", author: str = "", why: str = "", token: str | None = None
    ) -> Answer:
        return self._change("cancel", token, lambda controller: controller.cancel(policy_lsn, request_id, author, why))

    def pause(
        self, held: bool, request_id: str = "", author: str = "", why: str = "", token: str | None = None
    ) -> Answer:
        return self._change("pause", token, lambda controller: controller.pause(held, request_id, author, why))

    def roll_back(
        self, policy_lsn: int, request_id: str = "", author: str = "", why: str = "", token: str | None = None
    ) -> Answer:
        return self._change(
            "roll_back", token, lambda controller: controller.roll_back(policy_lsn, request_id, author, why)
        )

    def end(self, token: str | None = None) -> Answer:
        """Whether the caller may end this actor, which is then done from outside: an actor may hang."""
        return self._refusal("end", token) or {"ok": {}}

    def status(self) -> Answer:
        return self._answer(MixingController.status)

    def history(self, since_lsn: int = 0) -> Answer:
        return self._answer(lambda controller: controller.history(since_lsn))

    def ping(self) -> Answer:
        if self._pong and time.monotonic() < self._decides_until:
            return {"ok": self._pong}
        return self._answer(self._ping)

    def _ping(self, controller: MixingController) -> Answer:
        self._pong = {**controller.ping(), "token_digest": self._token_digest}
        return self._pong

    def _decide(self) -> None:
        """Thread: journal what online policies decide, as soon as it is due."""
        while True:
            time.sleep(DECIDE_INTERVAL_S)
            try:
                with self._lock:
                    if self._controller is not None:
                        self._advance(self._controller)
            except JournalConflict:
                return  # another controller decides from now on; the next verb ends this actor
            except Exception:
                logger.exception("a decision cannot be made, trying again in %g s", RETRY_INTERVAL_S)
                time.sleep(RETRY_INTERVAL_S)

    def _advance(self, controller: MixingController) -> None:
        self._decides_until = time.monotonic() + controller.decision_limit_s()
        try:
            controller.advance()
        finally:
            self._decides_until = 0.0

    def _change(self, name: str, token: str | None, verb: Callable[[MixingController], Answer]) -> Answer:
        """The answer of a verb that changes something."""
        return self._refusal(name, token) or self._answer(verb)

    def _refusal(self, name: str, token: str | None) -> Answer | None:
        """The answer to a wrong token, given before anything is looked at; None for the right one."""
        try:
            check_token(name, token, self._token_digest, self._journal_folder.parent)
        except AccessRefused as error:
            return failure(error)
        return None

    def _answer(self, verb: Callable[[MixingController], Answer]) -> Answer:
        if not self._lock.acquire(timeout=BUSY_S):
            return failure(ServiceUnavailable("an online policy is deciding: try again in a moment"))
        try:
            return self._locked_answer(verb)
        finally:
            self._lock.release()

    def _locked_answer(self, verb: Callable[[MixingController], Answer]) -> Answer:
        try:
            if self._controller is None:
                self._controller = MixingController(self._journal_folder, self._holder)
                self._ping(self._controller)
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


def actor_name(run: str) -> str:
    """Name of a run's controller among the actors of NAMESPACE."""
    return f"mixing/{run}"


def create_controller(
    run: str, journal_folder: Path, holder: str, token_digest: str, timeout_s: float
) -> tuple[Any, str]:
    """The run's actor in the cluster that this process is attached to, created or found; it answers.

    Returns it and its name in the journal, which is another than `holder` for one that was found. Raises
    ServiceUnavailable when it does not answer, when a run of the same name in another folder has it, or when one that
    was found knows another token.
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
    actor = options.remote(str(journal_folder), holder, token_digest)
    pong = call(actor, "ping", {}, timeout_s)
    if pong["journal"] != str(journal_folder):
        raise ServiceUnavailable(
            f"actor {actor_name(run)!r} of this cluster serves {pong['journal']}; give the run of {journal_folder} "
            "another name"
        )
    if pong.get("token_digest") != token_digest:
        raise ServiceUnavailable(
            f"actor {actor_name(run)!r} of this cluster knows another token than {journal_folder.parent / TOKEN_FILE} "
            f"holds: restore that file, or end the actor with its token in {TOKEN_VARIABLE} (`mix down`)"
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
