"""The rows of a step as text, and the steps of a row: the plan, the token store and the row log asked together.

Everything that comes from the page is a number or a name that must be one of the run's: no part of a path.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.errors import ConfigError, MixingError
from mixwright.data_mixing.feeder import store_order
from mixwright.data_mixing.plan import Plan, RowRefs, rank_positions
from mixwright.data_mixing.store import TokenStore
from mixwright.data_mixing.tokenizer import load_tokenizer
from mixwright.data_mixing.trace import trace
from mixwright.launch.dashboard.run_view import RunView
from mixwright.launch.hard_samples import store_folder
from mixwright.launch.mix_plan import check_step, parse_rank, parse_row
from mixwright.pretrain.row_log import read_row_log, row_log_folder

MAX_ROWS = 64
"""Rows of one answer; a rank of a large run may have thousands."""
MAX_CHARACTERS = 20_000
MAX_USES = 1000


@dataclass(frozen=True, eq=False)
class OpenStore:
    """A run's token store and how to read it. `order_G`: index in the store of each of the run's domains."""

    store: TokenStore
    order_G: NDArray[np.int64]
    decode: Callable[[list[int]], str]


class Inspector:
    """Looks into one run's data. The store is opened when it is first asked for; the journal alone tells the rest."""

    def __init__(self, view: RunView) -> None:
        self._view = view

    def rows(self, step: int, rank: str, first: int, characters: int) -> dict[str, Any]:
        """Up to MAX_ROWS rows that a rank `R/N` reads at a step, from its row `first` on, with text and weight.

        Raises MixingError when the run has no such step or the rank makes no sense. Where the text or the weights
        cannot be had, `text_problem` and `weight_problem` say why.
        """
        plan = self._plan()
        genesis = plan.genesis
        check_step(step, genesis.num_steps)
        positions = rank_positions(genesis.rows_per_step, *parse_rank(rank))
        shown = positions[max(first, 0) : max(first, 0) + MAX_ROWS]
        refs = plan.rows(step, shown)
        texts, text_problem = self._texts(plan, refs, min(max(characters, 1), MAX_CHARACTERS))
        loss_n, weight_n, weight_problem = self._logged(step, refs)
        names = [domain.name for domain in genesis.domains]
        numbers = zip(refs.position_n, refs.domain_n, refs.epoch_n, refs.row_n, loss_n, weight_n, texts, strict=True)
        rows = [
            {"position": int(p), "domain": names[d], "epoch": int(e), "row": int(r), "loss": _finite(loss),
             "weight": _finite(weight), "text": text}
            for p, d, e, r, loss, weight, text in numbers
        ]  # fmt: skip
        return {"step": step, "policy": plan.policy_lsn(step), "num_rows": len(positions), "first": max(first, 0),
                "rows": rows, "text_problem": text_problem, "weight_problem": weight_problem,
                "trained": step <= self._view.journal.history.last_step}  # fmt: skip

    def uses(self, what: str) -> dict[str, Any]:
        """The steps that read, or will read, the row `DOMAIN:ROW`. Raises MixingError when there is no such row."""
        plan = self._plan()
        genesis = plan.genesis
        domain, row = parse_row(what, {d.name: (i, d.num_rows) for i, d in enumerate(genesis.domains)})
        found = trace(plan, domain, row, genesis.num_steps)
        uses = [asdict(use) for use, _ in zip(found, range(MAX_USES), strict=False)]
        zeros_1 = np.zeros(1, np.int64)
        refs = RowRefs(zeros_1, np.array([domain]), zeros_1, np.array([row]))
        texts, text_problem = self._texts(plan, refs, MAX_CHARACTERS)
        return {"row": what, "uses": uses, "next_step": self._view.journal.history.last_step + 1,
                "num_steps": genesis.num_steps, "text": texts[0], "text_problem": text_problem}  # fmt: skip

    def _plan(self) -> Plan:
        with self._view.lock:
            plan = self._view.journal.plan
        if plan is None:
            raise ConfigError("the run has no committed policy yet: nothing says what its steps read")
        return plan

    @functools.cached_property
    def _open(self) -> OpenStore:
        folder = _found_store(self._view.run_dir)
        store = TokenStore.open(folder)
        order_G = store_order(self._view.journal.history.genesis, store)
        return OpenStore(store, order_G, load_tokenizer(store.tokenizer_folder).decode)

    def _texts(self, plan: Plan, refs: RowRefs, characters: int) -> tuple[list[str | None], str]:
        """Text of each row, or why there is none."""
        try:
            source = self._open
            tokens_nW = source.store.gather(source.order_G[refs.domain_n], refs.row_n)
        except MixingError as error:
            return [None] * len(refs.row_n), str(error)
        return [source.decode(tokens_W.tolist())[:characters] for tokens_W in tokens_nW], ""

    def _logged(self, step: int, refs: RowRefs) -> tuple[NDArray[Any], NDArray[Any], str]:
        """Loss and weight of each row by the row log (NaN: not logged), or why there are none."""
        loss_n, weight_n = np.full((2, len(refs.position_n)), np.nan)
        try:
            log = read_row_log(row_log_folder(self._view.run_dir), only_step=step)
        except MixingError as error:
            return loss_n, weight_n, str(error)
        at_n = np.searchsorted(log.position_n, refs.position_n)
        known_n = at_n < len(log)
        known_n[known_n] = log.position_n[at_n[known_n]] == refs.position_n[known_n]
        loss_n[known_n], weight_n[known_n] = log.loss_n[at_n[known_n]], log.weight_n[at_n[known_n]]
        problem = "" if known_n.any() else f"the row log has no row of step {step}; it is written every 100 steps"
        return loss_n, weight_n, problem


def _found_store(run_dir: Path) -> Path:
    """The store by the run's configuration: from here, or from where the run's folder suggests that it was started."""
    folder = store_folder(run_dir)
    beside = run_dir.resolve().parent.parent / folder
    return beside if not folder.exists() and not folder.is_absolute() and beside.exists() else folder


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
