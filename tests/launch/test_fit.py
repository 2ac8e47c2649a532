"""`mix fit`, as a user types it, and proxy runs as Ray tasks."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixwright.data_mixing.policy import parse
from mixwright.launch.ray_tasks import quietly
from mixwright.pretrain.errors import NonFiniteLoss
from mixwright.pretrain.sweeps.perform import perform
from tests.pretrain.proxies import DOMAINS, proxy_run, proxy_tree

ROOT = Path(__file__).resolve().parents[2]
COMMAND = """
import sys, typer
from mixwright.data_mixing.errors import MixingError
from mixwright.launch.fit import fit
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(fit)
try:
    app()
except MixingError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def tree(tiny_store: Path) -> dict[str, Any]:
    """A fit's configuration as YAML would hold it."""
    return {"store": str(tiny_store), "records": "records", "domains": list(DOMAINS[:2]), "proxy": proxy_tree(3)}


def type_fit(folder: Path, tree: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "fit.yaml").write_text(yaml.safe_dump(tree))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env={**environment, "PYTHONPATH": str(ROOT), "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_runs_are_ray_tasks_and_finished_ones_are_used_again(tmp_path: Path, tree: dict[str, Any]) -> None:
    done = type_fit(tmp_path, tree, "skill_it", "fit.yaml", "--out", "graph.yaml", "--workers", "2")
    assert done.returncode == 0, done.stderr
    graph = yaml.safe_load((tmp_path / "graph.yaml").read_text())
    parse(graph)
    assert list(graph["graph"]) == ["letters", "numbers"]
    assert "run 2 of 2" in done.stderr
    assert len(list((tmp_path / "records").glob("*.json"))) == 2
    assert list((tmp_path / "records").glob(".*")) == []
    # Without Ray the same runs give the same policy; they are read, not run.
    again = type_fit(tmp_path, tree, "skill_it", "fit.yaml", "--workers", "0")
    assert again.returncode == 0, again.stderr
    assert yaml.safe_load(again.stdout) == graph
    assert "run 1 of" not in again.stderr


def test_a_run_that_fails_in_a_worker_is_raised_here_in_one_line(tiny_store: Path, tmp_path: Path) -> None:
    wild = proxy_run(tiny_store).config.model_dump() | {"optimizer": {"lr": 1e30}}
    sent = quietly(partial(perform, folder=tmp_path), proxy_run(tiny_store, config=wild))
    arrived = pickle.loads(pickle.dumps(sent))
    assert isinstance(arrived, NonFiniteLoss)
    assert str(arrived).startswith("proxy run, step")


def test_a_document_goes_to_standard_output_and_the_rest_to_standard_error(
    tmp_path: Path, tree: dict[str, Any]
) -> None:
    tree["target"] = {"letters": 1}
    done = type_fit(tmp_path, tree, "mixing_law", "fit.yaml", "--workers", "0")
    assert done.returncode == 0, done.stderr
    mixture = yaml.safe_load(done.stdout)["mixture"]
    assert sum(mixture.values()) == pytest.approx(1)
    assert "leave-one-out error" in done.stderr
    assert "6 runs" in done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "records").glob("*.json")]
    assert {tuple(record["run"]["domains"]) for record in records} == {("letters", "numbers")}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"domains": ["leters", "numbers"]}, "doge", "no domain 'leters'; did you mean 'letters'?"),
        ({"domains": ["letters"]}, "doge", "doge: found one domain, 'letters'; there is nothing to mix"),
        ({"store": "nowhere"}, "doge", "nowhere"),
        ({}, "dodge", "no fit of kind 'dodge'; did you mean 'doge'?"),
        ({"target": {"code": 1}}, "doge", "target.code: no such domain; valid names: letters, numbers"),
        ({"target": {"letters": 0}}, "doge", "target: every number is 0"),
        ({"target": {"letters": -1}}, "doge", "target.letters: expected a number >= 0, found -1"),
        ({"proxy": {}}, "doge", "proxy: model: required key is missing"),
        ({"sotre": 3}, "doge", "sotre: unknown key; did you mean 'store'?"),
        ({"options": {"nu": 3}}, "doge", "options of doge: nu: unknown key; valid names: mu, validation_part"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, tree: dict[str, Any], change: dict[str, Any], kind: str, message: str
) -> None:
    from mixwright.data_mixing.errors import MixingError
    from mixwright.launch.fit import fit

    (tmp_path / "fit.yaml").write_text(yaml.safe_dump({**tree, **change}))
    with pytest.raises(MixingError) as caught:
        fit(kind, tmp_path / "fit.yaml", workers=0)
    assert message in str(caught.value)
    assert not (tmp_path / "records").exists()
