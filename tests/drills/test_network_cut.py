"""The network between the trainer and Ray's head is cut: two namespaces, a Ray node in each, one shared folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.drills.drill_run import DrillRun
from tests.drills.drill_service import STEP_S, Service, Submission, end_with_both, longest_step_s, slow_run
from tests.drills.namespaces import Network, two_namespaces
from tests.drills.undisturbed import References

pytestmark = [pytest.mark.drill, pytest.mark.ray, pytest.mark.long]

LETTERS = {"kind": "static", "mixture": {"letters": 1, "numbers": 1}}
COLOURS = {"kind": "static", "mixture": {"colours": 1}}
RAY_GIVES_UP_S = 60.0
"""A node that its head has not heard of for this long is out of the cluster, and its processes end."""


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with two_namespaces(tmp_path) as network:
        yield network


@pytest.mark.parametrize("cut_s", [10, 100])
def test_the_network_to_rays_head_is_cut(
    make_run: Callable[..., DrillRun],
    serve: Callable[..., Service],
    references: References,
    network: Network,
    cut_s: int,
) -> None:
    """The cable between the trainer, with the service's host beside it, and the head of their Ray cluster is out for
    10 s, and for 100 s, after which Ray has ended the node at the trainer's end. The controller is at either end.

    Promised: training goes on at its pace. After a short cut nothing is to be done; after a long one, with a node
    started again as its cluster's operator does, `mix up` is all it takes. Policies count once.
    """
    run = slow_run(make_run)
    step_s = max(STEP_S, cut_s / 60)
    with network.trainer.entered():
        job = run.start(step_s=step_s)
        service = serve(run, job, address=network.address, **network.environment)
        first = Submission(run.run_dir, LETTERS)
    first.wait(60)
    began = run.last_step() + 1
    network.trainer.cut()
    assert not network.is_whole()
    time.sleep(cut_s)
    assert run.last_step() - began > 0.5 * cut_s / (step_s + 0.2)
    network.trainer.connect()
    with network.trainer.entered():
        if cut_s > RAY_GIVES_UP_S:
            network.start_node()
            service.up(address=network.address, **network.environment)
        second = Submission(run.run_dir, COLOURS)
    second.wait(90)
    end_with_both(run, job, service, references, (first, second))
    assert longest_step_s(run, began, run.num_steps) < step_s + 4
