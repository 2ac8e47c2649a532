"""The whole job with `feed: actor`: the digests of `feed: local`, also when the actor is killed."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.data_mixing.clusters import head_node
from tests.pretrain.jobs import digests, finish, run_job, start_job, wait_for_step, write_config
from tests.pretrain.tiny import tiny_tree

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_job_that_is_fed_by_actors_reads_what_a_local_one_reads_through_a_kill(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    for folder in (near, far):
        folder.mkdir()
    sizes = {"training__num_steps": 60, "checkpoint__every": 30}
    run_job(write_config(near, tiny_tree(near, tiny_store, **sizes)))
    with head_node(tmp_path) as head:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_path))
        fed = tiny_tree(far, tiny_store, **sizes, mixing__feed="actor", mixing__address=head.address)
        job = start_job(write_config(far, fed), num_ranks=2)
        wait_for_step(far / "tiny", 5, job)
        log = next((far / "tiny" / "logs").glob("feed-*.log")).read_text()
        pid = re.search(r"actor process ([0-9]+)", log)
        assert pid is not None
        os.kill(int(pid[1]), signal.SIGKILL)
        code, output = finish(job)
    assert code == 0, output[-3000:]
    assert "going on with" not in output
    assert digests(far / "tiny") == digests(near / "tiny")
    assert len(digests(far / "tiny")) == 60


def test_without_a_cluster_the_job_ends_with_code_3_and_one_line(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, output = finish(start_job(write_config(tmp_path, tiny_tree(tmp_path, tiny_store, mixing__feed="actor"))))
    assert code == 3, output[-3000:]
    assert "error: mixing.feed: actor needs a Ray cluster: set mixing.address or RAY_ADDRESS" in output
    assert "Traceback" not in output
