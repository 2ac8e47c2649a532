"""The study of overoptimisation, small: performed through its command, resumed, reported; and its figures by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mixwright.data_mixing.errors import ConfigError
from mixwright.launch.overoptimisation_findings import (
    Arm,
    Estimate,
    bandit_verdicts,
    difference,
    drop,
    gold_verdicts,
    held_out_stop,
    last,
    peak,
    reward_at,
)
from mixwright.launch.overoptimisation_study import OveroptimisationConfig
from mixwright.launch.study import app
from mixwright.pretrain.rpo.config import ObjectiveConfig
from mixwright.pretrain.rpo.trial import CurvePoint, TrialRecord

SHIPPED = Path(__file__).parents[2] / "configs" / "studies" / "overoptimisation.yaml"
MODEL = {
    "model_type": "gpt2", "n_positions": 256, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 16,
    "initializer_range": 0.2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
ARMS = {
    "eta-0": {"beta": 0.1, "sft": {"regulariser": "cumulative", "eta": 0}},
    "eta-0.2": {"beta": 0.1, "sft": {"regulariser": "cumulative", "eta": 0.2}},
    "beta-1": {"beta": 1.0},
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    sums = [(a, b) for a in range(8) for b in range(4)]
    pairs = [
        {"prompt": f"What is {a} + {b}?\n", "chosen": f"A: {a + b}", "rejected": f"A: {a + b + 1}"} for a, b in sums
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    bandit = {"num_prompts": 4, "num_actions": 5, "num_covered": 2, "num_pairs": 40, "num_steps": 20, "num_points": 4}
    gold = {
        "model": {"config": MODEL}, "validity": 1.0,
        "reference": {"num_steps": 60, "responses_per_step": 64, "lr": 0.02},
        "num_prompts": 1, "num_pairs": 16, "pairs_per_step": 8, "num_steps": 4, "num_points": 3, "num_samples": 32,
    }  # fmt: skip
    text = {
        "pairs": "pairs.jsonl", "vocab_size": 300, "model": {"config": MODEL}, "max_tokens": 128, "held_out_prompts": 8,
        "reference": {"num_steps": 4}, "pairs_per_step": 4, "num_steps": 3, "num_points": 2, "num_samples": 2,
        "max_new_tokens": 4,
    }  # fmt: skip
    tree = {
        "folder": "work",
        "bandit": {"world": bandit, "seeds": [1, 2], "arms": ARMS},
        "gold": {"world": gold, "seeds": [1, 2], "arms": ARMS},
        "text": {"world": text, "seeds": [1], "arms": {"eta-0": ARMS["eta-0"]}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def run_study(folder: Path, *arguments: str) -> Any:
    config, evidence = str(folder / "study.yaml"), str(folder / "docs")
    command = ["overoptimisation", "--config", config, "--evidence", evidence, "--workers", "0", *arguments]
    return CliRunner().invoke(app, command)


def test_every_arm_is_trained_with_every_seed_and_nothing_twice(study: Path) -> None:
    done = run_study(study)
    assert done.exit_code == 0, done.output
    assert done.output.count("min  ") == 2 * 3 + 2 * 3 + 1
    records = sorted((study / "work" / "trials").glob("*.json"))
    assert len(records) == 13
    assert len(list((study / "work" / "references").glob("reference-*.safetensors"))) == 2
    page = (study / "docs" / "overoptimisation_study.md").read_text()
    assert (study / "docs" / "overoptimisation_study.png").stat().st_size > 20_000
    for part, seeds in (("The bandit", "2"), ("The language with a gold reward", "2"), ("A preference file", "1")):
        table = page.split(f"## {part}")[1].split("\n## ")[0]
        rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in table.splitlines() if "|" in line}
        assert rows["eta-0"] == seeds
    assert page.count(": holds: ") + page.count(": DOES NOT HOLD: ") == 2 + 8
    assert " nan" not in page.split("## What was expected")[0]
    before = {path: path.stat().st_mtime_ns for path in records}
    again = run_study(study)
    assert "min  " not in again.output
    assert {path: path.stat().st_mtime_ns for path in records} == before
    assert (study / "docs" / "overoptimisation_study.md").read_text() == page
    records[0].unlink()
    assert run_study(study).output.count("min  ") == 1


def test_a_part_of_the_arms_without_the_preference_file(study: Path) -> None:
    (study / "pairs.jsonl").unlink()
    done = run_study(study, "--arms", "eta-0.2,beta-1", "--seeds", "1")
    assert done.exit_code == 0, done.output
    assert "pairs.jsonl is not here: the part on a preference file is left out" in done.output
    assert len(list((study / "work" / "trials").glob("*.json"))) == 4
    page = (study / "docs" / "overoptimisation_study.md").read_text()
    assert "mathematics\n" not in page
    assert "eta-0 |" not in page
    assert "with eta" not in page  # one arm has no order


def test_out_of_time_leaves_a_table_of_what_there_is(study: Path) -> None:
    done = run_study(study, "--budget-minutes", "0")
    assert done.exit_code == 0, done.output
    page = (study / "docs" / "overoptimisation_study.md").read_text()
    assert page.count("not run") == 7


def test_wrong_names_are_one_line(study: Path) -> None:
    failed = run_study(study, "--arms", "eta-0.3")
    assert isinstance(failed.exception, ConfigError)
    assert str(failed.exception) == "the study has no arm 'eta-0.3'; did you mean 'eta-0.2'?"


def test_the_shipped_study_can_be_read() -> None:
    config = OveroptimisationConfig.model_validate(yaml.safe_load(SHIPPED.read_text()))
    etas = [
        arm.sft.eta for arm in config.gold.arms.values() if arm.sft and arm.sft.regulariser and arm.sft.base == "chosen"
    ]
    assert etas == [0, 0.005, 0.05, 0.2, 1]
    assert len(config.gold.seeds) == len(config.bandit.seeds) == 5


def record(rewards: list[float], kl: list[float], **more: list[float]) -> TrialRecord:
    curves = {"reward": rewards, "kl": kl, **more}
    points = [
        CurvePoint(step=10**place, figures={name: curve[place] for name, curve in curves.items()})
        for place in range(len(rewards))
    ]
    return TrialRecord(key="x", settings={}, seconds=1.0, points=tuple(points))


def arm(eta: float, *records: TrialRecord) -> Arm:
    objective = ObjectiveConfig.model_validate({"sft": {"regulariser": "cumulative", "eta": eta}})
    return Arm(f"eta-{eta:g}", objective, dict(enumerate(records)))


def test_the_peak_is_chosen_on_one_sample_and_valued_on_the_other() -> None:
    found = record([0.0, 0.5, 0.9, 0.1], [0, 1, 2, 3], selection_reward=[0.0, 0.8, 0.7, 0.2])
    assert peak(found) == 0.5
    assert drop(found) == pytest.approx(0.4)
    assert peak(record([0.0, 0.5, 0.9, 0.1], [0, 1, 2, 3])) == 0.9


def test_reward_at_a_divergence_is_that_of_the_first_crossing() -> None:
    found = record([0.0, 1.0, 2.0, 9.0], [0.0, 2.0, 4.0, 1.0])
    assert reward_at(3.0)(found) == pytest.approx(1.5)
    assert reward_at(1.0)(found) == pytest.approx(0.5)
    assert math.isnan(reward_at(5.0)(found))


def test_stopping_by_held_out_pairs_reads_the_reward_there() -> None:
    assert held_out_stop(record([0.0, 0.7, 0.9], [0, 1, 2], held_out_accuracy=[0.5, 0.8, 0.7])) == 0.7


def test_differences_are_paired_by_seed() -> None:
    first, second = (
        arm(0.2, record([0, 3.0], [0, 1]), record([0, 5.0], [0, 1])),
        arm(0, record([0, 1.0], [0, 1]), record([0, 2.0], [0, 1])),
    )
    found = difference(first, second, last("reward"))
    assert (found.mean, found.error) == (pytest.approx(2.5), pytest.approx(0.5))
    assert math.isnan(Estimate.of([1.0]).error)
    assert Estimate.of([1.0]).text() == "1.000"


def gold_arm(eta: float, final: float, kl: float, top: float = 0.6) -> Arm:
    figures = {"accuracy": [0.5, 0.7, 1.0], "chosen_logp": [-8.0, -8.0, -8.0 + eta]}
    return arm(eta, *(record([0.4, top, final], [0, 1, kl], **figures) for _ in range(2)))


def test_verdicts_follow_the_figures() -> None:
    arms = [gold_arm(0, -0.1, 20), gold_arm(0.005, 0.1, 9), gold_arm(0.2, 0.3, 5)]
    lines = gold_verdicts({one.name: one for one in arms})
    failing = [line for line in lines if line.startswith("DOES NOT HOLD")]
    assert failing == []
    worse = [gold_arm(0, 0.5, 10), gold_arm(0.005, 0.45, 9), gold_arm(0.2, 0.4, 5, top=0.7)]
    failing = [line for line in gold_verdicts({one.name: one for one in worse}) if line.startswith("DOES NOT HOLD")]
    assert [line.split(": ")[1].split(",")[0][:24] for line in failing] == [
        "DPO ends below the refer", "final gold reward rises ", "DPO's drop from peak to ", "DPO's final divergence",
        "DPO's peak is within 0.0",
    ]  # fmt: skip
    assert "not from 0 to 0.005, 0.005 to 0.2" in failing[1]


def test_verdicts_on_the_bandit_follow_the_figures() -> None:
    def one(eta: float, final: float, uncovered: float) -> Arm:
        return arm(eta, record([0, final], [0, 1], uncovered=[0.7, uncovered], chosen_logp=[-3.0, -3.0 + eta]))

    lines = bandit_verdicts({str(a.eta): a for a in (one(0, 1.3, 0.4), one(0.05, 1.7, 0.1), one(1, 1.4, 0.2))})
    assert [line.split(":")[0] for line in lines] == ["holds", "DOES NOT HOLD", "holds"]
