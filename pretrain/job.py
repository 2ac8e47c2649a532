"""A pretraining job from configuration to exported model, as one rank runs it.

The order is: lock (leader), ranks, data (leader), run (journal, controller), model and checkpoint, training with
validation and checkpoints, test, export, report. Killed anywhere, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from mixwright.data_mixing.entries import DomainLoss, End, Report
from mixwright.data_mixing.feeder import Feeder
from mixwright.data_mixing.held_out import HeldOut
from mixwright.data_mixing.leader import Leader
from mixwright.data_mixing.store import TokenStore
from mixwright.data_mixing.weighting import WeightingState
from mixwright.pretrain.checkpoint import Checkpoints, CheckpointSettings, Found
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.distill.teaching import Teaching, open_teaching
from mixwright.pretrain.engine import Engine, pretrain_settings, start_ranks
from mixwright.pretrain.ensemble.member import EXPORT, ORIGIN, parameters_hash, write_origin
from mixwright.pretrain.errors import NonFiniteLoss
from mixwright.pretrain.evaluate import evaluate
from mixwright.pretrain.loop import Position, StepRecord, Trainer, train
from mixwright.pretrain.metric_sinks import check_wandb
from mixwright.pretrain.metrics import (
    MetricWriter,
    has_record,
    loss_values,
    overall_loss,
    peak_memory_bytes,
    read_metrics,
)
from mixwright.pretrain.model import build_model, export, num_parameters
from mixwright.pretrain.model_options.exporting import how_to_load
from mixwright.pretrain.objective import Objective, Shape
from mixwright.pretrain.progress import Progress, Watcher
from mixwright.pretrain.ranks import Ranks, launched_rank
from mixwright.pretrain.report import write_report
from mixwright.pretrain.row_log import RowLossLog, row_log_folder
from mixwright.pretrain.rundir import DIVERGED, journal_folder, read_history, sole_trainer, write_resolved_config
from mixwright.pretrain.start import MixingSide, StopRequest, ensure_store, open_mixing, open_store

EXIT_INTERRUPTED = 75
"""EX_TEMPFAIL: nothing is wrong, run the same command again."""


def run_job(config: PretrainConfig, watcher: Watcher) -> int:
    """Run this rank's part of the job; returns the exit code. Raises MixingError for every expected failure."""
    stop = StopRequest.install()
    with contextlib.ExitStack() as stack:
        if launched_rank() == 0:
            stop.tell = stack.enter_context(sole_trainer(config.run_dir)).say_stopping
        if read_history(config.run_dir).end is not None:
            _say_complete(config, watcher)
            return 0
        if config.training.num_threads is not None:
            torch.set_num_threads(config.training.num_threads)
        check_wandb(config.metrics.wandb)
        ranks = start_ranks(watcher.say)
        stack.callback(ranks.leave)
        ranks.leader_first(lambda: ensure_store(config, watcher))
        store = stack.enter_context(open_store(config, ranks))
        mixing = stack.enter_context(open_mixing(config, store, ranks, watcher))
        if ranks.is_leader:
            write_resolved_config(config.run_dir, config)
            (config.run_dir / DIVERGED).unlink(missing_ok=True)
        job = Job.build(config, ranks, store, mixing, watcher)
        try:
            return job.run(stop)
        except NonFiniteLoss as error:
            if ranks.is_leader:
                (config.run_dir / DIVERGED).write_text(f"{error}\n", encoding="utf-8")
            raise


@dataclass
class Job:
    """Everything that is set up once; `run` trains from `start` to the end."""

    config: PretrainConfig
    ranks: Ranks
    store: TokenStore
    mixing: MixingSide
    engine: Engine
    checkpoints: Checkpoints
    start: Position
    watcher: Watcher
    teaching: Teaching | None = None

    @classmethod
    def build(
        cls, config: PretrainConfig, ranks: Ranks, store: TokenStore, mixing: MixingSide, watcher: Watcher
    ) -> Job:
        manifest = store.manifest
        model = build_model(
            config.model,
            vocab_size=manifest.vocab_size,
            sequence_length=manifest.sequence_length,
            eos_id=manifest.eos_id,
            seed=config.run.seed_of_parameters,
            options=config.options,
        )
        watcher.say(
            f"model: {num_parameters(model):,} parameters, {ranks.size} rank(s), ZeRO {config.training.zero_stage}"
        )
        if ranks.is_leader and not (config.run_dir / ORIGIN).exists():
            write_origin(config.run_dir, parameters_hash(model))
        teaching = open_teaching(config, store, ranks.device, watcher.say)
        engine = Engine(pretrain_settings(config), model, ranks)
        checkpoints = Checkpoints(config.run_dir / "checkpoints", _kept(config), ranks)
        found = checkpoints.find(watcher.say)
        start = _load(checkpoints, engine, found, watcher) if found else Position()
        return cls(config, ranks, store, mixing, engine, checkpoints, start, watcher, teaching)

    def run(self, stop: StopRequest) -> int:
        """Train, then test, export and report; returns the exit code."""
        config = self.config
        with contextlib.ExitStack() as stack:
            metrics = stack.enter_context(self._metrics())
            leader = stack.enter_context(self._leader()) if self.ranks.is_leader else None
            feeder = stack.enter_context(self._feeder())
            if self.start.step == 0:
                self._test(metrics, self.start)
            attempt, objective = self.mixing.attempt, self._objective()
            row_log = stack.enter_context(self._row_log()) if config.metrics.row_log else None
            trainer = Trainer(
                config, self.engine, objective, self.ranks, feeder, leader, attempt, stop.is_requested, row_log,
                self.teaching,
            )  # fmt: skip
            end = self._train(trainer, metrics)
            if end is None:
                self.watcher.say("interrupted; run the same command again to go on")
                return EXIT_INTERRUPTED
            self._test(metrics, end)
            self._export()
            if leader is not None and metrics is not None:
                leader.write(self._end_entry(end))
                metrics.write("end", end.step, {"peak_memory_bytes": peak_memory_bytes(self.ranks.device)})
        self._finish(end)
        return 0

    def _metrics(self) -> contextlib.AbstractContextManager[MetricWriter | None]:
        if not self.ranks.is_leader:
            return contextlib.nullcontext()
        return MetricWriter(self.config.run_dir, self.config.metrics.tensorboard, self.config.metrics.wandb)

    def _leader(self) -> Leader:
        journal, history = self.mixing.leader_journal()
        return Leader(
            journal,
            history,
            start_step=self.start.step,
            lead_steps=self.config.mixing.lead_steps,
            prefetch_steps=self.config.mixing.prefetch_steps,
        )

    def _feeder(self) -> Feeder:
        return Feeder(
            journal_folder(self.config.run_dir),
            self.store,
            rank=self.ranks.rank,
            num_ranks=self.ranks.size,
            start_step=self.start.step,
            prefetch_steps=self.config.mixing.prefetch_steps,
        )

    def _row_log(self) -> RowLossLog:
        return RowLossLog(row_log_folder(self.config.run_dir), self.ranks.rank, self.mixing.attempt)

    def _objective(self) -> Objective:
        training, remembered = self.config.training, self.start.weighting
        shape = Shape(
            rows_per_step=training.rows_per_step,
            micro_batch_rows=training.micro_batch_rows,
            num_domains=len(self.mixing.genesis.domains),
            z_loss=training.z_loss,
            eos_id=self.store.manifest.eos_id,
        )
        return Objective(shape, self.ranks, WeightingState.from_json(remembered) if remembered else None)

    def _train(self, trainer: Trainer, metrics: MetricWriter | None) -> Position | None:
        """Train to the end and return where that is; None when interrupted (after a checkpoint)."""
        config = self.config
        validation = self._held_out("validation", config.evaluation.rows_per_domain)
        position, saved_step = self.start, self.start.step
        progress = self._progress_at_start()
        is_owed = owes_evaluation(config.run_dir, "validation", position.step, config.evaluation.every, self.ranks)
        self._at_boundary(validation, trainer, metrics, position, is_owed)
        for record in train(trainer, self.start):
            position = record.position
            progress = _advance(progress, record, trainer.feeder.plan.policy_lsn(record.step))
            self.watcher.progress(progress)
            self.mixing.tell_news(self.watcher)
            if metrics is not None:
                _write_metrics(metrics, record, progress)
            every = config.evaluation.every
            is_due = every > 0 and position.step % every == 0
            if not record.stop_requested:
                self._at_boundary(validation, trainer, metrics, position, is_due)
            if position.step % config.checkpoint.every == 0 or record.stop_requested:
                self._save(trainer, position)
                saved_step = position.step
            if record.stop_requested:
                self.watcher.close()
                return None
        self.watcher.close()
        if position.step != saved_step:
            self._save(trainer, position)
        return position

    def _at_boundary(
        self, validation: HeldOut, trainer: Trainer, metrics: MetricWriter | None, position: Position, is_due: bool
    ) -> None:
        """Between two steps: validate when it is due or an online policy measures here, and let it decide."""
        found = trainer.feeder.plan.mark(position.step)
        mark = found[1] if found and position.step < self.config.training.num_steps else None
        if is_due or (mark is not None and mark.evaluate):
            self._validate(validation, trainer, metrics, position)
        if mark is not None and mark.decide == "sync":
            trainer.await_decision(position.step, mark.timeout_s)

    def _save(self, trainer: Trainer, position: Position) -> None:
        if trainer.row_log is not None:
            trainer.row_log.flush()
        if trainer.leader is not None:
            trainer.leader.flush()  # a job that is killed from here on does not do these steps again, nor reports them
        checkpoint = self.checkpoints.save(self.engine, position)
        if trainer.leader is not None:
            trainer.leader.write(checkpoint)

    def _held_out(self, split: Literal["validation", "test"], rows_per_domain: int) -> HeldOut:
        return HeldOut.read(self.store, self.mixing.genesis, split, rows_per_domain)

    def _evaluate(self, held_out: HeldOut, when: str) -> Mapping[str, DomainLoss]:
        rows = self.config.training.micro_batch_rows
        return evaluate(self.engine, held_out, self.mixing.genesis, self.ranks, rows, when)

    def _validate(self, rows: HeldOut, trainer: Trainer, metrics: MetricWriter | None, position: Position) -> None:
        losses = self._evaluate(rows, f"validation at step {position.step}")
        if metrics is None or trainer.leader is None:
            return
        metrics.write("validation", position.step, loss_values(losses))
        step = position.step - 1
        trainer.leader.write(
            Report(kind="validation", first_step=step, last_step=step, domains=dict(losses), attempt=trainer.attempt)
        )

    def _test(self, metrics: MetricWriter | None, position: Position) -> None:
        rows = self._held_out("test", self.config.evaluation.test_rows_per_domain)
        losses = self._evaluate(rows, f"test at step {position.step}")
        if metrics is not None:
            metrics.write("test", position.step, loss_values(losses))

    def _export(self) -> None:
        parameters = self.engine.full_parameters()
        if self.ranks.is_leader:
            folder = self.config.run_dir / EXPORT
            export(self.engine.module, parameters, self.store.tokenizer_folder, folder)
            shutil.copyfile(self.config.run_dir / ORIGIN, folder / ORIGIN)
        self.ranks.barrier()

    def _end_entry(self, end: Position) -> End:
        reason: Literal["complete", "exhausted"] = (
            "complete" if end.step == self.config.training.num_steps else "exhausted"
        )
        return End(step=end.step, reason=reason, digest=f"{end.run_digest:016x}")

    def _finish(self, end: Position) -> None:
        if not self.ranks.is_leader:
            return
        write_report(self.config.run_dir, read_history(self.config.run_dir), end.step)
        if end.step < self.config.training.num_steps:
            self.watcher.say(f"the plan ended at step {end.step}: a domain with on_exhaust: stop reached its cap")
        show_results(self.config, self.watcher)

    def _progress_at_start(self) -> Progress:
        genesis = self.mixing.genesis
        return Progress(
            step=self.start.step,
            num_steps=genesis.num_steps,
            tokens_per_step=genesis.rows_per_step * genesis.sequence_length,
            loss=None,
            domain_losses={},
            policy_lsn=0,
        )


def owes_evaluation(run_dir: Path, kind: str, step: int, every: int, ranks: Ranks) -> bool:
    """Whether a run that goes on after `step` was stopped before the evaluation that was due there. Collective.

    A stop does not wait for it: who sends SIGTERM may soon send SIGKILL.
    """
    if not (every and step and step % every == 0):
        return False
    return bool(ranks.from_leader(int(ranks.is_leader and not has_record(run_dir, kind, step))))


def _kept(config: PretrainConfig) -> CheckpointSettings:
    return CheckpointSettings(config.run.name, config.training.zero_stage, config.checkpoint.keep)


def _load(checkpoints: Checkpoints, engine: Engine, found: Found, watcher: Watcher) -> Position:
    position = checkpoints.load(engine, found)
    watcher.say(f"resuming after step {position.step} (checkpoint {found.tag}, run digest {position.run_digest:016x})")
    return position


def _advance(progress: Progress, record: StepRecord, policy_lsn: int) -> Progress:
    progress = replace(progress, step=record.position.step, policy_lsn=policy_lsn)
    if record.report is None:
        return progress
    values = loss_values(record.report.domains)
    return replace(progress, loss=overall_loss(record.report.domains), domain_losses=values["loss"])


def _write_metrics(metrics: MetricWriter, record: StepRecord, progress: Progress) -> None:
    step = record.position.step
    values = {
        "lr": record.lr,
        "grad_norm": record.grad_norm,
        "step_seconds": record.step_seconds,
        "wait_seconds": record.wait_seconds,
        "run_digest": f"{record.position.run_digest:016x}",
        "policy": progress.policy_lsn,
    }
    metrics.write("step", step, values)
    if record.report is not None:
        metrics.write("train", step, {"overall": progress.loss, **loss_values(record.report.domains)})
    if record.weights is not None:
        metrics.write("weights", step, record.weights)


def show_results(config: PretrainConfig, watcher: Watcher) -> None:
    """The table of test perplexity before and after, and where everything is."""
    tests = [record for record in read_metrics(config.run_dir) if record["kind"] == "test"]
    if tests:
        before, after = tests[0], tests[-1]
        rows = [
            [name, _perplexity(before, name), _perplexity(after, name), f"{after['loss'][name]:.3f}"]
            for name in after["loss"]
        ]
        header = ["domain", f"before (step {before['step']})", f"after (step {after['step']})", "nats/token"]
        watcher.table("test perplexity per domain", header, rows)
    history = read_history(config.run_dir)
    checkpoint = config.run_dir / "checkpoints" / (history.checkpoints[-1].tag if history.checkpoints else "")
    watcher.say(f"report:      {config.run_dir / 'report.html'}")
    watcher.say(f"checkpoint:  {checkpoint}")
    watcher.say(f"model:       {config.run_dir / 'export'}  ({how_to_load(config.run_dir / 'export')})")


def _perplexity(record: Mapping[str, Mapping[str, float]], name: str) -> str:
    value = record["perplexity"].get(name, math.nan)
    return f"{value:,.1f}"


def _say_complete(config: PretrainConfig, watcher: Watcher) -> None:
    watcher.say(f"run {config.run.name!r} is complete; delete {config.run_dir} or choose another run.name to run again")
    show_results(config, watcher)
