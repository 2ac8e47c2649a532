"""`mixwright generate`: samples side by side, as text and nothing else."""

from __future__ import annotations

import subprocess

from mixwright.launch.generate import continuations
from mixwright.pretrain.ensemble.member import Member
from tests.pretrain.jobs import BIN


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "mixwright"), "generate", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_members_and_their_ensemble_stand_one_after_the_other(members: list[Member]) -> None:
    paths = [str(member.folder) for member in members]
    done = generate(*paths[:2], "--ensemble", ",".join(paths), "--prompt", "[bold]red", "--tokens", "8", "--num", "2")
    assert done.returncode == 0, done.stderr
    names = [line.strip("─ ") for line in done.stdout.splitlines() if line.startswith("─")]
    assert names == ["member-0", "member-1", "ensemble of 3"]
    assert done.stdout.count("[1] [bold]red") == 3
    assert done.stdout.count("[2] [bold]red") == 3


def test_the_seed_decides_and_temperature_0_needs_none(members: list[Member]) -> None:
    def written(temperature: float, seed: int) -> list[str]:
        return continuations(members[:1], "red", 3, 10, temperature, "logits", seed)

    assert written(1.0, 1) == written(1.0, 1)
    assert written(1.0, 1) != written(1.0, 2)
    assert len(set(written(1.0, 1))) > 1
    assert written(0.0, 1) == written(0.0, 2)
    assert len(set(written(0.0, 1))) == 1


def test_what_does_not_fit_is_one_line(members: list[Member]) -> None:
    done = generate(str(members[0].folder), "--tokens", "500")
    assert done.returncode == 2
    assert "do not fit the models' 64 positions; ask for at most 64 tokens" in done.stderr
    done = generate("nowhere")
    assert (done.returncode, "nowhere: holds no model" in done.stderr) == (2, True)
