"""The weighting study, small: it compares, resumes, damages training rows only, and refuses wrong names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mixwright.data_mixing.errors import ConfigError
from mixwright.launch.study import app
from mixwright.launch.weighting_study import WeightingStudyConfig, load_weighting_study
from mixwright.pretrain.proxy import ProxyRecord
from tests.launch.study_cases import write_study


@pytest.fixture
def study(tmp_path: Path) -> Path:
    write_study(tmp_path)
    tree = {
        "study": "study.yaml", "setting": "pair", "validate_every": 2, "seeds": 2,
        "data": {"clean": {}, "noised": {"noised": 0.5}},
        "strategies": {
            "hard": {"strategy": "upper", "r": 0.1, "scope": "step_two_phase"}, "tilted": {"strategy": "tilted"},
        },
    }  # fmt: skip
    (tmp_path / "weighting.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def run_study(folder: Path, *arguments: str) -> Any:
    config, evidence = str(folder / "weighting.yaml"), str(folder / "docs")
    command = ["weighting", "--config", config, "--evidence", evidence, "--workers", "0", *arguments]
    return CliRunner().invoke(app, command)


def records(folder: Path) -> list[ProxyRecord]:
    return [ProxyRecord.model_validate_json(path.read_text()) for path in (folder / "work" / "runs").glob("*.json")]


def test_every_strategy_is_compared_on_all_data_and_runs_are_read_again(study: Path) -> None:
    done = run_study(study)
    assert done.exit_code == 0, done.output
    page = (study / "docs" / "weighting_study.md").read_text()
    assert (study / "docs" / "weighting_study.png").stat().st_size > 10_000
    for data in ("clean", "noised"):
        lines = page.split(f"## {data}")[1].split("## ")[0].splitlines()
        rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in lines if "|" in line}
        assert [rows[name][2] for name in ("uniform", "hard", "tilted")] == ["2", "2", "2"]
        assert float(rows["hard"][6]) < 1 == float(rows["uniform"][6])
    found = records(study)
    assert len(found) == 12
    assert {tuple(point.step for point in record.validation) for record in found} == {(0, 2, 4)}
    again = run_study(study)
    assert "min " not in again.output
    assert (study / "docs" / "weighting_study.md").read_text() == page


def test_steps_to_the_baseline_are_those_of_the_first_validation_that_is_as_good(study: Path) -> None:
    small = load_weighting_study(study / "weighting.yaml", ["hard"], seeds=1)
    assert run_study(study, "--strategies", "hard", "--seeds", "1").exit_code == 0
    by_name = {"hard" if record.run.policy.get("loss_weighting") else "uniform": record for record in records(study)
               if record.run.damage.noised == 0}  # fmt: skip
    for name, record in by_name.items():
        small.records["clean", name][0] = record
    assert small.steps_to_baseline("clean", "uniform") == [4]
    better = by_name["hard"].model_copy(update={"validation": by_name["uniform"].validation[-1:] * 2})
    small.records["clean", "hard"][0] = better
    assert small.steps_to_baseline("clean", "hard") == [4]
    worse = by_name["hard"].model_copy(update={"validation": by_name["uniform"].validation[:1]})
    small.records["clean", "hard"][0] = worse
    assert small.steps_to_baseline("clean", "hard") == [None]


def test_wrong_names_are_one_line(study: Path) -> None:
    failed = run_study(study, "--strategies", "hart")
    assert isinstance(failed.exception, ConfigError)
    assert str(failed.exception) == "the study has no strategy 'hart'; did you mean 'hard'?"
    tree = yaml.safe_load((study / "weighting.yaml").read_text())
    (study / "weighting.yaml").write_text(yaml.safe_dump({**tree, "setting": "pear"}))
    assert "has no setting 'pear'; did you mean 'pair'?" in str(run_study(study).exception)


def test_the_shipped_study_can_be_read() -> None:
    path = Path(__file__).parents[2] / "configs" / "studies" / "weighting.yaml"
    config = WeightingStudyConfig.model_validate(yaml.safe_load(path.read_text()))
    assert json.loads(config.model_dump_json())["data"]["noised"] == {"noised": 0.2, "duplicated": 0.0}
