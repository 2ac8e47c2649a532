"""`mix simulate`: a table of regrets, JSON, and errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mixwright.data_mixing.errors import ConfigError, PolicyRejected
from mixwright.launch.simulate import simulate

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    path = tmp_path / "short.yaml"
    path.write_text("law: linear\nnum_steps: 300\ndrift: 0.5\n")
    return path


def run(*arguments: str | Path) -> str:
    app = typer.Typer()
    app.command()(simulate)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_policy_has_a_line_beside_stratified(world: Path) -> None:
    policies = [CONFIGS / "policies" / f"{name}.yaml" for name in ("aioli", "odm", "unimax")]
    text = run(*policies, "--world", world, "--seeds", "2")
    assert text.startswith("short: linear law, 3 domains, 300 steps, 2 seeds")
    names = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert names == ["stratified", "aioli", "odm", "unimax"]
    assert "rounds in" in text


def test_garbage_is_shown_where_there_is_some(world: Path) -> None:
    world.write_text("num_domains: 4\nnum_steps: 300\ngarbage: 1\n")
    assert "25.0%" in run(CONFIGS / "policies" / "unimax.yaml", "--world", world, "--seeds", "2")


def test_json_has_the_same_numbers(world: Path) -> None:
    found = json.loads(run(CONFIGS / "policies" / "odm.yaml", "--world", world, "--seeds", "3", "--json"))
    assert found["world"] == "short"
    assert [row["policy"] for row in found["policies"]] == ["stratified", "odm"]
    assert found["policies"][0]["num_seeds"] == 3
    assert 0 <= found["best_fixed"] < found["policies"][0]["regret"]


def test_two_policies_of_one_name_are_told_apart(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "odm.yaml"
    other.write_text("kind: odm\nround_steps: 50\n")
    found = json.loads(run(CONFIGS / "policies" / "odm.yaml", other, "--world", world, "--seeds", "1", "--json"))
    assert [row["policy"] for row in found["policies"]] == ["stratified", "odm", str(other)]


def test_mistakes_are_one_line_that_names_the_file_and_the_key(world: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("kind: aioli\nround_steps: 10\n")
    with pytest.raises(PolicyRejected, match=r"^round_steps: 10 steps cannot hold a sweep .*$"):
        run(policy, "--world", world)
    world.write_text("num_domain: 3\n")
    with pytest.raises(ConfigError, match=r"short\.yaml: num_domain: unknown key; did you mean 'num_domains'\?$"):
        run(policy, "--world", world)
    with pytest.raises(ConfigError, match="no such file"):
        run(policy, "--world", tmp_path / "shorter.yaml")
