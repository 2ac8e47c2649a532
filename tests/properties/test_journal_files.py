"""The journal on disk: two writers in any order, and damage of any kind to any entry."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixwright.data_mixing import journal as journal_module
from mixwright.data_mixing.entries import Lease
from mixwright.data_mixing.entry_file import entry_path
from mixwright.data_mixing.errors import JournalConflict, JournalError, PlanMismatch
from mixwright.data_mixing.journal import Journal, read_entries, verify
from mixwright.data_mixing.snapshot import resume
from tests.data_mixing.journal_cases import begun, report
from tests.properties.effort import effort
from tests.properties.random_runs import make_log


@contextmanager
def interrupted(act: object, times: list[bool]) -> Iterator[None]:
    """While this lasts, `act` happens between the moment when a writer has read everything and that of its write."""
    create = journal_module._create

    def create_late(path: Path, raw: bytes) -> bool:
        if times and times.pop():
            act()  # type: ignore[operator]
        return create(path, raw)

    journal_module._create = create_late
    try:
        yield
    finally:
        journal_module._create = create


@given(st.data())
@effort(40)
def test_two_writers_in_any_order_keep_one_valid_chain(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("journal") / "journal"
    begun(folder)
    writers = [Journal(folder, "a"), Journal(folder, "b")]
    written: dict[str, list[int]] = {"a": [], "b": []}

    def append(which: int) -> None:
        step = sum(map(len, written.values()))
        written["ab"[which]].append(writers[which].append(report(step)).lsn)

    for which in data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=8)):
        with interrupted(lambda which=which: append(1 - which), data.draw(st.lists(st.booleans(), max_size=2))):
            match data.draw(st.integers(0, 3)):
                case 0:
                    writers[which].poll()
                case 1:
                    behind = data.draw(st.integers(0, 3))
                    entry = writers[which].append_after(behind, report(behind))
                    if entry is not None:
                        assert entry.lsn == behind + 1
                        written["ab"[which]].append(entry.lsn)
                case _:
                    append(which)
    verify(folder)
    entries = read_entries(folder)
    assert sorted([*written["a"], *written["b"]]) == list(range(1, len(entries)))
    for name, numbers in written.items():
        assert [entry.lsn for entry in entries if entry.writer == name] == sorted(numbers)
    assert not list(folder.glob(".*.tmp"))


@given(st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=8))
@effort(20)
def test_of_two_holders_of_a_role_only_the_newest_writes(
    tmp_path_factory: pytest.TempPathFactory, takers: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("journal") / "journal"
    begun(folder)
    writers = {name: Journal(folder, name) for name in "ab"}
    for taker in takers:
        lease = writers[taker].acquire("controller")
        writers[taker].append(report(1))
        other = "b" if taker == "a" else "a"
        if other in takers[: lease.epoch]:
            with pytest.raises(JournalConflict):
                writers[other].append(report(2))
    leases = [entry.body for entry in read_entries(folder) if isinstance(entry.body, Lease)]
    assert [lease.epoch for lease in leases] == list(range(len(takers)))
    assert [lease.holder for lease in leases] == takers


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal with entries of most types; every test that damages it repairs it."""
    folder = tmp_path_factory.mktemp("sound") / "journal"
    folder.mkdir()
    for lsn, raw in enumerate(make_log(random.Random(11), max_changes=14).raw):
        entry_path(folder, lsn).write_bytes(raw)
    verify(folder)
    return folder


def test_damage_of_any_kind_to_any_entry_is_found(sound: Path) -> None:
    originals = {path: path.read_bytes() for path in sorted(sound.iterdir())}

    @given(st.data())
    @effort(250)
    def check(data: st.DataObject) -> None:
        damage(data, sorted(originals), originals)
        try:
            with pytest.raises((JournalError, PlanMismatch)) as told:
                verify(sound)
            assert str(sound) in str(told.value)
        finally:
            for path, raw in originals.items():
                path.write_bytes(raw)

    check()
    assert verify(sound).last_lsn == len(originals) - 1
    resume(sound, "reader")


def damage(data: st.DataObject, paths: list[Path], originals: dict[Path, bytes]) -> None:
    """One thing that a disk, a copy or a hand may do. A journal without its newest entries is a shorter journal."""
    place = data.draw(st.integers(0, len(paths) - 1))
    path, raw = paths[place], originals[paths[place]]
    match data.draw(st.integers(0, 5)):
        case 0:
            byte, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
            path.write_bytes(raw[:byte] + bytes([raw[byte] ^ (1 << bit)]) + raw[byte + 1 :])
        case 1:
            path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        case 2:
            path.write_bytes(raw + data.draw(st.binary(min_size=1, max_size=5)))
        case 3:
            other = paths[(place + data.draw(st.integers(1, len(paths) - 1))) % len(paths)]
            path.write_bytes(originals[other])
        case 4:
            start = data.draw(st.integers(0, len(raw) - 1))
            path.write_bytes(raw[:start] + bytes(len(raw) - start))
        case 5:
            paths[min(place, len(paths) - 2)].unlink()
