"""The ensemble study on a tiny scale: what is run, what is chosen where, and that its tables say what was found.

Runs are performed in this process, by a few steps of plain torch, instead of as training processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mixwright.data_mixing.errors import ConfigError
from mixwright.data_mixing.store import TokenStore
from mixwright.launch.ensemble_findings import Findings, find
from mixwright.launch.ensemble_report import write_evidence
from mixwright.launch.ensemble_study import EnsembleStudy, EnsembleStudyConfig
from mixwright.launch.ensemble_widths import write_widths
from mixwright.launch.training_runs import RunResult
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.ensemble.config import load_ensemble_config
from tests.pretrain.members import write_member
from tests.pretrain.tiny import tiny_tree

STUDY: dict[str, Any] = {
    "ensemble": "ensemble.yaml", "corpora": "unused.yaml", "fallback_corpora": "unused.yaml", "seeds": [1, 2],
    "num_members": 4, "num_teachers": 2, "width_key": "hidden_size",
    "standard": {"lr": 3e-3, "weight_decay": 0.1, "epochs": [0.1, 0.2]},
    "students": {
        "real_epochs": 0.1, "lr": 3e-3, "share": 0.5, "num_rows": 8, "logits": {"share": 0.9, "top_k": 4},
        "arms": {
            "control": {"weight_decay": [0.1, 0.8]},
            "both": {"teachers": "ensemble", "learns": ["samples", "logits"], "weight_decay": [0.1]},
            "self": {"teachers": "single", "learns": ["samples"], "weight_decay": [0.1]},
        },
    },
}  # fmt: skip


class InProcess:
    """Performs runs by a few steps of plain torch; remembers which were asked for. More decay is better here."""

    def __init__(self, store: TokenStore) -> None:
        self._store, self.asked = store, []  # type: ignore[var-annotated]

    def __call__(self, runs: Sequence[PretrainConfig]) -> list[RunResult]:
        self.asked += [run for run in runs if not (run.run_dir / "export").exists()]
        return [self._perform(run) for run in runs]

    def _perform(self, run: PretrainConfig) -> RunResult:
        folder = run.run_dir / "export"
        steps = 2 + round(8 * run.optimizer.weight_decay)
        if not folder.exists():
            size = {key: value for key, value in (run.model.config or {}).items() if key == "hidden_size"}
            write_member(folder, self._store, run.run.seed, num_steps=steps, **size)
        return RunResult(folder=run.run_dir, validation=5 - run.optimizer.weight_decay, test=math.nan, seconds=1.0)


@pytest.fixture(scope="module")
def performed(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EnsembleStudy, InProcess]:
    folder = tmp_path_factory.mktemp("study")
    (folder / "run.yaml").write_text(yaml.safe_dump(tiny_tree(folder / "unused", tiny_store)))
    ensemble = {
        "run": "run.yaml", "folder": str(folder / "out"), "recipe": {"lr": 3e-3, "weight_decay": 0.8, "epochs": 0.1},
        "tune": {"lr": [3e-3], "weight_decay": [0.1, 0.8], "epochs": [0.1], "seeds": [1]},
    }  # fmt: skip
    (folder / "ensemble.yaml").write_text(yaml.safe_dump(ensemble))
    config = EnsembleStudyConfig.model_validate(STUDY)
    study = EnsembleStudy(config, *load_ensemble_config(folder / "ensemble.yaml"), lambda text: None)
    perform = InProcess(TokenStore.open(tiny_store))
    study.perform(perform, study.choose([]))
    return study, perform


@pytest.fixture(scope="module")
def findings(performed: tuple[EnsembleStudy, InProcess]) -> Findings:
    return find(performed[0])


def test_what_is_chosen_is_chosen_on_validation_and_run_with_every_seed(
    performed: tuple[EnsembleStudy, InProcess],
) -> None:
    study, _ = performed
    assert study.found.tuning is not None
    assert study.found.tuning.best.recipe.weight_decay == 0.8
    assert list(study.found.tuned) == [1, 2]
    assert study.found.best_decay("control") == 0.8
    assert list(study.found.students["control"][0.8]) == [1, 2]
    assert list(study.found.students["control"][0.1]) == [1]
    assert [len(members) for members in study.found.members.values()] == [4, 4]


def test_all_students_have_the_same_number_of_steps_and_learn_what_their_arm_says(
    performed: tuple[EnsembleStudy, InProcess],
) -> None:
    study, perform = performed
    runs = {run.run.name: run for run in perform.asked}
    both, own = runs["both-0.1-seed1"], runs["self-0.1-seed2"]
    control = study._student("control", 0.8, 1)
    assert both.training.num_steps == own.training.num_steps == control.training.num_steps
    assert both.distillation is not None
    assert [path.name for path in both.distillation.teachers] == ["member-0", "member-1"]
    assert own.distillation is None
    assert control.distillation is None
    assert both.mixing.policy["mixture"]["synthetic"] == 0.5
    assert both.data.store != own.data.store
    assert control.data.store == study.base.data.store


def test_nothing_is_run_twice(performed: tuple[EnsembleStudy, InProcess]) -> None:
    study, perform = performed
    folders = [run.run_dir for run in perform.asked]
    assert len(folders) == len(set(folders))
    before = len(perform.asked)
    study.perform(perform, study.choose([]))
    assert len(perform.asked) == before


def test_shares_kept_and_differences_are_those_of_the_rows(findings: Findings) -> None:
    assert findings.tuned is not None
    both, tuned = findings.students["both"], findings.tuned
    single = np.mean([rows.mean() for rows in tuned.plain.values()])
    student = np.mean([rows.mean() for rows in both.plain.values()])
    teachers = findings.teacher_rows(fitted=False).mean()
    assert findings.kept("both", fitted=False) == pytest.approx((single - student) / (single - teachers))
    gain, error = both.below(tuned, fitted=False)
    differences = [tuned.plain[seed].mean() - both.plain[seed].mean() for seed in (1, 2)]
    assert gain == pytest.approx(np.mean(differences))
    assert error == pytest.approx(np.std(differences, ddof=1) / math.sqrt(2))


def test_the_page_holds_every_model_every_size_and_every_verdict(findings: Findings, tmp_path: Path) -> None:
    page, picture = write_evidence(findings, tmp_path)
    text = page.read_text()
    for name in ("standard, 0.1 epochs", "tuned, 0.1 epochs", "| control", "| both", "| self"):
        assert name in text
    assert text.count("| rule |") == 4 + 1
    assert text.count("| tuned |") == 4 + 1
    assert f"{findings.ensembles['rule'].curve(fitted=False)[-1].loss:.4f}" in text
    for verdict in ("tuned decay below the default", "K <= 3 predict K = 4", "no subset loses more", "keeps "):
        assert verdict in text
    assert "nan" not in text
    assert picture.stat().st_size > 20_000


def test_unknown_students_are_refused_with_the_nearest(performed: tuple[EnsembleStudy, InProcess]) -> None:
    with pytest.raises(ConfigError, match="no students 'bth'; did you mean 'both'"):
        performed[0].choose(["bth"])


def test_other_widths_are_tuned_for_themselves_and_end_in_a_law_over_parameters(
    performed: tuple[EnsembleStudy, InProcess], findings: Findings, tmp_path: Path
) -> None:
    study, perform = performed
    wider = [study.at_width(width) for width in (16, 64)]
    assert [one.base.model.config["hidden_size"] for one in wider if one.base.model.config] == [16, 64]
    assert len({one.folder for one in (study, *wider)}) == 3
    for one in wider:
        one.perform_ensemble(perform)
    page, picture = write_widths([findings, *map(find, wider)], tmp_path)
    assert page.read_text().count("(K = 4)") == 3
    assert "E over parameters N" not in page.read_text() or "too few to trust" in page.read_text()
    assert picture.stat().st_size > 20_000
