"""The mixing study, small: it compares, resumes, keeps to its time, and hides nothing."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mixwright.data_mixing.errors import ConfigError
from mixwright.launch.mixing_study import load_study
from mixwright.launch.proxy_tasks import executor
from mixwright.launch.ray_tasks import OutOfTime
from mixwright.launch.study import app
from mixwright.pretrain.proxy import LossPoint, ProxyRecord
from mixwright.pretrain.sweeps.comparison import compare
from tests.launch.study_cases import write_study
from tests.pretrain.proxies import DOMAINS, proxy_run


@pytest.fixture
def study(tmp_path: Path) -> Path:
    write_study(tmp_path)
    return tmp_path


def run_study(folder: Path, *arguments: str) -> Any:
    return CliRunner().invoke(
        app,
        [
            "mixing",
            "--config",
            str(folder / "study.yaml"),
            "--evidence",
            str(folder / "docs"),
            "--workers",
            "0",
            *arguments,
        ],
    )


def test_a_study_compares_every_policy_in_every_setting_and_reads_its_runs_again(study: Path) -> None:
    done = run_study(study)
    assert done.exit_code == 0, done.output
    page = (study / "docs" / "mixing_study.md").read_text()
    assert "## pair: two lists" in page
    assert (study / "docs" / "mixing_study.png").stat().st_size > 10_000
    for setting in ("pair", "waste"):
        lines = page.split(f"## {setting}")[1].split("## ")[0].splitlines()
        rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in lines if "|" in line}
        assert [rows[policy][2] for policy in ("stratified", "odm", "law")] == ["2", "2", "2"]
        assert rows["odm"][7] == "0"
        assert rows["law"][7] == ("6" if setting == "pair" else "8")
    again = run_study(study)
    assert "min " not in again.output
    assert (study / "docs" / "mixing_study.md").read_text() == page


def test_the_mean_is_that_of_the_records_without_garbage(study: Path) -> None:
    assert run_study(study, "--settings", "waste", "--policies", "odm").exit_code == 0
    records = [json.loads(path.read_text()) for path in (study / "work" / "runs").glob("*.json")]
    base = [record for record in records if record["run"]["policy"]["kind"] == "static"]
    mean = sum(math.exp(r["test"]["letters"]) + math.exp(r["test"]["colours"]) for r in base) / 4
    page = (study / "docs" / "mixing_study.md").read_text().split("## waste")[1]
    assert f"| stratified | 2 | {mean:.2f} |" in page


def test_a_study_out_of_time_shows_what_there_is_and_goes_on_later(study: Path) -> None:
    none = run_study(study, "--budget-minutes", "0")
    assert none.exit_code == 0
    assert "time budget is spent" in none.output
    assert "not run" in (study / "docs" / "mixing_study.md").read_text()
    assert "not run" not in run_study(study).output


def test_unknown_names_are_refused_before_anything_is_made(study: Path) -> None:
    failed = run_study(study, "--policies", "odn")
    assert isinstance(failed.exception, ConfigError)
    assert str(failed.exception) == "the study has no policy 'odn'; did you mean 'odm'?"
    assert isinstance(run_study(study, "--settings", "pear").exception, ConfigError)
    assert not (study / "work").exists()


def test_the_shipped_study_can_be_read_and_names_policies_that_exist() -> None:
    config = load_study(Path(__file__).parents[2] / "configs" / "studies" / "mixing.yaml")
    assert set(config.default_policies) <= set(config.policies)
    assert len([s for s in config.settings.values() if not s.garbage]) == 6
    assert config.corpora.is_file()
    assert config.fallback_corpora.is_file()


def test_where_its_texts_are_absent_a_study_takes_the_ones_at_hand(study: Path) -> None:
    tree = yaml.safe_load((study / "study.yaml").read_text())
    corpora = yaml.safe_load((study / "corpora.yaml").read_text())
    corpora["domains"] = {name: {"paths": [f"missing-{name}.jsonl"]} for name in DOMAINS}
    (study / "absent.yaml").write_text(yaml.safe_dump(corpora))
    tree |= {"corpora": "absent.yaml", "row_length": 16, "vocab_size": 300}
    (study / "study.yaml").write_text(yaml.safe_dump(tree))
    assert "no such file" in str(run_study(study).exception)
    tree |= {"fallback_domains": {"letters": "colours", "colours": "letters"}}
    (study / "study.yaml").write_text(yaml.safe_dump(tree))
    done = run_study(study, "--policies", "odm", "--seeds", "1")
    assert done.exit_code == 0, done.output
    page = (study / "docs" / "mixing_study.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## colours-numbers", "## colours-letters-garbage",
    ]  # fmt: skip


def test_after_the_deadline_no_run_is_begun(tiny_store: Path, tmp_path: Path) -> None:
    with (
        executor(tmp_path, 0, lambda *_: None, deadline=time.monotonic() - 1) as execute,
        pytest.raises(OutOfTime, match="finished runs are kept"),
    ):
        execute([proxy_run(tiny_store)])
    assert list(tmp_path.iterdir()) == []


def test_equal_runs_are_performed_once(tiny_store: Path, tmp_path: Path) -> None:
    told: list[int] = []
    with executor(tmp_path, 0, lambda done, total, record: told.append(total)) as execute:
        one, other, third = execute([proxy_run(tiny_store), proxy_run(tiny_store), proxy_run(tiny_store, seed=1)])
    assert told == [2, 2]
    assert one == other
    assert third != one


def test_a_comparison_is_paired_by_seed(tiny_store: Path) -> None:
    def record(seed: int, *losses: float) -> ProxyRecord:
        test = dict(zip(DOMAINS[:2], losses, strict=True))
        point = LossPoint(step=0, loss=test)
        return ProxyRecord(
            key="", run=proxy_run(tiny_store, domains=DOMAINS[:2], seed=seed), num_parameters=1, tokens=1, seconds=1.0,
            validation=(point,), test=test, mixtures=(), decisions=(), rows={"letters": 3, "numbers": 1},
        )  # fmt: skip

    base = {s: record(s, math.log(10 + s), math.log(20 + s)) for s in (0, 1, 2)}
    own = {s: record(s, math.log(11 + s), math.log(20 + s)) for s in (0, 1)}
    result = compare(own, base, DOMAINS[:2])
    assert result is not None
    assert (result.num_seeds, result.mean) == (2, pytest.approx(16.0))
    assert result.difference == pytest.approx(0.5)
    assert result.standard_error == pytest.approx(0.0, abs=1e-12)
    assert result.relative == pytest.approx(0.5 / 15.5)
    assert result.shares == {"letters": 0.75, "numbers": 0.25}
    assert compare({7: record(7, 1.0, 1.0)}, base, DOMAINS[:2]) is None
    alone = compare({0: own[0]}, base, DOMAINS[:1])
    assert alone is not None
    assert math.isnan(alone.standard_error)
    assert alone.difference == pytest.approx(1.0)
