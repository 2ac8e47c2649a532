"""Kill it, fill the disk, start it twice: the same call ends with the same bytes and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from mixwright.data_mixing.build import Build
from mixwright.data_mixing.corpora import CorporaConfig, load_corpora_config
from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.prepare import prepare
from mixwright.data_mixing.staging import Resumable, atomic_file, exclusive
from mixwright.data_mixing.store import TokenStore
from mixwright.data_mixing.workers import Workers
from tests.data_mixing.corpora_for_tests import (
    corpora_config,
    corpora_tree,
    files_of,
    sentences,
    two_domains,
    write_jsonl,
)

ROOT = Path(__file__).resolve().parents[2]
PREPARE = (
    "import sys; from pathlib import Path\n"
    "from mixwright.data_mixing.corpora import load_corpora_config\n"
    "from mixwright.data_mixing.prepare import prepare\n"
    "if __name__ == '__main__':\n"
    "    prepare(load_corpora_config(Path(sys.argv[1])), Path(sys.argv[1]).parent)\n"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of 1.5 MB, which make several tasks, and a script that prepares them with two processes."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain in range(3):
        for part in range(4):
            write_jsonl(folder / f"d{domain}" / f"{part}.jsonl", sentences(10 * domain + part, 150, num_words=150))
    tree = corpora_tree(Path("killed"), {f"d{i}": {"paths": [f"d{i}/*.jsonl"]} for i in range(3)}, num_workers=2)
    tree["tokenizer"]["train"]["vocab_size"] = 600
    tree["shard_bytes"] = 100_000
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    (folder / "prepare.py").write_text(PREPARE)
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus: Path) -> dict[str, bytes]:
    config = load_corpora_config(corpus / "c.yaml", ["output=undisturbed", "num_workers=1"])
    assert prepare(config, corpus).made
    return files_of(config.output)


def kill_when(corpus: Path, reached: Callable[[], bool], how: signal.Signals) -> int:
    """Start the preparation, send it a signal once `reached`, and wait for its whole process group to be gone.

    It runs at low priority, so that on a busy machine it does not end before this process looks.
    """
    process = subprocess.Popen(
        ["nice", "-n", "15", sys.executable, "prepare.py", "c.yaml"], cwd=corpus, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        # A shell's background job ignores Ctrl-C, and hands that on to its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(how)
    status = process.wait(100)
    while group_is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not group_is_alive(process.pid), "worker processes outlived their parent"
    return status


def count(folder: Path, pattern: str) -> int:
    return len(list(folder.glob(pattern)))


def group_is_alive(group: int) -> bool:
    states = [
        stat.read_text().rpartition(")")[2].split() for stat in Path("/proc").glob("[0-9]*/stat") if stat.exists()
    ]
    return any(int(fields[2]) == group and fields[0] != "Z" for fields in states)


def test_after_kill_9_in_every_stage_the_same_call_ends_with_the_same_bytes(
    corpus: Path, undisturbed: dict[str, bytes]
) -> None:
    building, output = corpus / "killed.building", corpus / "killed"
    stages = {"scan": "*.npz", "tokens": "*.json", "store": "d*/*.arrow"}
    kept: dict[str, int] = {}
    for stage, pattern in stages.items():
        assert (
            kill_when(corpus, lambda s=stage, p=pattern: len(list((building / s).glob(p))) >= 2, signal.SIGKILL) == -9
        )
        assert not output.exists()
        kept[stage] = len(list((building / stage).glob(pattern)))
    assert count(building / "tokens", "*.json") == count(building / "scan", "*.npz"), "by then all is tokenised"
    assert min(kept.values()) >= 2
    config = load_corpora_config(corpus / "c.yaml")
    assert prepare(config, corpus).made
    assert files_of(output) == undisturbed
    assert not building.exists()
    assert not prepare(config, corpus).made


def test_ctrl_c_ends_at_once_and_can_be_continued(corpus: Path, undisturbed: dict[str, bytes]) -> None:
    tree = yaml.safe_load((corpus / "c.yaml").read_text())
    (corpus / "c.yaml").write_text(yaml.safe_dump({**tree, "output": "stopped"}))
    building = corpus / "stopped.building"
    assert kill_when(corpus, lambda: count(building / "scan", "*.npz") >= 1, signal.SIGINT) != 0
    assert not (corpus / "stopped").exists()
    assert prepare(load_corpora_config(corpus / "c.yaml"), corpus).made
    assert files_of(corpus / "stopped") == undisturbed


# --- a full disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_on_a_full_disk_there_is_one_clear_error_no_store_and_it_can_be_continued(
    corpus: Path, undisturbed: dict[str, bytes], small_disk: Path
) -> None:
    config = load_corpora_config(corpus / "c.yaml", [f"output={small_disk}/s", "num_workers=1"])
    with pytest.raises(Resumable, match=r"no space left on device \([\d,]+ bytes are free there\); free some and run"):
        prepare(config, corpus)
    assert not (small_disk / "s").exists()
    assert not list(small_disk.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert prepare(config, corpus).made
    assert files_of(small_disk / "s") == undisturbed


@pytest.mark.parametrize("limit", [200, 3_000, 20_000, 90_000])
def test_a_file_that_may_not_grow_is_one_clear_error_in_any_stage(corpus: Path, tmp_path: Path, limit: int) -> None:
    config = load_corpora_config(corpus / "c.yaml", [f"output={tmp_path}/s", "num_workers=1"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(Resumable, match="file too large"):
            prepare(config, corpus)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "s").exists()
    assert not list(tmp_path.rglob("*.part"))


def test_an_output_that_may_not_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"s.building.*: cannot be written: Not a directory"):
        prepare(corpora_config(tmp_path / "file" / "s", two_domains(tmp_path)), tmp_path)


# --- two at a time, and what was there before ------------------------------------------------------------------


def test_a_second_preparation_of_the_same_output_is_refused(tmp_path: Path) -> None:
    config = corpora_config(tmp_path / "s", two_domains(tmp_path))
    with exclusive(tmp_path / "s.building"), pytest.raises(DataError, match="another process is at work here"):
        prepare(config, tmp_path)
    assert prepare(config, tmp_path).made


@pytest.mark.usefixtures("no_file_locks")
def test_a_file_system_without_locks_is_told_of_and_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with exclusive(tmp_path / "s.building"):
        assert "s.building: no file locks here (Function not implemented)" in caplog.text


def test_leftovers_of_other_input_are_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domains = two_domains(tmp_path)
    stop_before(monkeypatch, "write_rows", corpora_config(tmp_path / "s", domains), tmp_path)
    assert len(list((tmp_path / "s.building" / "tokens").glob("*.bin"))) == 2
    write_jsonl(tmp_path / "a.jsonl", sentences(5, 60))
    config = corpora_config(tmp_path / "s", domains)
    assert prepare(config, tmp_path).made
    fresh = corpora_config(tmp_path / "fresh", domains)
    assert prepare(fresh, tmp_path).made
    assert files_of(config.output) == files_of(fresh.output)


def test_a_kill_between_the_two_last_renames_loses_neither_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domains = two_domains(tmp_path)
    config = corpora_config(tmp_path / "s", domains)
    assert prepare(config, tmp_path).made
    write_jsonl(tmp_path / "a.jsonl", sentences(5, 60))
    stop_before(monkeypatch, "describe", config, tmp_path, replace=True)
    assert TokenStore.open(config.output).num_rows("a") > 0, "the old store stays until the new one is complete"
    config.output.rename(tmp_path / "s.building" / "replaced")  # what the first of the two does
    assert prepare(config, tmp_path, replace=True).made
    assert TokenStore.open(config.output).num_rows("a") > 0
    assert not (tmp_path / "s.building").exists()


def stop_before(
    monkeypatch: pytest.MonkeyPatch, stage: str, config: CorporaConfig, base: Path, replace: bool = False
) -> None:
    """Prepare up to `stage`, as if killed there."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Build, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, base, replace=replace)


@pytest.mark.parametrize("texts", [sentences(5, 60), sentences(1, 59), []], ids=["other", "fewer", "none"])
def test_a_source_that_changes_between_the_passes_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    config = corpora_config(tmp_path / "s", two_domains(tmp_path))
    make_tokenizer = Build.make_tokenizer

    def make_it_and_change_the_source(build: Build) -> None:
        make_tokenizer(build)
        write_jsonl(tmp_path / "a.jsonl", texts)

    with monkeypatch.context() as patched:
        patched.setattr(Build, "make_tokenizer", make_it_and_change_the_source)
        with pytest.raises(DataError, match=r"a.jsonl .*changed while the store was being made; run the same"):
            prepare(config, tmp_path)
    two_domains(tmp_path)
    assert prepare(config, tmp_path).made


# --- storage that fails for a while ----------------------------------------------------------------------------

UNREADABLE = Path("/proc/self/mem")
"""A regular file whose first byte nobody may read: a real EIO."""


def test_a_read_error_in_the_second_pass_costs_nothing_that_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("\n".join(sentences(i, 40)))
    domains = {name: {"paths": [str(tmp_path / f"[{files}].txt")]} for name, files in (("a", "012"), ("b", "345"))}
    config = corpora_config(tmp_path / "s", domains, split={"validation": 0, "test": 0})
    source, building = tmp_path / "4.txt", tmp_path / "s.building"
    make_tokenizer = Build.make_tokenizer

    def make_it_and_lose_a_file(build: Build) -> None:
        make_tokenizer(build)
        source.rename(tmp_path / "kept")
        source.symlink_to(UNREADABLE)

    with monkeypatch.context() as patched:
        patched.setattr(Build, "make_tokenizer", make_it_and_lose_a_file)
        with pytest.raises(Resumable, match=r"4.txt: cannot be read: Input/output error; .*: it continues$"):
            prepare(config, tmp_path)
    (tmp_path / "kept").replace(source)
    done = {path: path.stat().st_mtime_ns for path in building.rglob("*") if path.suffix in {".npz", ".bin"}}
    assert {path.suffix for path in done} == {".npz", ".bin"}
    stop_before(monkeypatch, "write_rows", config, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "made again"
    assert prepare(config, tmp_path).made
    fresh = corpora_config(tmp_path / "fresh", domains, split={"validation": 0, "test": 0})
    assert prepare(fresh, tmp_path).made
    assert files_of(config.output) == files_of(fresh.output)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EBUSY, errno.ETIMEDOUT, errno.EROFS])
def test_a_write_that_storage_refuses_for_a_while_can_be_continued(tmp_path: Path, number: int) -> None:
    message = rf"x: cannot be written: {os.strerror(number)}; .* run the same command again: it continues$"
    with pytest.raises(Resumable, match=message), atomic_file(tmp_path / "x"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), OSError("of a library, without a number")])
def test_a_write_that_stays_refused_is_not_to_be_repeated(tmp_path: Path, error: OSError) -> None:
    with pytest.raises(DataError, match=r"x: cannot be written: (no|of a library, without a number)$") as raised:  # noqa: SIM117
        with atomic_file(tmp_path / "x"):
            raise error
    assert not isinstance(raised.value, Resumable)


# --- the parts -------------------------------------------------------------------------------------------------


def test_an_atomic_file_is_there_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x"
    with pytest.raises(ZeroDivisionError):  # noqa: SIM117
        with atomic_file(path) as file:
            file.write(b"%d" % (1 // 0))
    assert list(path.parent.iterdir()) == []
    with atomic_file(path, durable=True) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"


def test_workers_give_results_in_order_and_pass_errors_on() -> None:
    with Workers(2) as workers:
        assert list(workers.map(square, range(20))) == [i * i for i in range(20)]
        with pytest.raises(DataError, match="no square of 3"):
            list(workers.map(square_but_three, range(6)))


def test_a_worker_that_is_killed_is_one_clear_error() -> None:
    with Workers(2) as workers, pytest.raises(Resumable, match="a worker process was killed"):
        list(workers.map(kill_myself, [1]))


def test_leaving_by_an_error_does_not_wait_for_the_tasks() -> None:
    begin = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        first_result_then_error()
    assert time.monotonic() - begin < 60


def first_result_then_error() -> None:
    with Workers(2) as workers:
        for _ in workers.map(sleep_long, [0.0, 300.0, 300.0]):
            raise ZeroDivisionError


def square(number: int) -> int:
    return number * number


def square_but_three(number: int) -> int:
    if number == 3:
        raise DataError("no square of 3")
    return number * number


def kill_myself(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_long(seconds: float) -> int:
    time.sleep(seconds)
    return 0
