"""The files by which processes know of a run's service: records, locks, the watched trainer. No Ray is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixwright.data_mixing.client import MixingClient, reachable_service
from mixwright.data_mixing.errors import ServiceUnavailable
from mixwright.data_mixing.service import (
    RECORD,
    ServiceProcess,
    ServiceRecord,
    has_host,
    host_lock,
    is_watched_alive,
    read_record,
    service_status,
    start_service,
    stop_service,
    write_record,
)
from tests.data_mixing.run_cases import TrainerSide

HOLD_LOCK = """
import sys, time
from pathlib import Path
from mixwright.data_mixing.service import host_lock
with host_lock(Path(sys.argv[1])) as held:
    print(held, flush=True)
    time.sleep(60)
"""


def record(**changes: object) -> ServiceRecord:
    fields = {"state": "ready", "run": "exp", "host": os.uname().nodename, "pid": os.getpid(), "private": True,
              "watched": False, "address": "127.0.0.1:1", "actor": "mixing/exp"}  # fmt: skip
    return ServiceRecord.model_validate(fields | changes)


def lock_holder(run_dir: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    write_record(tmp_path, record(token_path=Path("/t/token")))
    assert read_record(tmp_path) == record(token_path=Path("/t/token"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "ready"}', '{"state": "happy"}'])
def test_a_broken_record_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ServiceUnavailable, match=r"service\.json: cannot be read"):
        service_status(tmp_path)


def test_only_one_process_holds_the_service_lock_and_its_death_frees_it(tmp_path: Path) -> None:
    assert not has_host(tmp_path)
    holder = lock_holder(tmp_path)
    assert has_host(tmp_path)
    with host_lock(tmp_path) as held:
        assert not held
    holder.kill()
    holder.communicate()
    assert not has_host(tmp_path)
    with host_lock(tmp_path) as held:
        assert held


def test_status_tells_ready_from_killed_from_never_there(tmp_path: Path) -> None:
    assert service_status(tmp_path).message.endswith(f"start it with `mixwright mix up --run {tmp_path}`")
    holder = lock_holder(tmp_path)
    write_record(tmp_path, record())
    assert service_status(tmp_path).state == "ready"
    holder.kill()
    holder.communicate()
    assert service_status(tmp_path).state == "failed"
    assert "was killed; start it with `mixwright mix up" in service_status(tmp_path).message
    write_record(tmp_path, record(state="failed", message="Ray cannot be started"))
    assert "Ray cannot be started" in service_status(tmp_path).message


def test_the_watched_process_is_this_one_and_not_another_with_its_number(tmp_path: Path) -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    start_service(tmp_path, address="nowhere", watch_pid=sleeper.pid).stop()
    assert is_watched_alive(tmp_path)
    sleeper.kill()
    time.sleep(0.2)
    assert not is_watched_alive(tmp_path)  # a zombie is dead
    sleeper.wait()
    assert not is_watched_alive(tmp_path)
    watch = tmp_path / "service.watch"
    watch.write_text(watch.read_text().replace(str(sleeper.pid), str(os.getpid())))
    assert not is_watched_alive(tmp_path)  # our number, another start time
    watch.write_text("{")
    assert not is_watched_alive(tmp_path)


def test_a_host_that_dies_without_a_word_is_reported_with_the_last_line_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('oh no', file=sys.stderr); sys.exit(9)"]
    status = ServiceProcess(tmp_path, command, is_watched=False).wait(10)
    assert (status.state, status.message) == (
        "failed",
        f"the mixing service of run {tmp_path.name!r} ended with code 9: oh no",
    )


def test_a_service_that_cannot_be_started_fails_without_raising(tmp_path: Path) -> None:
    status = ServiceProcess(tmp_path, ["/no/such/python"], is_watched=False).wait(10)
    assert status.state == "failed"
    assert "cannot be started" in status.message
    (tmp_path / "run").write_text("a file where the run's folder should be")
    service = start_service(tmp_path / "run")
    assert service.poll().state == "failed"
    service.stop()


def test_a_broken_record_fails_the_service_and_not_the_trainer(tmp_path: Path) -> None:
    service = ServiceProcess(tmp_path, ["sleep", "60"], is_watched=True)
    assert service.poll().state == "starting"
    (tmp_path / RECORD).write_text("{")
    assert service.poll().state == "failed"
    assert "service.json: cannot be read" in service.poll().message
    service.stop()


def test_waiting_for_a_service_ends_in_time(tmp_path: Path) -> None:
    service = ServiceProcess(tmp_path, ["sleep", "60"], is_watched=True)
    started = time.monotonic()
    status = service.wait(0.5)
    assert status.state == "starting"
    assert "not ready after 0.5 s" in status.message
    assert time.monotonic() - started < 5
    service.stop()


def test_stopping_ends_a_host_that_ignores_sigterm(tmp_path: Path) -> None:
    ignoring = HOLD_LOCK.replace("import sys", "import signal; signal.signal(15, signal.SIG_IGN); import sys")
    process = subprocess.Popen([sys.executable, "-c", ignoring, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    write_record(tmp_path, record(pid=process.pid))
    assert stop_service(tmp_path, timeout_s=1)
    process.communicate(timeout=5)
    assert process.returncode == -signal.SIGKILL


def test_a_service_on_another_machine_is_not_ended_from_here(tmp_path: Path) -> None:
    holder = lock_holder(tmp_path)
    write_record(tmp_path, record(host="elsewhere", pid=holder.pid))
    assert not stop_service(tmp_path)
    assert holder.poll() is None
    with pytest.raises(ServiceUnavailable, match=r"is on 'elsewhere' and listens only there: run this command there"):
        reachable_service(tmp_path)
    holder.kill()
    holder.communicate()


@pytest.mark.parametrize("verb", ["ping", "status", "history"])
def test_every_call_says_that_there_is_no_service(tmp_path: Path, verb: str) -> None:
    trainer = TrainerSide(tmp_path / "exp")
    with pytest.raises(ServiceUnavailable, match="has no mixing service; start it with"):
        getattr(MixingClient(trainer.run_dir), verb)()


def test_a_call_waits_for_a_service_that_is_starting_within_its_time_limit(tmp_path: Path) -> None:
    holder = lock_holder(tmp_path)
    write_record(tmp_path, record(state="starting"))
    started = time.monotonic()
    with pytest.raises(ServiceUnavailable, match="is starting"):
        MixingClient(tmp_path, timeout_s=0.5).ping()
    assert 0.5 <= time.monotonic() - started < 3
    holder.kill()
    holder.communicate()


def test_a_call_to_a_closed_port_fails_at_once_and_says_where(tmp_path: Path) -> None:
    trainer = TrainerSide(tmp_path / "exp")
    holder = lock_holder(trainer.run_dir)
    token = tmp_path / "token"
    token.write_text("0" * 64)
    write_record(trainer.run_dir, record(token_path=token))
    started = time.monotonic()
    with pytest.raises(ServiceUnavailable, match=r"no Ray at 127\.0\.0\.1:1: .*refused"):
        MixingClient(trainer.run_dir, timeout_s=20).ping()
    assert time.monotonic() - started < 10
    holder.kill()
    holder.communicate()


@pytest.mark.usefixtures("no_file_locks")
def test_without_file_locks_there_is_no_service_and_the_line_says_what_to_do(tmp_path: Path) -> None:
    told = r"no file locks \(Function not implemented\).*mixing\.service: none"
    with pytest.raises(ServiceUnavailable, match=told), host_lock(tmp_path):
        pass
    with pytest.raises(ServiceUnavailable, match="no file locks"):
        has_host(tmp_path)
