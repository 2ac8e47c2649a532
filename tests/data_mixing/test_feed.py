"""Rows through a node's agent and a Ray actor: a real cluster, real processes, real kills."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mixwright.data_mixing.errors import DataError, ServiceUnavailable
from mixwright.data_mixing.feed import TOKENS_PER_CALL, ServedStore, agent_socket, served_store
from mixwright.data_mixing.loader import NewRun, open_loader
from mixwright.data_mixing.store import TokenStore
from tests.data_mixing.clusters import HeadNode, head_node

pytestmark = pytest.mark.ray

NEW = NewRun(policy={"kind": "temperature", "temperature": 1.0}, rows_per_step=8, num_steps=40, seed=3)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeadNode]:
    with head_node(tmp_path_factory.mktemp("cluster")) as node:
        yield node


@pytest.fixture
def moved(tiny_store: Path, tmp_path: Path) -> Path:
    """A copy of the store that a test may take away."""
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


@pytest.fixture
def served(head: HeadNode, moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedStore]:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_path))
    (tmp_path / "run").mkdir()
    with served_store(tmp_path / "run", moved, head.address, rows_per_ask=8, prefetch_steps=6, timeout_s=20.0) as store:
        yield store


def actor_pid(store: ServedStore) -> int:
    return int(store._gathering.describe()["pid"])


def test_a_served_store_is_the_store(served: ServedStore, tiny_store: Path) -> None:
    near = TokenStore.open(tiny_store)
    assert (served.fingerprint, served.names, served.domains()) == (near.fingerprint, near.names, near.domains())
    files = sorted(path.name for path in near.tokenizer_folder.iterdir())
    assert sorted(path.name for path in served.tokenizer_folder.iterdir()) == files
    chance = np.random.default_rng(0)
    for split in ("train", "validation"):
        domain_n = chance.integers(0, 3, 50)
        row_n = chance.integers(0, 3, 50)
        far = served.gather(domain_n, row_n, split)
        np.testing.assert_array_equal(far, near.gather(domain_n, row_n, split))
        assert far.dtype == near.dtype
    with pytest.raises(DataError, match="there is no row 10000000"):
        served.gather(np.array([0]), np.array([10_000_000]))


def test_kill_9_of_the_actor_changes_no_row(served: ServedStore, tiny_store: Path, tmp_path: Path) -> None:
    with open_loader(tmp_path / "near", TokenStore.open(tiny_store), begin=NEW, micro_batch_rows=8) as loader:
        near = [(step.micro_batches[0].tokens_BS, loader.end_step(), loader.run_digest) for step in loader]
    killed, far = actor_pid(served), []
    with open_loader(tmp_path / "far", served, begin=NEW, micro_batch_rows=8, prefetch_steps=6, lead_steps=9) as loader:
        for step in loader:
            if step.number == 10:
                os.kill(killed, signal.SIGKILL)
            far.append((step.micro_batches[0].tokens_BS, loader.end_step(), loader.run_digest))
    assert actor_pid(served) != killed
    assert served._local is None
    assert [digest for _, _, digest in far] == [digest for _, _, digest in near]
    for (tokens, _, _), (expected, _, _) in zip(far, near, strict=True):
        np.testing.assert_array_equal(tokens, expected)


def test_a_frozen_actor_is_a_named_wait_with_a_limit(
    head: HeadNode, moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_path))
    monkeypatch.setattr("mixwright.data_mixing.feed.STILL_WAITING_S", 1.0)
    (tmp_path / "run").mkdir()
    with served_store(tmp_path / "run", moved, head.address, rows_per_ask=8, prefetch_steps=4, timeout_s=12.0) as store:
        pid = actor_pid(store)  # the limit holds for starting the agent too, which a busy machine does in seconds
        shutil.rmtree(moved)
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        try:
            with (
                caplog.at_level(logging.WARNING),
                pytest.raises(
                    ServiceUnavailable, match=r"gave no answer within 12 s: start the Ray .*mixing.feed: local"
                ),
            ):
                store.gather(np.array([0]), np.array([0]))
        finally:
            os.kill(pid, signal.SIGCONT)
        assert 11.5 < time.monotonic() - began < 20
        assert "still waiting for rows of the feed actor (limit 12 s)" in caplog.text


def test_the_agent_ends_with_its_trainer_and_leaves_no_socket(
    head: HeadNode, moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_path))
    (tmp_path / "run").mkdir()
    with served_store(tmp_path / "run", moved, head.address, rows_per_ask=8, prefetch_steps=4, timeout_s=20.0):
        socket = agent_socket(tmp_path / "run")
        assert socket.exists()
    assert not socket.parent.exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [(None, "set mixing.address or RAY_ADDRESS to HOST:PORT"), ("127.0.0.1:1", "cannot start: no Ray at 127.0.0.1:1")],
)
def test_a_cluster_that_is_not_there_is_one_clear_line(
    moved: Path, tmp_path: Path, address: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "run").mkdir()
    with (
        pytest.raises(ServiceUnavailable, match=message),
        served_store(tmp_path / "run", moved, address, rows_per_ask=8, prefetch_steps=4, timeout_s=20.0),
    ):
        pass


def test_a_store_that_the_actor_cannot_open_is_named(
    head: HeadNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_path))
    (tmp_path / "run").mkdir()
    with (
        pytest.raises(ServiceUnavailable, match=r"cannot start: .*no-store"),
        served_store(
            tmp_path / "run", tmp_path / "no-store", head.address, rows_per_ask=8, prefetch_steps=4, timeout_s=20.0
        ),
    ):
        pass


@pytest.mark.parametrize(
    ("rows", "prefetch", "ask_ahead", "asks_per_call"),
    [(8, 4, 3, 2), (8, 6, 5, 3), (8, 2000, 964, 482), (4096, 4, 2, 1), (100_000, 1, 0, 1)],
)
def test_calls_carry_64k_tokens_two_ahead_as_far_as_prefetching_goes(
    tiny_store: Path, rows: int, prefetch: int, ask_ahead: int, asks_per_call: int
) -> None:
    store = ServedStore(
        tiny_store, None, None, local_folder=tiny_store, rows_per_ask=rows, prefetch_steps=prefetch  # type: ignore[arg-type]
    )  # fmt: skip
    assert (store.ask_ahead, store.asks_per_call) == (ask_ahead, asks_per_call)
    assert prefetch < 964 or asks_per_call * rows * 17 >= TOKENS_PER_CALL


@pytest.mark.slow
@pytest.mark.parametrize("has_rows", [True, False])
def test_a_killed_head_is_one_clear_error_unless_the_rows_are_here(
    moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_rows: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    with head_node(tmp_path) as head:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_path))
        with served_store(
            tmp_path / "run", moved, head.address, rows_per_ask=8, prefetch_steps=4, timeout_s=10.0
        ) as store:
            expected = store.gather(np.array([0, 1]), np.array([1, 0]))
            head.kill()
            if not has_rows:
                shutil.rmtree(moved)
                with pytest.raises(ServiceUnavailable, match=r"the feed a.*: start the Ray cluster again .* local$"):
                    store.gather(np.array([0, 1]), np.array([1, 0]))
                return
            with caplog.at_level(logging.WARNING):
                np.testing.assert_array_equal(store.gather(np.array([0, 1]), np.array([1, 0])), expected)
            assert "going on with" in caplog.text
            np.testing.assert_array_equal(store.ask(np.array([0, 1]), np.array([1, 0]))(), expected)
