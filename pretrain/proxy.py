"""Short runs for studies and fits: plain torch, one process, no journal folder; a result that is computed once.

They read as a job reads (the same TokenStore, Plan, policies and decisions) and learn as a job learns (the same model,
Head, objective and held-out rows). What they leave out is everything that a job of weeks needs: DeepSpeed, Ray,
checkpoints, a journal. A run that is cut off is begun again.

G domains, B rows of S = T + 1 tokens, N = B * T targets.
"""

from __future__ import annotations

import ast
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.entries import Genesis
from mixwright.data_mixing.errors import ConfigError
from mixwright.data_mixing.feeder import store_order
from mixwright.data_mixing.held_out import HeldOut
from mixwright.data_mixing.plan import RowRefs
from mixwright.data_mixing.policy import find_kind
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.config import ModelConfig, OptimizerConfig, Positive, ScheduleConfig
from mixwright.pretrain.errors import NonFiniteLoss
from mixwright.pretrain.head import seed_step
from mixwright.pretrain.model import build_model, num_parameters
from mixwright.pretrain.model_options.apply import begin_step, follow_updates
from mixwright.pretrain.model_options.config import ModelOptions
from mixwright.pretrain.objective import DomainSums, Objective, Shape, weighting_at
from mixwright.pretrain.proxy_mixture import DecisionNote, MixturePoint, Steering, steering
from mixwright.pretrain.ranks import Ranks
from mixwright.pretrain.schedules import learning_rate
from mixwright.pretrain.sweeps.damage import Damage

CODE_VERSION = 1
"""Part of every run's key: grows when a change of this code changes what a run computes."""

_DATA_MIXING = "mixwright.data_mixing."

EVALUATION_ROWS = 64
"""Rows of one forward of an evaluation; the losses do not depend on it but for rounding."""


class ProxyConfig(StrictModel):
    """Model, optimizer and length of a proxy run; `rows` are of the store's length.

    It validates before the first step, after the last, where an online policy measures, and every `validate_every`.
    """

    model: ModelConfig
    options: ModelOptions = ModelOptions()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    num_steps: Positive
    rows_per_step: Positive
    clip_norm: float = Field(default=1.0, gt=0)
    validation_rows: Positive = 16
    test_rows: Positive = 64
    validate_every: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _options_fit(self) -> ProxyConfig:
        self.options.check_fit(
            is_new_model=self.model.config is not None,
            zero_stage=0,
            gradient_checkpointing=self.model.gradient_checkpointing,
            num_steps=self.num_steps,
            drops_already=False,
        )
        return self

    def of_length(self, num_steps: int) -> ProxyConfig:
        """The same with `num_steps` steps; the warm-up keeps its share of them."""
        warmup = self.schedule.warmup_steps * num_steps // self.num_steps
        schedule = self.schedule.model_copy(update={"warmup_steps": warmup})
        return self.model_copy(update={"num_steps": num_steps, "schedule": schedule})


class ProxyRun(StrictModel):
    """One run, whole: two runs that are equal give equal losses on the same machine.

    `seed` decides the initial parameters and the order of rows. `domains` are names in the store at `store`.
    """

    store: Path
    domains: tuple[str, ...] = Field(min_length=1)
    policy: dict[str, Any]
    config: ProxyConfig
    damage: Damage = Damage()
    seed: int = Field(default=0, ge=0, lt=1 << 62)

    @field_validator("domains")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError(f"domain names must be distinct, found {', '.join(names)}")
        return names


class LossPoint(StrictModel):
    """Validation losses in nats per token by domain, after `step` steps."""

    step: int
    loss: dict[str, float]


class ProxyRecord(StrictModel):
    """What a proxy run found out. `test` are nats per token of plain cross-entropy after the last step.

    `mixtures` are the shares by domain from each step on; `rows` what was really read. `average_weights` are those of
    a run that re-weights its losses instead of its data (DoGE). `effective_sample_size`, a part of the samples, is the
    mean over the steps whose samples were weighted.
    """

    key: str
    run: ProxyRun
    num_parameters: int
    tokens: int
    seconds: float
    validation: tuple[LossPoint, ...]
    test: dict[str, float]
    mixtures: tuple[MixturePoint, ...]
    decisions: tuple[DecisionNote, ...]
    rows: dict[str, int]
    effective_sample_size: float | None = None
    average_weights: dict[str, float] | None = None

    @property
    def first(self) -> dict[str, float]:
        """Validation losses before the first step."""
        return self.validation[0].loss

    @property
    def last(self) -> dict[str, float]:
        """Validation losses after the last step."""
        return self.validation[-1].loss

    @property
    def shares(self) -> dict[str, float]:
        """Share of the rows that were read, by domain."""
        total = sum(self.rows.values())
        return {name: rows / total for name, rows in self.rows.items()}


def genesis_of(run: ProxyRun, store: TokenStore) -> Genesis:
    """What the run is, as a job would journal it. Raises DataError and ConfigError naming what the store lacks."""
    catalogue = store.domains()
    domains = tuple(catalogue[store.index(name)] for name in run.domains)
    for domain in domains:
        if (
            not domain.num_rows
            or not store.num_rows(domain.name, "validation")
            or not store.num_rows(domain.name, "test")
        ):
            raise ConfigError(f"{store.folder}: domain {domain.name!r} lacks training, validation or test rows")
    return Genesis(
        run="proxy",
        seed=run.seed,
        sequence_length=store.manifest.sequence_length,
        rows_per_step=run.config.rows_per_step,
        num_steps=run.config.num_steps,
        store_fingerprint=store.fingerprint,
        domains=domains,
    )


class ProxyTrainer:
    """Model, optimizer and rows of one run; a step of it, and an evaluation."""

    def __init__(self, run: ProxyRun, store: TokenStore, genesis: Genesis) -> None:
        self.config, self.genesis, self._store, self._seed = run.config, genesis, store, run.seed
        self._damage = run.damage
        self._store_index_G = store_order(genesis, store)
        manifest = store.manifest
        self.model = build_model(
            run.config.model,
            vocab_size=manifest.vocab_size,
            sequence_length=manifest.sequence_length,
            eos_id=manifest.eos_id,
            seed=run.seed,
            options=run.config.options,
        )
        self.model.train()
        self.optimizer = _adamw(self.model, run.config.optimizer)
        follow_updates(run.config.options, self.optimizer, self.model, lambda sums: sums)
        rows = run.config.rows_per_step
        shape = Shape(rows, rows, num_domains=len(genesis.domains), z_loss=0.0, eos_id=manifest.eos_id)
        self.objective = Objective(shape, Ranks(0, 1, torch.device("cpu"), None))
        self.validation = HeldOut.read(store, genesis, "validation", run.config.validation_rows)
        self.sums = DomainSums(len(genesis.domains), torch.device("cpu"))

    def gather(self, refs: RowRefs) -> Tensor:
        """Tokens of the rows, int64 [B, S]."""
        read = self._damage.redirect(refs)
        tokens_BS = self._store.gather(self._store_index_G[read.domain_n], read.row_n)
        whole_BS = np.asarray(tokens_BS, dtype=np.int64)
        return torch.from_numpy(self._damage.spoil(whole_BS, read, self._store.manifest.vocab_size))

    def forward_backward(self, refs: RowRefs) -> None:
        """Gradients of the mean loss over the rows; their losses are added to `sums`."""
        tokens_BS, domain_B = self.gather(refs), torch.from_numpy(refs.domain_n)
        if self.objective.has_first_pass:
            with torch.no_grad():
                self.objective.preview(self.model(tokens_BS), tokens_BS, domain_B)
        losses = self.model(tokens_BS)
        self.objective(losses, tokens_BS, domain_B).backward()  # type: ignore[no-untyped-call]
        self.sums.add(losses.nll_N, domain_B)
        divisor = self.objective.end()
        for parameter in self.model.parameters() if divisor != 1.0 else ():
            if parameter.grad is not None:
                parameter.grad.div_(divisor)

    def update(self, step: int) -> float:
        """Optimizer step with the clipped gradients; returns the learning rate. Raises NonFiniteLoss."""
        rate = learning_rate(self.config.schedule, self.config.optimizer.lr, step, self.config.num_steps)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        if not torch.isfinite(norm):
            raise NonFiniteLoss(f"proxy run, step {step}: the gradient is {float(norm)}; lower optimizer.lr")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return rate

    def begin_step(self, step: int) -> None:
        """Seed dropout and set the model's options, as a job does."""
        seed_step(self._seed, step, rank=0)
        begin_step(self.model, self.config.options, self._seed, step)

    @torch.no_grad()
    def evaluate(self, held_out: HeldOut) -> NDArray[np.float64]:
        """Sums [G, 4] over the held-out rows, with the columns of DomainSums."""
        self.model.eval()
        sums = DomainSums(len(self.genesis.domains), torch.device("cpu"))
        for first in range(0, len(held_out.domain_n), EVALUATION_ROWS):
            part = slice(first, first + EVALUATION_ROWS)
            losses = self.model(torch.from_numpy(held_out.tokens_nS[part]))
            sums.add(losses.nll_N, torch.from_numpy(held_out.domain_n[part]))
        self.model.train()
        sums_GC: NDArray[np.float64] = sums.take().numpy()
        return sums_GC

    def test(self) -> dict[str, float]:
        """Nats per token by domain on the test rows."""
        rows = HeldOut.read(self._store, self.genesis, "test", self.config.test_rows)
        return self.means(self.evaluate(rows))

    def means(self, sums_GC: NDArray[np.float64]) -> dict[str, float]:
        """Nats per token by domain."""
        return {d.name: float(row[0] / row[2]) for d, row in zip(self.genesis.domains, sums_GC, strict=True)}


class Curve:
    """Validation losses over a run."""

    def __init__(self, trainer: ProxyTrainer) -> None:
        self._trainer = trainer
        self.points: list[LossPoint] = []

    def measure(self, step: int) -> NDArray[np.float64]:
        """Validate after `step` steps; returns the sums [G, 4]."""
        sums_GC = self._trainer.evaluate(self._trainer.validation)
        self.points.append(LossPoint(step=step, loss=self._trainer.means(sums_GC)))
        return sums_GC

    def complete(self, step: int) -> tuple[LossPoint, ...]:
        """All points, the last one after the last step."""
        if self.points[-1].step != step:
            self.measure(step)
        return tuple(self.points)


def train_proxy(run: ProxyRun, store: TokenStore) -> ProxyRecord:
    """Train to the last step and test.

    Raises PolicyRejected for a policy that does not fit, DomainExhausted when the plan ends early, NonFiniteLoss.
    """
    began = time.perf_counter()
    genesis = genesis_of(run, store)
    mixture = steering(run.policy, genesis)
    trainer = ProxyTrainer(run, store, genesis)
    curve = Curve(trainer)
    mixture.begin(curve.measure(0))
    for step in range(run.config.num_steps):
        trainer.begin_step(step)
        trainer.objective.begin(*weighting_at(mixture.plan, step))
        trainer.forward_backward(mixture.plan.rows(step))
        mixture.note_rate(trainer.update(step))
        stretch = mixture.mark_after(step)
        if stretch is not None:
            validation_GC = curve.measure(step + 1) if stretch.evaluate else None
            mixture.measure(step + 1, trainer.sums.take().numpy(), validation_GC)
        elif run.config.validate_every and (step + 1) % run.config.validate_every == 0:
            curve.measure(step + 1)
    return finished(run, trainer, curve, mixture, began)


def finished(
    run: ProxyRun, trainer: ProxyTrainer, curve: Curve, mixture: Steering, began: float, **more: Any
) -> ProxyRecord:
    """The record of a run after its last step; `began` is the perf_counter at its beginning."""
    num_steps, genesis = run.config.num_steps, trainer.genesis
    names = [domain.name for domain in genesis.domains]
    weights = trainer.objective.window.take(names, mixture.plan.proportions(num_steps - 1).tolist())
    rows_G = mixture.plan.cursors(num_steps)
    return ProxyRecord(
        key=run_key(run, genesis.store_fingerprint),
        run=run,
        num_parameters=num_parameters(trainer.model),
        tokens=int(rows_G.sum()) * genesis.sequence_length,
        validation=curve.complete(num_steps),
        test=trainer.test(),
        mixtures=mixture.points(),
        decisions=mixture.decisions(),
        rows={domain.name: int(rows) for domain, rows in zip(genesis.domains, rows_G, strict=True)},
        seconds=time.perf_counter() - began,
        effective_sample_size=weights["effective_sample_size"] if weights else None,
        **more,
    )


def run_key(run: ProxyRun, store_fingerprint: str) -> str:
    """Names a run by everything that decides its result: what it says, its store's content, the code's version.

    The version of an online policy's code is its source: policies are worked on while studies of them exist.
    Raises PolicyRejected for an unknown kind.
    """
    # What has its default is left out: a new key of the configuration does not give old runs new names.
    content = {
        "version": CODE_VERSION,
        "type": type(run).__name__,
        "store": store_fingerprint,
        **run.model_dump(mode="json", exclude={"store"}, exclude_defaults=True),
    }
    kind = find_kind(run.policy.get("kind"))
    if hasattr(kind, "propose"):
        content["code"] = _policy_source(Path(str(getattr(kind, "__file__", ""))))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _policy_source(path: Path) -> str:
    """The code of a policy's kind and of what it imports of ours, one level deep, without comments and layout."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    ours = [path.parent.parent / f"{name.rpartition('.')[2]}.py" for name in names if name.startswith(_DATA_MIXING)]
    sources = [ast.dump(ast.parse(file.read_text(encoding="utf-8"))) for file in ours if file.is_file()]
    return hashlib.sha256("".join([ast.dump(tree), *sources]).encode()).hexdigest()


def _adamw(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Decay on matrices only, as in a job."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
