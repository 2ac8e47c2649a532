"""A trial on a preference file of mathematics: a small model of its own, its reference, and what preferences do to it.

The reference learns chosen and rejected answers of the training pairs alike, so it has no opinion of its own. There is
no gold reward here: what is measured are held-out pairs and samples. P pairs, C completions.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from mixwright.data_mixing.config_file import StrictModel
from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.tokenizer import train_tokenizer
from mixwright.pretrain.config import ModelConfig, Positive, ScheduleConfig
from mixwright.pretrain.model import build_model
from mixwright.pretrain.rpo.config import ColumnsConfig, PolicyModelConfig
from mixwright.pretrain.rpo.figures import auc, standard_error
from mixwright.pretrain.rpo.groups import CHOSEN, REJECTED, Group
from mixwright.pretrain.rpo.layout import lay_out
from mixwright.pretrain.rpo.objective import Objective, StepScope
from mixwright.pretrain.rpo.order import pairs_of_step
from mixwright.pretrain.rpo.pair_counts import BadPair
from mixwright.pretrain.rpo.policy import PolicyModel, load_policy
from mixwright.pretrain.rpo.raw_pairs import TextPair, read_pair
from mixwright.pretrain.rpo.reading import Row, open_source
from mixwright.pretrain.rpo.sampling import SamplingSettings, divergence_on_samples, sample_completions
from mixwright.pretrain.rpo.trial import CurvePoint, Trial, content_key, log_steps
from mixwright.pretrain.schedules import learning_rate

END = 0
"""The end of text in tokenizers that are trained here."""
PAIRS_PER_FORWARD = 16
_FINAL_LINE = re.compile(r"(?:^|\n)A: (-?[\d,.]*\d)\s*$")


class TextReference(StrictModel):
    """How the reference learns the answers: pairs per step, the rate falls to a tenth by a cosine."""

    num_steps: Positive = 300
    pairs_per_step: Positive = 8
    lr: float = Field(default=3e-3, gt=0)


class TextConfig(StrictModel):
    """The file, the model and the training. Pairs of more than `max_tokens` tokens are left out; whole prompts are held
    out. At every measurement `num_samples` held-out prompts are answered."""

    pairs: Path = Field(exclude=True)
    vocab_size: int = Field(default=512, ge=300)
    model: ModelConfig
    max_tokens: Positive = 512
    held_out_prompts: Positive = 120
    reference: TextReference = TextReference()
    lr: float = Field(default=5e-4, gt=0)
    pairs_per_step: Positive = 8
    num_steps: Positive = 300
    num_points: int = Field(default=5, ge=2)
    num_samples: Positive = 32
    max_new_tokens: Positive = 160


class TextTrial(Trial):
    """One objective on one file, whose content is named by its fingerprint."""

    kind: Literal["text"] = "text"
    world: TextConfig
    content: str


@dataclass(frozen=True)
class Texts:
    """Pairs of a seed as tokens, the right answers of held-out ones, and the folder of their reference."""

    training: tuple[Group, ...]
    held_out: tuple[Group, ...]
    answers: tuple[str, ...]
    tokenizer: Tokenizer
    folder: Path


def fingerprint_of(pairs: Path) -> str:
    """Identifies the content of a preference file. Raises DataError."""
    return open_source(str(pairs), "train", ColumnsConfig()).fingerprint


def prepare_texts(trial: TextTrial, folder: Path) -> Texts:
    """Pairs of a seed with their reference, which is trained where it is not yet below `folder`. Raises DataError."""
    config, seed = trial.world, trial.seed
    pairs = _read_pairs(config.pairs)
    is_held_out = _held_out(pairs, config.held_out_prompts, seed)
    training = [pair for pair, held_out in zip(pairs, is_held_out, strict=True) if not held_out]
    tokenizer = train_tokenizer(
        (text for pair in training for text in (pair.prompt, pair.chosen, pair.rejected)), config.vocab_size
    )
    groups = [
        (pair, group, held_out)
        for index, (pair, held_out) in enumerate(zip(pairs, is_held_out, strict=True))
        if (group := _tokenise(index, pair, tokenizer)).num_tokens <= config.max_tokens
    ]
    settings = config.model_dump(
        mode="json", include={"model", "vocab_size", "max_tokens", "held_out_prompts", "reference"}
    )
    texts = Texts(
        training=tuple(group for _, group, held_out in groups if not held_out),
        held_out=tuple(group for _, group, held_out in groups if held_out),
        answers=tuple(final_answer(pair.chosen) or "" for pair, _, held_out in groups if held_out),
        tokenizer=tokenizer,
        folder=folder / f"text-{content_key({'seed': seed, 'content': trial.content, **settings})}",
    )
    if not texts.training or not texts.held_out:
        raise DataError(f"{config.pairs}: no training or no held-out pairs of at most {config.max_tokens} tokens")
    if not texts.folder.is_dir():
        _train_reference(texts, config, seed)
    return texts


def final_answer(text: str) -> str | None:
    """The number of a final line `A: number`, without separators of thousands; None without such a line."""
    found = _FINAL_LINE.search(text)
    return found[1].replace(",", "") if found else None


def _read_pairs(path: Path) -> list[TextPair]:
    """Pairs of texts; rows that are none are left out."""
    pairs = []
    for row in open_source(str(path), "train", ColumnsConfig()).rows():
        with suppress(BadPair):
            pair = read_pair(row, ColumnsConfig()) if isinstance(row, Row) else None
            pairs += [pair] if isinstance(pair, TextPair) else []
    return pairs


def _held_out(pairs: Sequence[TextPair], num_prompts: int, seed: int) -> list[bool]:
    prompts = sorted({pair.prompt for pair in pairs})
    chosen = np.random.default_rng(seed).permutation(len(prompts))[:num_prompts]
    held_out = {prompts[number] for number in chosen}
    return [pair.prompt in held_out for pair in pairs]


def _tokenise(index: int, pair: TextPair, tokenizer: Tokenizer) -> Group:
    def ids(text: str, *end: int) -> NDArray[np.int32]:
        return np.array([*tokenizer.encode(text).ids, *end], dtype=np.int32)

    return Group(index, ids(pair.prompt), (ids(pair.chosen, END), ids(pair.rejected, END)))


def _train_reference(texts: Texts, config: TextConfig, seed: int) -> None:
    """Maximum likelihood of chosen and rejected answers of the training pairs; the folder appears once it is whole."""
    part = texts.folder.with_name(f"{texts.folder.name}.{secrets.token_hex(4)}.part")
    model = build_model(
        config.model, vocab_size=config.vocab_size, sequence_length=config.max_tokens, eos_id=END, seed=seed
    )
    disable_progress_bar()
    model.causal_lm.save_pretrained(part)
    policy, settings = _load(part), config.reference
    schedule = ScheduleConfig(kind="cosine", final_ratio=0.1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
    for step in range(settings.num_steps):
        groups = _of_step(texts.training, settings.pairs_per_step, seed, step)
        found = policy(lay_out(groups, "shared_prompt"))
        optimizer.zero_grad()
        (-found.logp_PC.sum() / found.length_PC.sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(schedule, settings.lr, step, settings.num_steps)
        optimizer.step()
    policy.causal_lm.save_pretrained(part)
    try:
        part.rename(texts.folder)
    except OSError:  # another worker was first
        shutil.rmtree(part)


def run_text(trial: TextTrial, folder: Path) -> tuple[CurvePoint, ...]:
    """Train a copy of the reference; figures at steps that are evenly spaced in the logarithm."""
    config, objective = trial.world, Objective(trial.objective)
    texts = prepare_texts(trial, folder)
    policy, meter = _load(texts.folder), Meter(texts, config, trial.seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    number = {group.index: place for place, group in enumerate(texts.training)}
    reference_N2 = pair_logp(_load(texts.folder), texts.training)
    measured, points = set(log_steps(config.num_steps, config.num_points)), []
    for step in range(config.num_steps):
        if step in measured:
            points.append(CurvePoint(step=step, figures=meter.measure(policy, step)))
        groups = _of_step(texts.training, config.pairs_per_step, trial.seed, step)
        reference_P2 = reference_N2[[number[group.index] for group in groups]]
        scope = StepScope(len(groups), sum(len(group.completions[CHOSEN]) for group in groups))
        loss, _ = objective(policy(lay_out(groups, "shared_prompt")), reference_P2, scope)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    last = meter.measure(policy, config.num_steps)
    return (*points, CurvePoint(step=config.num_steps, figures=last))


def _of_step(groups: Sequence[Group], pairs_per_step: int, seed: int, step: int) -> list[Group]:
    return [groups[index] for index in pairs_of_step(len(groups), pairs_per_step, seed, step)]


def _load(folder: Path) -> PolicyModel:
    return load_policy(PolicyModelConfig(path=str(folder)), layout="shared_prompt")


@torch.no_grad()
def pair_logp(model: PolicyModel, groups: Sequence[Group]) -> Tensor:
    """Log-probabilities of chosen and rejected answers, float32 [P, 2]."""
    parts = [groups[start : start + PAIRS_PER_FORWARD] for start in range(0, len(groups), PAIRS_PER_FORWARD)]
    return torch.cat([model(lay_out(part, "shared_prompt")).logp_PC for part in parts])


class Meter:
    """Measures policies that began from one reference: on held-out pairs, as many training pairs, and samples."""

    def __init__(self, texts: Texts, config: TextConfig, seed: int) -> None:
        self._texts, self._config, self._seed = texts, config, seed
        self._reference = _load(texts.folder)
        self._some = texts.training[: len(texts.held_out)]
        self._ratios = [pair_logp(self._reference, groups) for groups in (texts.held_out, self._some)]

    def measure(self, policy: PolicyModel, step: int) -> dict[str, float]:
        """Figures of `policy`; log-probabilities are nats per token."""
        return {
            **self._of_pairs(policy, self._texts.held_out, self._ratios[0], "held_out_"),
            **self._of_pairs(policy, self._some, self._ratios[1], ""),
            **self._of_samples(policy, step),
        }

    @staticmethod
    def _of_pairs(policy: PolicyModel, groups: Sequence[Group], reference_P2: Tensor, prefix: str) -> dict[str, float]:
        logp_P2 = pair_logp(policy, groups)
        chosen_P, rejected_P = (logp_P2 - reference_P2).T.contiguous()
        length_2 = [sum(len(group.completions[place]) for group in groups) for place in (CHOSEN, REJECTED)]
        figures = {
            "accuracy": float((chosen_P > rejected_P).float().mean()),
            "auc": auc(chosen_P, rejected_P),
            "chosen_logp": float(logp_P2[:, CHOSEN].sum()) / length_2[CHOSEN],
            "rejected_logp": float(logp_P2[:, REJECTED].sum()) / length_2[REJECTED],
        }
        return {prefix + name: value for name, value in figures.items()}

    def _of_samples(self, policy: PolicyModel, step: int) -> dict[str, float]:
        config, texts = self._config, self._texts
        prompts = [group.prompt for group in texts.held_out[: config.num_samples]]
        settings = SamplingSettings(config.max_new_tokens, 1.0, (END,))
        completions = sample_completions(policy, prompts, settings, self._seed * 1_000_003 + step)
        divergences = divergence_on_samples(policy, self._reference, prompts, completions)
        written = [final_answer(texts.tokenizer.decode(one.tolist())) for one in completions]
        right = [one is not None and one == answer for one, answer in zip(written, texts.answers, strict=False)]
        return {
            "kl": float(np.mean(divergences)),
            "kl_error": standard_error(divergences),
            "well_formed": float(np.mean([one is not None for one in written])),
            "right": float(np.mean(right)),
            "sample_tokens": float(np.mean([len(one) for one in completions])),
        }
