"""Beginning or continuing a run from Python, as its trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.config_file import read_yaml, validate
from mixwright.data_mixing.entries import Genesis
from mixwright.data_mixing.errors import JournalError
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import Journal
from mixwright.data_mixing.leader import check_genesis, open_run
from mixwright.data_mixing.snapshot import resume
from mixwright.data_mixing.store import TokenStore


@dataclass(frozen=True)
class NewRun:
    """What a run is to be: the first policy (a document, or the YAML file of one), the shape of a step, the seed.

    `rows_per_step` counts the rows of all ranks and micro-batches together.
    """

    policy: Mapping[str, Any] | Path
    rows_per_step: int
    num_steps: int
    seed: int = 0

    def genesis(self, name: str, store: TokenStore) -> Genesis:
        """GENESIS of the run on this store. Raises ConfigError for a number that is out of range."""
        tree = {
            "run": name,
            "seed": self.seed,
            "sequence_length": store.manifest.sequence_length,
            "rows_per_step": self.rows_per_step,
            "num_steps": self.num_steps,
            "store_fingerprint": store.fingerprint,
            "domains": store.domains(),
        }
        return validate(Genesis, tree, "NewRun")

    def document(self) -> Mapping[str, Any]:
        return read_yaml(self.policy) if isinstance(self.policy, Path) else self.policy


def lead(run_dir: Path, store: TokenStore, begin: NewRun | None) -> tuple[Journal, RunHistory]:
    """Become the trainer of the run in `run_dir`, which is begun if need be; an earlier trainer is fenced off.

    Raises JournalError when there is no run and `begin` is None, or when the run was begun with other settings,
    PolicyRejected for a first policy that cannot be taken, StoreChanged for another store.
    """
    journal, history = resume(run_dir / "journal", "leader")
    if begin is not None:
        genesis = begin.genesis(run_dir.name, store)
        open_run(journal, genesis, accept(begin.document(), genesis), history)
        return journal, history
    if not history.commits:
        raise JournalError(f"{run_dir}: no run has begun here; say what it is to be with begin=NewRun(...)")
    check_genesis(history.genesis, history.genesis.model_copy(update={"store_fingerprint": store.fingerprint}))
    first = history.commits[0].policy
    open_run(journal, history.genesis, first, history)
    return journal, history


def joined(run_dir: Path) -> RunHistory:
    """The run as a rank that does not lead finds it, once the leader has opened it."""
    return resume(run_dir / "journal", "rank")[1]


def attempt_of(history: RunHistory) -> int:
    """Number of the attempt under way: how often a trainer has taken the run over."""
    return history.leases["trainer"].epoch
