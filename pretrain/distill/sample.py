"""Rows sampled from teachers, chunk by chunk: a chunk is a file, complete or absent, that depends on nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.manifest import fingerprint
from mixwright.data_mixing.permutation import mix_key
from mixwright.data_mixing.plain_data import read_json_object
from mixwright.data_mixing.staging import atomic_file, exclusive, is_complete
from mixwright.pretrain.config import Positive
from mixwright.pretrain.distill.sampler import continue_rows
from mixwright.pretrain.ensemble.member import Member, check_together, load_member
from mixwright.pretrain.errors import EnsembleError
from mixwright.pretrain.head import LanguageModel

SETTINGS = "settings.json"

Progress = Callable[[int, int], None]
"""Called with the rows that are done, and all rows."""


class SamplingConfig(StrictModel):
    """`members`: chunks of `batch_rows` rows come from one member each, in turn; `ensemble`: from all, pooled."""

    num_rows: Positive
    batch_rows: Positive = 64
    source: Literal["members", "ensemble"] = "ensemble"
    pooling: Literal["logits", "arithmetic"] = "logits"
    temperature: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0)

    @property
    def num_chunks(self) -> int:
        return -(-self.num_rows // self.batch_rows)


def sample_rows(
    members: Sequence[Member],
    config: SamplingConfig,
    *,
    sequence_length: int,
    eos_id: int,
    folder: Path,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> NDArray[np.int32]:
    """Unconditional rows [num_rows, T + 1] that begin with the end of a document, and so with a document's start.

    Chunks in `folder` are kept: the same call goes on after an interruption, with the same rows. Raises EnsembleError
    when the folder holds samples of other members or settings.
    """
    check_together(members)
    with exclusive(folder):
        _claim(folder, members, config, sequence_length)
        done = sum(is_complete(_chunk(folder, chunk)) for chunk in range(config.num_chunks)) * config.batch_rows
        for models, chunk in _waiting(members, config, folder, device):
            rows_nS = _sample_chunk(models, config, chunk, sequence_length, eos_id, device)
            with atomic_file(_chunk(folder, chunk)) as file:
                np.save(file, rows_nS)
            done += len(rows_nS)
            if progress is not None:
                progress(min(done, config.num_rows), config.num_rows)
    return np.concatenate([np.load(_chunk(folder, chunk)) for chunk in range(config.num_chunks)])


def num_repeated(rows_nS: NDArray[np.int32]) -> int:
    """Rows that equal an earlier one."""
    return len(rows_nS) - len(np.unique(rows_nS, axis=0))


def _waiting(
    members: Sequence[Member], config: SamplingConfig, folder: Path, device: torch.device | str
) -> Iterator[tuple[Sequence[LanguageModel], int]]:
    """Chunks that are not there, with the models that make them; single members are loaded one after the other."""
    missing = [chunk for chunk in range(config.num_chunks) if not is_complete(_chunk(folder, chunk))]
    if config.source == "ensemble":
        models = [load_member(member, device) for member in members] if missing else []
        yield from ((models, chunk) for chunk in missing)
        return
    for number, member in enumerate(members):
        own = [chunk for chunk in missing if chunk % len(members) == number]
        alone = [load_member(member, device)] if own else []
        yield from ((alone, chunk) for chunk in own)


def _sample_chunk(
    models: Sequence[LanguageModel],
    config: SamplingConfig,
    chunk: int,
    sequence_length: int,
    eos_id: int,
    device: torch.device | str,
) -> NDArray[np.int32]:
    """The rows of a chunk, [n, T + 1]; its random numbers are its own."""
    generator = torch.Generator(device).manual_seed(mix_key(config.seed, chunk) % (1 << 63))
    num_rows = min(config.batch_rows, config.num_rows - chunk * config.batch_rows)
    starts_B1 = torch.full((num_rows, 1), eos_id, device=device)
    rows_BS = continue_rows(
        models, starts_B1, sequence_length, generator, pooling=config.pooling, temperature=config.temperature
    )
    return rows_BS.cpu().numpy().astype(np.int32)


def _claim(folder: Path, members: Sequence[Member], config: SamplingConfig, sequence_length: int) -> None:
    """Note whose samples the folder holds, or refuse it when it holds others."""
    settings = {
        **config.model_dump(mode="json"),
        "members": [member.fingerprint for member in members],
        "sequence_length": sequence_length,
    }
    path = folder / SETTINGS
    if not path.is_file():
        with atomic_file(path) as file:
            file.write(json.dumps(settings, indent=1).encode())
        return
    try:
        found = read_json_object(path, strict=True)
    except (OSError, ValueError) as error:
        raise EnsembleError(f"{path}: not the settings of samples ({error}); choose another folder") from None
    if fingerprint(found) != fingerprint(settings):
        differing = [key for key in settings if found.get(key) != settings[key]]
        raise EnsembleError(
            f"{folder}: holds samples with other {', '.join(differing)}; choose another folder, or remove it"
        )


def _chunk(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:05d}.npy"
