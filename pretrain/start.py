"""Beginning or continuing a run: data, journal, first policy, controller, signals."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.corpora import load_corpora_config
from mixwright.data_mixing.entries import Genesis
from mixwright.data_mixing.errors import DataError, JournalError, ServiceUnavailable
from mixwright.data_mixing.feed import served_store
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import Journal
from mixwright.data_mixing.leader import check_genesis, open_run
from mixwright.data_mixing.prepare import prepare
from mixwright.data_mixing.service import ServiceProcess, start_service
from mixwright.data_mixing.snapshot import resume
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.engine import accumulation_steps, pretrain_settings
from mixwright.pretrain.launchers import Launchers
from mixwright.pretrain.progress import Watcher
from mixwright.pretrain.ranks import Ranks
from mixwright.pretrain.rundir import began_ns, journal_folder, read_history

logger = logging.getLogger(__name__)


class StopRequest:
    """Set by the first SIGINT or SIGTERM, and when a launcher above has ended; a second signal ends the process.

    `tell` is called once, when it is set.
    """

    def __init__(self) -> None:
        self._requested = False
        self._launchers = Launchers.above()
        self.tell: Callable[[], None] = lambda: None

    @classmethod
    def install(cls) -> StopRequest:
        request = cls()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, request._on_signal)
        return request

    def is_requested(self) -> bool:
        if not self._requested and (pid := self._launchers.lost()) is not None:
            logger.warning("the launcher (process %d) has ended: this rank stops with a checkpoint", pid)
            self._request()
        return self._requested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        self._request()

    def _request(self) -> None:
        if not self._requested:
            self._requested = True
            self.tell()


def ensure_store(config: PretrainConfig, watcher: Watcher) -> None:
    """Prepare the token store when it is missing and the configuration says from what."""
    if config.mixing.feed == "actor" or (config.data.store / "manifest.json").exists():
        return
    if config.data.prepare is None:
        raise DataError(
            f"data.store: {config.data.store} holds no token store; make it with `mixwright data prepare CONFIG` "
            "or name that CONFIG as data.prepare"
        )
    watcher.say(f"preparing {config.data.store} from {config.data.prepare}")
    corpora = load_corpora_config(config.data.prepare).model_copy(update={"output": config.data.store.resolve()})
    stages: set[str] = set()

    def tell_stage(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            stages.add(stage)
            watcher.say(f"  {stage} ...")

    prepare(corpora, config.data.prepare.parent, progress=tell_stage)


@contextlib.contextmanager
def open_store(config: PretrainConfig, ranks: Ranks) -> Iterator[TokenStore]:
    """The token store on this node, or, with `mixing.feed: actor`, as other nodes serve it."""
    mixing = config.mixing
    if mixing.feed == "local":
        yield TokenStore.open(config.data.store, compare_since_ns=began_ns(config.run_dir))
        return
    with served_store(
        config.run_dir,
        config.data.store,
        mixing.address,
        rows_per_ask=config.training.rows_per_step // ranks.size,
        prefetch_steps=mixing.prefetch_steps,
        timeout_s=mixing.feed_timeout_s,
    ) as store:
        yield store


def genesis_of(config: PretrainConfig, store: TokenStore) -> Genesis:
    """What the run is, from its configuration and its data."""
    return Genesis(
        run=config.run.name,
        seed=config.run.seed,
        sequence_length=store.manifest.sequence_length,
        rows_per_step=config.training.rows_per_step,
        num_steps=config.training.num_steps,
        store_fingerprint=store.fingerprint,
        domains=store.domains(),
    )


@dataclass
class MixingSide:
    """The run's journal and controller as this rank sees them; journal and service exist on the leader only."""

    genesis: Genesis
    attempt: int
    _journal: Journal | None = None
    _history: RunHistory | None = None
    _service: ServiceProcess | None = None
    _told: set[str] = field(default_factory=set)

    def leader_journal(self) -> tuple[Journal, RunHistory]:
        if self._journal is None or self._history is None:
            raise JournalError("only the leader writes the journal")
        return self._journal, self._history

    def tell_news(self, watcher: Watcher) -> None:
        """Say once that the controller is ready, or that it cannot start."""
        if self._service is None:
            return
        status = self._service.poll()
        if status.state != "starting" and status.state not in self._told:
            self._told.add(status.state)
            watcher.say(status.message)


@contextlib.contextmanager
def open_mixing(config: PretrainConfig, store: TokenStore, ranks: Ranks, watcher: Watcher) -> Iterator[MixingSide]:
    """Open the run's journal on all ranks; the leader also starts the controller and stops what it started."""
    accumulation_steps(pretrain_settings(config), ranks.size)
    genesis = genesis_of(config, store)
    if not ranks.is_leader:
        ranks.barrier()
        recorded = read_history(config.run_dir)
        check_genesis(recorded.genesis, genesis)
        yield MixingSide(recorded.genesis, recorded.leases["trainer"].epoch)
        return
    first_policy = accept(config.mixing.policy, genesis)
    journal, history = resume(journal_folder(config.run_dir), "leader")
    history, lease = open_run(journal, genesis, first_policy, history)
    ranks.barrier()
    service = _start_service(config)
    try:
        yield MixingSide(history.genesis, lease.epoch, journal, history, service)
    finally:
        if service is not None:
            service.stop()


def _start_service(config: PretrainConfig) -> ServiceProcess | None:
    mixing = config.mixing
    if mixing.service == "none":
        return None
    service = start_service(config.run_dir, address=mixing.address, metrics=mixing.metrics)
    if mixing.service == "required":
        status = service.wait(mixing.service_timeout_s)
        if status.state != "ready":
            service.stop()
            raise ServiceUnavailable(f"mixing.service is required, but {status.message}")
    return service
