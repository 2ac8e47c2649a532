"""What teachers say of a micro-batch, from running them or from a cache, as the student's Head needs it.

B rows of S = T + 1 tokens, N = B * T, D_k hidden size of teacher k, k kept classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixwright.data_mixing.store import TokenStore
from mixwright.kernels.distillation import TopK
from mixwright.kernels.ensemble_kl import Teacher
from mixwright.pretrain.config import DistillationConfig, PretrainConfig
from mixwright.pretrain.distill.topk_cache import TopKCache
from mixwright.pretrain.ensemble.member import Member, check_together, inspect_member, load_member
from mixwright.pretrain.errors import EnsembleError
from mixwright.pretrain.head import Head, LanguageModel, Lesson
from mixwright.pretrain.model import DTYPES, cast_parameters


class Teaching(Protocol):
    """Gives the lesson of each micro-batch."""

    def lesson(self, tokens_BS: Tensor, domain_B: Tensor, row_B: NDArray[np.int64]) -> Lesson:
        """The lesson of rows `row_B` of the domains `domain_B` (catalogue order), with the tokens `tokens_BS`."""


def open_teaching(
    config: PretrainConfig, store: TokenStore, device: torch.device, say: Callable[[str], None]
) -> Teaching | None:
    """The teachers that the configuration names, None when it names none.

    Raises EnsembleError for teachers that are missing or do not go together, with each other or with the store.
    """
    settings = config.distillation
    if settings is None:
        return None
    members = [inspect_member(path) for path in settings.teachers]
    check_together(members)
    check_store(members[0], store)
    if settings.cache is not None:
        say(f"teachers: {len(members)}, from {settings.cache}")
        return CachedTeachers(settings, members, store, device, document_masks=config.model.document_masks)
    say(f"teachers: {len(members)}, {sum(member.num_parameters for member in members):,} parameters")
    teachers = [cast_parameters(load_member(member, device), DTYPES[config.model.dtype]) for member in members]
    for teacher, member in zip(teachers, members, strict=True):
        _check_plain_head(teacher.head, member)
        if config.model.document_masks:
            teacher.document_end = store.manifest.eos_id
    return RunTeachers(settings, teachers)


class RunTeachers:
    """Teachers that are run on every micro-batch: nothing is approximated, each costs a forward."""

    def __init__(self, settings: DistillationConfig, teachers: Sequence[LanguageModel]) -> None:
        self._settings, self._teachers = settings, teachers

    @torch.no_grad()
    def lesson(self, tokens_BS: Tensor, domain_B: Tensor, row_B: NDArray[np.int64]) -> Lesson:
        """Hidden states of all teachers, [N, D_k]; their logits are formed block by block in the Head."""
        said = [self._said(teacher, tokens_BS) for teacher in self._teachers]
        return Lesson(said, self._settings.share, self._settings.pooling, self._settings.temperature)

    def _said(self, teacher: LanguageModel, tokens_BS: Tensor) -> Teacher:
        features_ND, weight_VD = teacher.head.operands(teacher.hidden_states(tokens_BS))
        # The logits are linear in the hidden states, so these take all that divides the logits.
        return Teacher(features_ND / (self._settings.teacher_temperature * teacher.head.temperature), weight_VD)


class CachedTeachers:
    """The top k predictions of teachers and the mass of all others, read from disk: no teacher is run."""

    def __init__(
        self,
        settings: DistillationConfig,
        members: Sequence[Member],
        store: TokenStore,
        device: torch.device,
        *,
        document_masks: bool,
    ) -> None:
        assert settings.cache is not None
        self._settings, self._device = settings, device
        self._cache = TopKCache.open(
            settings.cache,
            store,
            members=members,
            pooling=settings.pooling,
            temperature=settings.teacher_temperature,
            document_masks=document_masks,
        )

    def lesson(self, tokens_BS: Tensor, domain_B: Tensor, row_B: NDArray[np.int64]) -> Lesson:
        """Classes [N, k], their log-probabilities, and the log of what is left."""
        ids_BTk, log_p_BTk, log_tail_BT = self._cache.take(domain_B.cpu().numpy(), row_B)
        kept = ids_BTk.shape[-1]
        said = TopK(
            torch.from_numpy(ids_BTk).reshape(-1, kept).to(self._device),
            torch.from_numpy(log_p_BTk).reshape(-1, kept).to(self._device),
            torch.from_numpy(log_tail_BT).reshape(-1).to(self._device),
        )
        return Lesson(said, self._settings.share, self._settings.pooling, temperature=1.0)


def check_store(member: Member, store: TokenStore) -> None:
    manifest = store.manifest
    if member.tokenizer_hash != manifest.tokenizer_hash:
        raise EnsembleError(
            f"teacher {member.folder} was trained with another tokenizer ({member.tokenizer_hash[:12]}) than the one "
            f"of the token store ({manifest.tokenizer_hash[:12]}): prepare the data with the teachers' tokenizer"
        )


def _check_plain_head(head: Head, member: Member) -> None:
    if head.bias is not None or head.softcap is not None:
        what = "a bias" if head.bias is not None else "a cap on its logits"
        raise EnsembleError(
            f"teacher {member.folder} has {what} in its output layer, which the fused loss does not form: make a cache "
            "of its predictions (`mixwright distill prepare` with logits.top_k)"
        )
