"""Which checkpoints count, and which stay: damage that changes no size, older seals, checkpoints that were passed over.

`FilesOnly` stands for DeepSpeed; real engines, ranks and kills are in test_job.py and tests/drills.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist

from mixwright.pretrain import checkpoint
from mixwright.pretrain.checkpoint import SEAL, Checkpoints, CheckpointSettings
from mixwright.pretrain.engine import Engine, start_ranks
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.loop import Position
from mixwright.pretrain.ranks import ALONE, Ranks
from tests.ranks import run_ranks

FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")
SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


class FilesOnly:
    """Writes a rank's files of a checkpoint, other ones at every step."""

    def __init__(self, *names: str) -> None:
        self.names = names or FILES

    def save(self, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        (folder / tag).mkdir(exist_ok=True)
        for number, name in enumerate(self.names):
            (folder / tag / name).write_bytes(bytes([client_state["step"], number]) * 5000)

    def load(self, folder: Path, tag: str, *, universal: bool) -> dict[str, Any]:
        return {}


def checkpoints_in(folder: Path, keep: int = 2, ranks: Ranks = ALONE) -> Checkpoints:
    return Checkpoints(folder, CheckpointSettings("exp", 0, keep), ranks)


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(cast("Engine", FilesOnly()), Position(step, 7, {}))


def found_step(checkpoints: Checkpoints) -> tuple[int | None, list[str]]:
    """The step of the checkpoint that is taken, and what was said."""
    told: list[str] = []
    found = checkpoints.find(told.append)
    return (found.position.step if found else None), told


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_damage(tmp_path: Path, name: str) -> None:
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 3, 6)
    assert found_step(checkpoints) == (6, [])
    flip_a_bit(tmp_path / "step-00000006" / name)
    problem = f"{name} does not hold what was written: its SHA-256 is another one"
    word = f"checkpoint step-00000006 is damaged ({problem}): falling back to the one before it"
    assert found_step(checkpoints) == (3, [word])


def test_a_weighting_comes_back_as_it_was_nan_included(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(cast("Engine", FilesOnly()), Position(3, 7, {"loss": [1.5, math.nan]}))
    found = checkpoints.find(lambda _: None)
    assert found is not None
    assert str(found.position.weighting) == "{'loss': [1.5, nan]}"


def test_every_file_is_in_the_seal(tmp_path: Path) -> None:
    save(checkpoints_in(tmp_path), 3)
    seal = json.loads((tmp_path / "step-00000003" / SEAL).read_text())
    assert sorted(seal["files"]) == sorted(seal["sha256"]) == sorted(FILES)


def test_a_checkpoint_of_an_older_release_has_sizes_only(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 3)
    path = tmp_path / "step-00000003" / SEAL
    seal = json.loads(path.read_text())
    del seal["sha256"]
    path.write_text(json.dumps(seal))
    assert found_step(checkpoints) == (3, [])


def test_checkpoints_that_were_passed_over_take_no_place(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path, keep=1)
    save(checkpoints, 9)
    flip_a_bit(tmp_path / "step-00000009" / FILES[0])
    assert found_step(checkpoints)[0] is None
    save(checkpoints, 3)
    assert found_step(checkpoints) == (3, [])
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000003"]


def test_a_damaged_checkpoint_is_written_anew_from_nothing(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 3)
    (tmp_path / "step-00000003" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").touch()  # of more ranks than there are
    flip_a_bit(tmp_path / "step-00000003" / FILES[0])
    save(checkpoints, 3)
    assert sorted(path.name for path in (tmp_path / "step-00000003").iterdir()) == sorted([*FILES, SEAL])
    assert found_step(checkpoints) == (3, [])


def test_a_universal_copy_is_made_once_and_again_when_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        made.append(target)
        (target / "zero").mkdir(parents=True)
        (target / "zero" / "exp_avg.pt").write_bytes(bytes(1000))

    monkeypatch.setattr(checkpoint, "convert_to_universal", convert)
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 3)
    found = checkpoints.find(lambda _: None)
    assert found is not None
    by_others = replace(found, num_ranks=2)
    for expected in (1, 1):
        checkpoints.load(cast("Engine", FilesOnly()), by_others)
        assert len(made) == expected
    flip_a_bit(made[0] / "zero" / "exp_avg.pt")
    checkpoints.load(cast("Engine", FilesOnly()), by_others)
    assert len(made) == 2
    assert (made[0] / "zero" / "exp_avg.pt").read_bytes() == bytes(1000)


def save_and_find(folder: Path) -> list[int | None]:
    """On each of several ranks: two checkpoints, and the step that is taken as damage is done to the newer one."""
    ranks = start_ranks(lambda _: None)
    engine = FilesOnly(*FILES) if ranks.is_leader else FilesOnly(SHARD)
    checkpoints, taken = checkpoints_in(folder, ranks=ranks), []
    for step in (3, 6):
        checkpoints.save(cast("Engine", engine), Position(step, 7, {}))
    for name in (None, *FILES, SHARD):
        if name and ranks.is_leader:
            flip_a_bit(folder / "step-00000006" / name)
        ranks.barrier()
        taken.append(found_step(checkpoints)[0])
        ranks.barrier()
        if name and ranks.is_leader:
            flip_a_bit(folder / "step-00000006" / name)
    ranks.leave()
    return taken


def test_ranks_share_the_work_and_agree(tmp_path: Path) -> None:
    assert run_ranks(save_and_find, 2, tmp_path) == [[6, 3, 3, 3]] * 2
    seal = json.loads((tmp_path / "step-00000006" / SEAL).read_text())
    assert sorted(seal["files"]) == sorted(seal["sha256"]) == sorted([*FILES, SHARD])


class Vanishes(FilesOnly):
    """A rank that is lost while it writes."""

    def save(self, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        dist.destroy_process_group()
        raise OSError("this rank is gone")


def save_while_a_rank_is_lost(folder: Path) -> tuple[int, str]:
    """Exit code and message of each rank."""
    ranks = start_ranks(lambda _: None)
    engine = FilesOnly(*FILES) if ranks.is_leader else Vanishes()
    try:
        checkpoints_in(folder, ranks=ranks).save(cast("Engine", engine), Position(3, 7, {}))
    except TrainingError as error:
        return error.exit_code, str(error)
    return 0, ""


def test_a_rank_that_is_lost_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    """Exit code 70 starts the ranks of a cluster job again, 2 would end it for good."""
    (code, message), (other, _) = run_ranks(save_while_a_rank_is_lost, 2, tmp_path)
    assert (code, other) == (70, 2)
    assert "step-00000003: a rank was lost while it was written: " in message
