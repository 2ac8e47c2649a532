"""A preference-optimisation run from configuration to exported model, as one rank runs it.

The order is: lock (leader), ranks, pairs (leader), model, reference (log-probabilities, samples), engine and
checkpoint, training with evaluation and checkpoints, export. Killed anywhere, the same command goes on from the last
checkpoint.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from mixwright.data_mixing.staging import atomic_file
from mixwright.pretrain.checkpoint import Checkpoints, CheckpointSettings
from mixwright.pretrain.engine import Engine, EngineSettings, accumulation_steps, start_ranks
from mixwright.pretrain.ensemble.member import EXPORT
from mixwright.pretrain.job import EXIT_INTERRUPTED, owes_evaluation
from mixwright.pretrain.loop import Position
from mixwright.pretrain.metrics import MetricWriter, peak_memory_bytes
from mixwright.pretrain.model import PLAIN, num_parameters
from mixwright.pretrain.progress import Progress, Watcher
from mixwright.pretrain.ranks import Ranks, launched_rank
from mixwright.pretrain.rpo.config import RpoConfig
from mixwright.pretrain.rpo.evaluate import SampleView, divergence, evaluate_pairs, write_generations
from mixwright.pretrain.rpo.export import lone_policy, whole_policy, write_policy
from mixwright.pretrain.rpo.loop import RpoRecord, RpoTrainer, train
from mixwright.pretrain.rpo.objective import Objective
from mixwright.pretrain.rpo.order import num_steps
from mixwright.pretrain.rpo.pairs import PreparedPairs
from mixwright.pretrain.rpo.policy import PolicyModel, load_policy
from mixwright.pretrain.rpo.results import show_conventions, show_results
from mixwright.pretrain.rpo.start import (
    check_same_run,
    find_preferences,
    longest_sequence,
    prepare,
    reference_key,
    tokenizer_of,
    with_model_folder,
)
from mixwright.pretrain.rundir import sole_trainer, write_resolved_config
from mixwright.pretrain.start import StopRequest

DONE = "done.json"


def run_rpo(config: RpoConfig, watcher: Watcher) -> int:
    """Run this rank's part of the job; returns the exit code. Raises MixingError for every expected failure."""
    stop = StopRequest.install()
    config = with_model_folder(config)
    with contextlib.ExitStack() as stack:
        if launched_rank() == 0:
            stop.tell = stack.enter_context(sole_trainer(config.run_dir)).say_stopping
        if (config.run_dir / DONE).is_file():
            watcher.say(f"run {config.run.name!r} is complete; delete {config.run_dir} or choose another run.name")
            show_results(config, watcher)
            return 0
        if config.training.num_threads is not None:
            torch.set_num_threads(config.training.num_threads)
        ranks = start_ranks(watcher.say)
        stack.callback(ranks.leave)
        accumulation_steps(engine_settings(config), ranks.size)
        prepared = ranks.leader_first(lambda: prepare(config, watcher))
        prepared = prepared or prepare(config, watcher)  # it is there by now
        return RpoJob.build(config, ranks, prepared, watcher).run(stop)


def engine_settings(config: RpoConfig) -> EngineSettings:
    """The engine's part of the run's configuration."""
    return EngineSettings(
        optimizer=config.optimizer,
        dtype=config.model.dtype,
        zero_stage=config.training.zero_stage,
        clip_norm=config.training.clip_norm,
        per_step=config.training.pairs_per_step,
        per_micro_batch=config.training.micro_batch_pairs,
        deepspeed=config.deepspeed,
        options=PLAIN,
        samples="training.pairs_per_step",
        micro_batch="training.micro_batch_pairs",
    )


@dataclass
class RpoJob:
    """Everything that is set up once; `run` trains from `start` to the end."""

    config: RpoConfig
    num_steps: int
    ranks: Ranks
    prepared: PreparedPairs
    trainer: RpoTrainer
    checkpoints: Checkpoints
    start: Position
    watcher: Watcher

    @classmethod
    def build(cls, config: RpoConfig, ranks: Ranks, prepared: PreparedPairs, watcher: Watcher) -> RpoJob:
        training, objective = config.training, Objective(config.objective)
        steps = training.num_steps or num_steps(
            len(prepared.train), training.pairs_per_step, training.num_epochs or 1.0
        )
        key = reference_key(config, prepared)
        if ranks.is_leader:
            check_same_run(config, key, steps)
            write_resolved_config(config.run_dir, config)
        ranks.barrier()
        longest = longest_sequence(config, prepared, objective)
        model = load_policy(config.model, layout=training.layout, max_tokens=longest, seed=config.run.seed)
        model = model.to(ranks.device)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        watcher.say(
            f"model: {num_parameters(model):,} parameters, {trained:,} trained, {ranks.size} rank(s), "
            f"ZeRO {training.zero_stage}"
        )
        preferences = find_preferences(config, prepared, key, model, objective, ranks, watcher)
        show_conventions(config, preferences, watcher)
        engine = Engine(engine_settings(config), model, ranks)
        kept = CheckpointSettings(config.run.name, training.zero_stage, config.checkpoint.keep)
        checkpoints = Checkpoints(config.run_dir / "checkpoints", kept, ranks)
        found = checkpoints.find(watcher.say)
        start = checkpoints.load(engine, found) if found else Position()
        if found:
            watcher.say(f"resuming after step {start.step} (checkpoint {found.tag}, digest {start.run_digest:016x})")
        trainer = RpoTrainer(config, steps, engine, objective, ranks, preferences, lambda: False)
        return cls(config, steps, ranks, prepared, trainer, checkpoints, start, watcher)

    def run(self, stop: StopRequest) -> int:
        """Evaluate, train, evaluate, export; returns the exit code."""
        self.trainer = replace(self.trainer, stop_requested=stop.is_requested)
        with self._metrics() as metrics:
            if self.start.step == 0:
                self._evaluate(metrics, 0)
            end = self._train(metrics)
            if end is None:
                self.watcher.say("interrupted; run the same command again to go on")
                return EXIT_INTERRUPTED
            self._evaluate(metrics, end.step)
            self._export()
            if metrics is not None:
                metrics.write("end", end.step, {"peak_memory_bytes": peak_memory_bytes(self.ranks.device)})
                with atomic_file(self.config.run_dir / DONE, durable=True) as file:
                    file.write(json.dumps({"step": end.step, "run_digest": f"{end.run_digest:016x}"}).encode())
                show_results(self.config, self.watcher)
        self.ranks.barrier()
        return 0

    def _metrics(self) -> contextlib.AbstractContextManager[MetricWriter | None]:
        if not self.ranks.is_leader:
            return contextlib.nullcontext()
        return MetricWriter(self.config.run_dir, self.config.metrics.tensorboard, self.config.metrics.wandb)

    def _train(self, metrics: MetricWriter | None) -> Position | None:
        """Train to the end and return where that is; None when interrupted (after a checkpoint)."""
        config, every = self.config, self.config.evaluation.every
        position, saved_step = self.start, self.start.step
        tokens = self.trainer.preferences.tokens_per_step(config.training.pairs_per_step)
        progress = Progress(self.start.step, self.num_steps, tokens, loss=None, domain_losses={}, policy_lsn=None)
        if position.step < self.num_steps and owes_evaluation(
            config.run_dir, "evaluation", position.step, every, self.ranks
        ):
            self._evaluate(metrics, position.step)
        for record in train(self.trainer, self.start):
            position = record.position
            progress = _advance(progress, record)
            self.watcher.progress(progress)
            if metrics is not None:
                _write_metrics(metrics, record)
            if every and position.step % every == 0 and position.step < self.num_steps and not record.stop_requested:
                self._evaluate(metrics, position.step)
            if position.step % config.checkpoint.every == 0 or record.stop_requested:
                self.checkpoints.save(self.trainer.engine, position)
                saved_step = position.step
            if record.stop_requested:
                self.watcher.close()
                return None
        self.watcher.close()
        if position.step != saved_step:
            self.checkpoints.save(self.trainer.engine, position)
        return position

    def _evaluate(self, metrics: MetricWriter | None, step: int) -> None:
        """Held-out pairs on all ranks; samples and their divergence on the leader."""
        trainer, wanted = self.trainer, self.config.evaluation
        if not len(self.prepared.evaluation):
            return
        figures = evaluate_pairs(trainer.engine, trainer.objective, trainer.preferences, self.config, self.ranks)
        if wanted.generations or wanted.kl_samples:
            with self._policy_on_leader() as policy:
                if policy is not None:
                    figures |= self._sample(policy, step)
            self.ranks.barrier()
        if metrics is not None:
            metrics.write("evaluation", step, figures)

    def _sample(self, policy: PolicyModel, step: int) -> dict[str, Any]:
        view = SampleView(
            self.prepared.evaluation, self.config.evaluation, tokenizer_of(self.prepared), self.config.run.seed
        )
        if view.config.generations:
            write_generations(policy, view, step, self.config.run_dir)
        if not view.config.kl_samples:
            return {}
        return {"divergence": divergence(policy, self._reference(policy, step), view)}

    def _reference(self, policy: PolicyModel, step: int) -> PolicyModel | None:
        """The reference model for a moment; None where it is the policy without its adapters."""
        if self.config.model.lora is not None:
            return None
        if step == 0:
            return policy
        like = next(policy.parameters())
        return lone_policy(self.config.model, like.device, like.dtype)

    @contextlib.contextmanager
    def _policy_on_leader(self) -> Iterator[PolicyModel | None]:
        """The policy with all its parameters, ready to be sampled from; None on other ranks. Collective."""
        engine = self.trainer.engine
        if self.config.training.zero_stage < 3:
            engine.eval()
            yield engine.module if self.ranks.is_leader else None
            engine.train()
            return
        parameters = engine.full_parameters()
        yield whole_policy(self.config.model, parameters, self.ranks.device) if self.ranks.is_leader else None

    def _export(self) -> None:
        parameters = self.trainer.engine.full_parameters()
        if self.ranks.is_leader:
            folder = self.config.run_dir / EXPORT
            write_policy(self.config.model, self.trainer.engine.module, parameters, tokenizer_of(self.prepared), folder)
        self.ranks.barrier()


def _advance(progress: Progress, record: RpoRecord) -> Progress:
    progress = replace(progress, step=record.position.step)
    if record.figures is None:
        return progress
    figures = record.figures
    shown = {"accuracy": figures["rewards"]["accuracy"], "margin": figures["rewards"]["margin"]}
    shown["logp chosen"] = figures["logp"]["chosen"]
    return replace(progress, loss=figures["loss"]["preference"], domain_losses=shown)


def _write_metrics(metrics: MetricWriter, record: RpoRecord) -> None:
    step = record.position.step
    values = {
        "lr": record.lr,
        "grad_norm": record.grad_norm,
        "step_seconds": record.step_seconds,
        "run_digest": f"{record.position.run_digest:016x}",
    }
    metrics.write("step", step, values)
    if record.figures is not None:
        metrics.write("train", step, record.figures)
