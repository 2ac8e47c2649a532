"""Figures of a run: one JSON object per line in `metrics.jsonl`, and TensorBoard beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from mixwright.data_mixing.entries import DomainLoss
from mixwright.pretrain.evaluate import mean_loss, perplexity, standard_error


class MetricWriter:
    """Appends records of the leader; a record has a `kind` and the number of optimizer steps done, `step`."""

    def __init__(self, run_dir: Path, tensorboard: bool) -> None:
        path = run_dir / "metrics.jsonl"
        is_cut = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if is_cut:  # by a kill; the next record must not become part of that half line
            self._file.write("\n")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One record; numbers (also one level down, by name) go to TensorBoard as `kind/key`."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _scalars(values):
                self._board.add_scalar(f"{kind}/{name}", value, step)


def _scalars(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += [(f"{key}/{name}", number) for name, number in value.items() if isinstance(number, (int, float))]
        elif isinstance(value, (int, float)):
            found.append((key, value))
    return found


def loss_values(losses: Mapping[str, DomainLoss]) -> dict[str, Any]:
    """Per-domain figures for a record: mean cross-entropy (nats), its standard error, perplexity, tokens."""
    return {
        "loss": {name: mean_loss(loss) for name, loss in losses.items()},
        "loss_stderr": {name: standard_error(loss) for name, loss in losses.items()},
        "perplexity": {name: perplexity(loss) for name, loss in losses.items()},
        "tokens": {name: loss.num_tokens for name, loss in losses.items()},
    }


def overall_loss(losses: Mapping[str, DomainLoss]) -> float:
    """Mean cross-entropy over all tokens, nats."""
    return sum(loss.loss_sum for loss in losses.values()) / sum(loss.num_tokens for loss in losses.values())


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records in order of steps; a step that was done again after a resume counts once, as done last."""
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    path = run_dir / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a killed process may be half a line
            continue
        latest[record["kind"], record["step"]] = record
    return sorted(latest.values(), key=lambda record: record["step"])


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: of the device, or the resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
