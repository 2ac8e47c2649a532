"""Where a run's figures go: `metrics.jsonl` always, TensorBoard and Weights & Biases when the configuration says so."""

from __future__ import annotations

import importlib.util
import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from mixwright.data_mixing.answers import one_line
from mixwright.pretrain.config import WandbConfig
from mixwright.pretrain.errors import TrainingError

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
WANDB_ID = "wandb_id"
"""File in the run folder: a run that is continued goes on in the same run there."""
INIT_TIMEOUT_S = 60
INSTALL_WANDB = "pip install 'mixwright[wandb]', or leave `metrics.wandb` out"


class Sink(Protocol):
    """A place for records: a `kind`, the number of optimizer steps done, and values by name."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object per line, appended."""

    def __init__(self, path: Path) -> None:
        is_cut = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if is_cut:  # by a kill; the next record must not become part of that half line
            self._file.write("\n")

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Numbers as scalars `kind/name`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in scalars(values).items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._board.close()


class Wandb:
    """Numbers as `kind/name` over `step`, with the run's config.yaml; files are below `run_dir`/wandb.

    The key is wandb's own business (WANDB_API_KEY or `wandb login`): it is neither read nor written here. Raises
    TrainingError when wandb is missing or refuses to start; once it has started, its failures never end a run.
    """

    def __init__(self, run_dir: Path, config: WandbConfig) -> None:
        check_wandb(config)
        import wandb

        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                mode=config.mode,
                name=run_dir.name,
                id=_run_id(run_dir),
                resume="allow",
                dir=str(run_dir),
                config=_run_config(run_dir),
                # What is printed may name paths and machines, and belongs to the run's own logs.
                settings=wandb.Settings(console="off", quiet=True, init_timeout=INIT_TIMEOUT_S),
            )
            # Its own step must not go back, as that of a resumed run does.
            self._run.define_metric("*", step_metric="step")
        except (
            Exception
        ) as error:  # CommError, UsageError, AuthenticationError ...: whatever it is, the run is not begun
            raise TrainingError(f"metrics.wandb: Weights & Biases does not start: {one_line(error)}") from None
        self._is_broken = False

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        named = {f"{kind}/{name}": value for name, value in scalars(values).items()}
        if named:
            self._attempt(lambda: self._run.log({"step": step, **named}))

    def close(self) -> None:
        self._attempt(self._run.finish)

    def _attempt(self, call: Any) -> None:
        if self._is_broken:
            return
        try:
            call()
        except Exception as error:  # a picture of a run must not end it
            self._is_broken = True
            logger.warning("Weights & Biases gets no more figures: %s", one_line(error))


def check_wandb(config: WandbConfig | None) -> None:
    """Raise TrainingError when figures are to go to Weights & Biases and its package is not installed."""
    if config is not None and importlib.util.find_spec("wandb") is None:
        raise TrainingError(f"metrics.wandb: the package `wandb` is not installed: {INSTALL_WANDB}")


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among `values`, also one level down, by `key` and `key/name`."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{name}": number for name, number in value.items() if isinstance(number, (int, float))}
        elif isinstance(value, (int, float)):
            found[key] = value
    return found


def _run_id(run_dir: Path) -> str:
    """The run's id at Weights & Biases, drawn once."""
    path = run_dir / WANDB_ID
    if not path.exists():
        path.write_text(secrets.token_hex(8), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _run_config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.exists() else {}
