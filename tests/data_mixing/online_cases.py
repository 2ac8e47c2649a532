"""Documents and windows to try online policies on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mixwright.data_mixing.domain import Domain
from mixwright.data_mixing.online import Interval, Losses, OnlineDocument, OnlineKind, Window
from mixwright.data_mixing.policy import parse

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "mixing_vectors.json").read_text())
Floats = NDArray[np.float64]


def online(document: Mapping[str, Any]) -> tuple[OnlineKind, Any]:
    """The kind and the parsed document."""
    parsed, kind = parse(document)
    assert isinstance(parsed, OnlineDocument)
    return cast(OnlineKind, kind), parsed


def domains(*names: str, rows: Sequence[int] | None = None) -> tuple[Domain, ...]:
    sizes = rows or [1000] * len(names)
    return tuple(Domain(name=name, num_rows=size, fingerprint="") for name, size in zip(names, sizes, strict=True))


def interval(
    first_step: int, num_steps: int, rows: ArrayLike, before: ArrayLike, after: ArrayLike, **more: Any
) -> Interval:
    """An interval; NaN stands for a loss that was not measured."""
    counts = tuple(int(count) for count in np.asarray(rows))
    train = more.pop("train_loss", after)
    return Interval(
        first_step=first_step,
        last_step=first_step + num_steps - 1,
        rows=counts,
        before=losses(before),
        after=losses(after),
        train_loss=losses(train),
        train_tokens=tuple(count * 100 for count in counts),
        **more,
    )


def losses(values: ArrayLike) -> Losses:
    return tuple(float(value) if np.isfinite(value) else None for value in np.asarray(values, dtype=np.float64))


def window(intervals: Sequence[Interval], shares: Sequence[float] | None = None, **more: Any) -> Window:
    num_arms = len(intervals[0].rows) if intervals else len(shares or ())
    keys: dict[str, Any] = {
        "step": intervals[-1].last_step + 1 if intervals else 0,
        "decision": 0,
        "arms": tuple(f"arm{index}" for index in range(num_arms)),
        "shares": tuple(shares or [1 / num_arms] * num_arms),
        "intervals": tuple(intervals),
        "rows_available": (10_000,) * num_arms,
        "num_steps": 1000,
        "tokens_per_row": 100,
    }
    return Window(**keys | more)


def sweep(gain_KK: ArrayLike, rows_NK: ArrayLike, drift: float = 0.0, start: float = 5.0) -> list[Interval]:
    """Perturbations of ten steps under the linear law; `drift` is what every loss falls in each besides."""
    gains, loss_K, found = np.asarray(gain_KK, dtype=np.float64), np.full(len(np.asarray(gain_KK)), start), []
    for place, row_K in enumerate(np.asarray(rows_NK)):
        after_K = loss_K - gains @ (row_K / row_K.sum()) - drift
        found.append(interval(10 * place, 10, row_K, loss_K, after_K, is_perturbation=True))
        loss_K = after_K
    return found
