"""Performs what `supervise` decides: sends a manifest's jobs, follows their log, stops and sends again.

Everything that it has to know is on the cluster: jobs carry their run and attempt as metadata. So a supervisor that was
killed is replaced by the same command, from any machine, and finds the job that is running.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from mixwright.data_mixing.errors import ConfigError
from mixwright.launch.cluster_rank import INTERRUPTED
from mixwright.launch.ending import EXIT_CTRL_C
from mixwright.launch.job_log import JobLog, progress_of
from mixwright.launch.job_manifest import JobManifest, submission_id
from mixwright.launch.jobs_api import ClusterUnreachable, Job, JobsApi
from mixwright.launch.supervise import Action, Course, Limits, Sight, decide, postponed

LOOK_INTERVAL_S = 2.0
START_TIMEOUT_S = 60.0
RUN, STAGE, ATTEMPT, DIGEST = "mixwright_run", "mixwright_stage", "mixwright_attempt", "mixwright_manifest"
"""Metadata of our jobs."""

Say = Callable[[str], None]


def jobs_of_run(api: JobsApi, run: str) -> list[Job]:
    """The jobs of a run that the cluster knows, the oldest first."""
    return [job for job in api.jobs() if job.metadata.get(RUN) == run]


def attempt_of(job: Job) -> int:
    return int(job.metadata.get(ATTEMPT, "0"))


@dataclass(frozen=True)
class Sent:
    """A job of a run: sent now, or found (`status`), an earlier supervisor's or one whose answer did not come."""

    name: str
    attempt: int
    status: str = ""


def find_or_send(api: JobsApi, manifest: JobManifest, python: str, attempt: int = 1) -> Sent:
    """The run's live job, or a new one with a number that none has had. Raises ServiceUnavailable, ConfigError."""
    jobs = jobs_of_run(api, manifest.run)
    live = next((job for job in jobs if job.is_live), None)
    if live is None:
        attempt = max([attempt, *(attempt_of(job) + 1 for job in jobs)])
        return Sent(_send(api, manifest, attempt, python), attempt)
    if live.metadata.get(DIGEST) != manifest.digest:
        raise ConfigError(
            f"run {manifest.run} is under way as job {live.submission_id} with another configuration or other "
            f"resources; stop it with `mixwright submit stop {manifest.run}`, or choose another run.name"
        )
    return Sent(live.submission_id, attempt_of(live), live.status.lower())


def find_or_send_patiently(api: JobsApi, manifest: JobManifest, python: str) -> Sent:
    """`find_or_send` to a head that may have been started a moment ago: it lists jobs before it takes any."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return find_or_send(api, manifest, python)
        except ClusterUnreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_INTERVAL_S)


def _send(api: JobsApi, manifest: JobManifest, attempt: int, python: str) -> str:
    """Submit one attempt; returns its submission id."""
    name = submission_id(manifest.run, attempt)
    environment = {
        **manifest.to_environment(),
        "RAY_JOB_STOP_WAIT_TIME_S": str(manifest.stop_seconds),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # Ray Train would make a working directory for every worker
        "RAY_COLOR_PREFIX": "0",
        "RAY_DEDUP_LOGS": "0",
    }
    metadata = {RUN: manifest.run, STAGE: manifest.stage, ATTEMPT: str(attempt), DIGEST: manifest.digest}
    api.submit(f"exec {shlex.quote(python)} -m mixwright.launch.cluster_job", name, environment, metadata)
    return name


class Supervisor:
    """Keeps one run going until it is done, refused, stopped by a user, or stuck. Ctrl-C leaves it to itself."""

    def __init__(self, api: JobsApi, manifest: JobManifest, python: str, limits: Limits, say: Say) -> None:
        self._api, self._manifest, self._python, self._limits, self._say = api, manifest, python, limits, say
        self._name = ""
        self._log: JobLog | None = None
        self._seen = Sight(now=0.0)
        self._is_away = False

    def run(self) -> int:
        """Returns the exit code. Raises ServiceUnavailable, ConfigError."""
        try:
            return self._supervise()
        except KeyboardInterrupt:
            if not self._name:
                return INTERRUPTED
            self._say(
                f"job {self._name} goes on without a supervisor. The same command follows it again; "
                f"`mixwright submit stop {self._manifest.run}` stops it"
            )
            return EXIT_CTRL_C

    def _supervise(self) -> int:
        course = Course()
        while True:
            next_course, action = decide(course, self._look(course), self._limits)
            try:
                course = self._act(next_course, action)
            except ClusterUnreachable as error:
                self._tell_away(error)
                if action.kind == "submit":
                    course = postponed(next_course, time.monotonic(), self._limits)
            if action.kind == "end":
                return action.code
            if action.kind == "wait":
                time.sleep(LOOK_INTERVAL_S)

    def _act(self, course: Course, action: Action) -> Course:
        """Carry out an action; the course afterwards. Raises ClusterUnreachable."""
        if action.why and action.kind != "submit":
            self._say(f"{self._name}: {action.why}" if self._name else action.why)
        if action.kind == "stop":
            self._api.stop(self._name)
        return self._submit(course) if action.kind == "submit" else course

    def _submit(self, course: Course) -> Course:
        sent = find_or_send(self._api, self._manifest, self._python, course.attempt)
        self._name = sent.name
        self._tell_back()
        self._say(
            f"following job {sent.name}, which is {sent.status}"
            if sent.status
            else f"submitted job {sent.name} to {self._api.url}"
        )
        self._log, self._seen = JobLog(self._api, sent.name), Sight(now=0.0)
        return replace(course, attempt=sent.attempt)

    def _look(self, course: Course) -> Sight:
        """What there is to see now; lines of the log are printed on the way."""
        now = time.monotonic()
        try:
            if not course.is_submitted:
                self._api.jobs()
                if course.refused_since is None:  # a head that lists jobs may take none
                    self._tell_back()
                return Sight(now)
            job = self._api.job(self._name)
        except ClusterUnreachable as error:
            self._tell_away(error)
            return Sight(now, is_reachable=False)
        self._tell_back()
        self._read_log(is_over=job is None or not job.is_live, now=now)
        status, exit_code = (job.status, job.exit_code) if job else (None, None)
        self._seen = replace(self._seen, now=now, status=status, exit_code=exit_code)
        return self._seen

    def _read_log(self, is_over: bool, now: float) -> None:
        assert self._log is not None
        for line in self._log.rest() if is_over else self._log.lines():
            self._say(line)
            step = progress_of(line)
            if step is not None:
                self._seen = replace(self._seen, step=max(self._seen.step, step), moved_at=now)

    def _tell_away(self, error: ClusterUnreachable) -> None:
        if not self._is_away:
            self._say(f"{error}; trying for {self._limits.unreachable_s / 60:g} min")
        self._is_away = True

    def _tell_back(self) -> None:
        if self._is_away:
            self._say("the cluster answers again")
        self._is_away = False
