"""Checkpoints: DeepSpeed's files, our position in the data, and a seal that says all of it is on disk.

A checkpoint folder is valid once it holds `sealed.json` (written last: sizes and SHA-256 of all files, the run, ranks
and ZeRO stage). `latest` is replaced atomically after that. Loading takes the newest valid one and says which it passed
over. Each rank adds up what it wrote, and at loading a share of all files.

Resume on another number of ranks: whole optimizer states (ZeRO 0 in float32) load as they are; sharded ones (ZeRO 1-3,
bfloat16) are first converted by DeepSpeed to its universal format, beside the checkpoint, once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from mixwright.data_mixing.answers import one_line
from mixwright.data_mixing.config_file import StrictModel, validate
from mixwright.data_mixing.entries import Checkpoint
from mixwright.data_mixing.errors import ConfigError
from mixwright.data_mixing.plain_data import parse_json
from mixwright.pretrain.engine import Engine, convert_to_universal
from mixwright.pretrain.errors import CheckpointMismatch, RanksApart, TrainingError
from mixwright.pretrain.loop import Position
from mixwright.pretrain.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

SEAL = "sealed.json"
_TAG = re.compile(r"step-(\d{8})")
_SHARD = re.compile(r"zero_pp_rank_(\d+)_")
"""In DeepSpeed's names of files that every rank writes one of; the leader writes the others."""


@dataclass(frozen=True)
class Found:
    """A valid checkpoint on disk."""

    tag: str
    position: Position
    num_ranks: int
    zero_stage: int


class Contents(StrictModel):
    """Sizes of a folder's files and their SHA-256, which older releases did not record."""

    files: dict[str, int]
    sha256: dict[str, str] = Field(default_factory=dict)

    def damage(self, folder: Path, ranks: Ranks) -> str | None:
        """What is wrong with the files that this rank looks at: all sizes, and the content of every n-th of n ranks."""
        for number, (name, size) in enumerate(sorted(self.files.items())):
            path = folder / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if number % ranks.size == ranks.rank and name in self.sha256 and _sha256(path) != self.sha256[name]:
                return f"{name} does not hold what was written: its SHA-256 is another one"
        return None


class Converted(Contents):
    """What sealed.json of a universal copy holds."""

    converted_from: str
    files: dict[str, int] = Field(default_factory=dict)


class Seal(Contents):
    """What sealed.json holds: whose checkpoint it is, where in the data it was written, and what its files hold."""

    run: str
    step: int = Field(ge=0)
    run_digest: str = Field(pattern=r"^[0-9a-f]{1,16}$")
    weighting: dict[str, Any] = Field(default_factory=dict)
    num_ranks: int = Field(gt=0)
    zero_stage: int

    @property
    def position(self) -> Position:
        return Position(self.step, int(self.run_digest, 16), self.weighting)


@dataclass(frozen=True)
class CheckpointSettings:
    """Whose checkpoints they are, how they are sharded, and how many stay."""

    run: str
    zero_stage: int
    keep: int


class Checkpoints:
    """The checkpoint folder of a run."""

    def __init__(self, folder: Path, settings: CheckpointSettings, ranks: Ranks) -> None:
        self._folder, self._settings, self._ranks = folder, settings, ranks

    def save(self, engine: Engine, position: Position) -> Checkpoint:
        """Write and seal a checkpoint, move `latest`, drop old ones. Collective.

        Raises TrainingError when it cannot be written, RanksApart when a rank is lost meanwhile; the earlier
        checkpoints stay as they are.
        """
        tag = f"step-{position.step:08d}"
        if self._ranks.is_leader:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._sweep_unsealed()
            self._drop(tag)  # a damaged one, which was passed over
        self._ranks.barrier()
        try:
            engine.save(self._folder, tag, {"step": position.step, "run_digest": position.run_digest})
            sha256 = self._settle(self._folder / tag)
            if self._ranks.is_leader:
                self._seal(tag, position, sha256)
                self._drop_old(tag)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(self._folder / tag, ignore_errors=True)
            reason = " ".join(str(error).split())[:200]
            if _is_of_the_ranks(error):
                raise RanksApart(f"{self._folder / tag}: a rank was lost while it was written: {reason}") from error
            raise TrainingError(f"{self._folder / tag}: the checkpoint cannot be written: {reason}") from error
        self._ranks.barrier()
        return Checkpoint(step=position.step, tag=tag, digest=f"{position.run_digest:016x}")

    def find(self, say: Callable[[str], None]) -> Found | None:
        """The newest valid checkpoint, None when there is none; `say` hears of damaged ones. Collective."""
        for tag in self._ranks.gather_plain(sorted(_tags(self._folder), reverse=True))[0]:
            problems = self._ranks.gather_plain(_damage(self._folder / tag, self._ranks))
            problem = next(filter(None, problems), None)
            if problem is None:
                seal = _read_seal(self._folder / tag)
                self._check_same_run(tag, seal)
                return Found(tag, seal.position, seal.num_ranks, seal.zero_stage)
            if problem != "unfinished":
                say(f"checkpoint {tag} is damaged ({problem}): falling back to the one before it")
        return None

    def load(self, engine: Engine, found: Found) -> Position:
        """Load `found` into the engine, whatever number of ranks wrote it. Collective."""
        folder, tag = self._folder, found.tag
        is_sharded = any((folder / tag).glob("*zero_pp_rank_*_optim_states.pt"))
        universal = is_sharded and found.num_ranks != self._ranks.size
        if universal:
            tag = f"{found.tag}-universal"
            if self._ranks.is_leader:
                _convert(folder / found.tag, folder / tag)
            self._ranks.barrier()
        state = engine.load(folder, tag, universal=universal)
        if state.get("step", found.position.step) != found.position.step:
            raise CheckpointMismatch(
                f"{folder / tag}: holds step {state.get('step')}, its seal says {found.position.step}"
            )
        return found.position

    def _settle(self, path: Path) -> dict[str, str]:
        """Flush the files of a checkpoint to disk; their SHA-256. Each rank does it for those it wrote. Collective."""
        mine = {}
        for name in _names(path):
            shard = _SHARD.search(name)
            if (int(shard[1]) if shard else 0) == self._ranks.rank:
                _sync(path / name)
                mine[name] = _sha256(path / name)
        return {name: digest for part in self._ranks.gather_plain(mine) for name, digest in part.items()}

    def _seal(self, tag: str, position: Position, sha256: dict[str, str]) -> None:
        path = self._folder / tag
        seal = Seal(
            run=self._settings.run,
            step=position.step,
            run_digest=f"{position.run_digest:016x}",
            weighting=dict(position.weighting),
            num_ranks=self._ranks.size,
            zero_stage=self._settings.zero_stage,
            files=_sizes(path),
            sha256=sha256,
        )
        _write_atomically(path / SEAL, json.dumps(seal.model_dump(), indent=1))  # NaN may be among the weights
        _write_atomically(self._folder / "latest", tag)

    def _drop_old(self, newest: str) -> None:
        """Keep as many as the settings say. Those after `newest` were passed over as damaged, and go too."""
        tags = sorted(_tags(self._folder))
        kept = [tag for tag in tags if tag <= newest][-self._settings.keep :]
        for tag in tags:
            if tag not in kept:
                self._drop(tag)

    def _drop(self, tag: str) -> None:
        for folder in (self._folder / tag, self._folder / f"{tag}-universal"):
            # The seal goes first, so that a kill in between leaves nothing that looks whole.
            (folder / SEAL).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def _sweep_unsealed(self) -> None:
        for folder in self._folder.glob("step-*"):
            if not (folder / SEAL).exists():
                shutil.rmtree(folder, ignore_errors=True)

    def _check_same_run(self, tag: str, seal: Seal) -> None:
        stage = self._settings.zero_stage
        if seal.run != self._settings.run:
            raise CheckpointMismatch(f"{self._folder / tag}: belongs to run {seal.run!r}, not {self._settings.run!r}")
        if seal.zero_stage != stage:
            raise CheckpointMismatch(
                f"{self._folder / tag}: was written with training.zero_stage = {seal.zero_stage}, "
                f"the configuration says {stage}"
            )


def _is_of_the_ranks(error: OSError | RuntimeError) -> bool:
    """Whether a collective failed, which torch tells by its text alone, and not the storage."""
    return isinstance(error, RuntimeError) and re.search(r"gloo|NCCL|[Cc]onnection closed", str(error)) is not None


def _tags(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("step-*") if _TAG.fullmatch(path.name)]


def _names(path: Path) -> list[str]:
    """Files below a checkpoint folder, seal excluded, relative to it."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != SEAL)


def _sizes(path: Path) -> dict[str, int]:
    return {name: (path / name).stat().st_size for name in _names(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint folder as far as this rank looks, None when it is whole."""
    if not (path / SEAL).exists():
        return "unfinished"
    try:
        return _read_seal(path).damage(path, ranks)
    except (OSError, ValueError, ConfigError) as error:
        return one_line(error)


def _convert(source: Path, target: Path) -> None:
    """Make the universal copy of a sharded checkpoint, unless it is there and whole."""
    if (target / SEAL).exists() and _is_whole(target):
        return
    shutil.rmtree(target, ignore_errors=True)
    convert_to_universal(source, target)
    sha256 = {name: _sha256(target / name) for name in _names(target)}
    seal = Converted(converted_from=source.name, files=_sizes(target), sha256=sha256)
    _write_atomically(target / SEAL, json.dumps(seal.model_dump(), indent=1))


def _is_whole(universal: Path) -> bool:
    """Whether a universal copy is as it was written; those of older releases say nothing about it."""
    try:
        seal = validate(Converted, parse_json((universal / SEAL).read_text(encoding="utf-8")), SEAL)
        return seal.damage(universal, ALONE) is None
    except (OSError, ValueError, ConfigError):
        return False


def _read_seal(path: Path) -> Seal:
    """What seals the checkpoint in folder `path`; raises OSError, ValueError or ConfigError."""
    return validate(Seal, parse_json((path / SEAL).read_text(encoding="utf-8")), SEAL)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
