"""Figures of a run: what is written while it trains (`metric_sinks.py` says where), and read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from mixwright.data_mixing.entries import DomainLoss
from mixwright.data_mixing.plain_data import parse_json
from mixwright.pretrain.config import WandbConfig
from mixwright.pretrain.evaluate import mean_loss, perplexity, standard_error
from mixwright.pretrain.metric_sinks import METRICS, JsonLines, Sink, TensorBoard, Wandb


class MetricWriter:
    """Writes records of the leader; a record has a `kind` and the number of optimizer steps done, `step`.

    Raises TrainingError when Weights & Biases is asked for and cannot be had.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, wandb: WandbConfig | None = None) -> None:
        self._sinks: list[Sink] = [JsonLines(run_dir / METRICS)]
        if tensorboard:
            self._sinks.append(TensorBoard(run_dir / "tensorboard"))
        if wandb is not None:
            self._sinks.append(Wandb(run_dir, wandb))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One record; numbers (also one level down, by name) are drawn as `kind/key` where there are pictures."""
        for sink in self._sinks:
            sink.write(kind, step, values)


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
    path = run_dir / METRICS
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            record = parse_json(line)
        except ValueError:  # the last line of a killed process may be half a line
            continue
        if isinstance(record, dict) and isinstance(record.get("kind"), str) and type(record.get("step")) is int:
            latest[record["kind"], record["step"]] = record
    return sorted(latest.values(), key=lambda record: record["step"])


def has_record(run_dir: Path, kind: str, step: int) -> bool:
    """Whether a record of this kind was written after `step` optimizer steps."""
    return any((record["kind"], record["step"]) == (kind, step) for record in read_metrics(run_dir))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: of the device, or the resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
