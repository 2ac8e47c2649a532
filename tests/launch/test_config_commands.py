from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMMAND = Path(sys.executable).parent / "mixwright"
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def mixwright(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(COMMAND), *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_check_says_ok() -> None:
    done = mixwright("config", "check", QUICKSTART)
    assert (done.returncode, done.stdout) == (0, f"{QUICKSTART}: ok\n")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.num_stps=3", "training.num_stps: unknown key; did you mean 'num_steps'?"),
        ("optimizer.lr=.nan", "optimizer.lr: "),
        (
            "mixing.service=sometimes",
            "mixing.service: input should be 'auto', 'required' or 'none' (found 'sometimes')",
        ),
        ("nonsense", "override 'nonsense': expected key.sub=value"),
    ],
)
def test_check_names_the_mistake_and_ends_with_2(override: str, expected: str) -> None:
    done = mixwright("config", "check", QUICKSTART, override)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_show_prints_every_setting_and_reads_back_as_the_same_run(tmp_path: Path) -> None:
    shown = mixwright("config", "show", QUICKSTART, "optimizer.lr=0.125").stdout
    tree = yaml.safe_load(shown)
    assert tree["optimizer"] == {"lr": 0.125, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    assert tree["checkpoint"]["keep"] == 2
    (tmp_path / "resolved.yaml").write_text(shown)
    again = mixwright("config", "show", str(tmp_path / "resolved.yaml"))
    assert again.stdout == shown


def test_an_unknown_command_ends_with_2() -> None:
    assert mixwright("mixx").returncode == 2
