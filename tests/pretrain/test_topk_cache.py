"""Predictions of teachers on disk: what is kept, that it is whole, whose it is, interruptions."""

from __future__ import annotations

import itertools
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixwright.data_mixing.extended import extend_store
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.distill import topk_cache
from mixwright.pretrain.distill.config import DistillConfig, LogitsConfig
from mixwright.pretrain.distill.pipeline import prepare_student
from mixwright.pretrain.distill.teaching import open_teaching
from mixwright.pretrain.distill.topk_cache import TopKCache, bytes_per_token, write_cache
from mixwright.pretrain.ensemble.member import Member, load_member
from mixwright.pretrain.ensemble.pooling import pool
from mixwright.pretrain.errors import EnsembleError
from tests.pretrain.tiny import tiny_config

TOP = 6


@pytest.fixture
def store(tiny_store: Path) -> TokenStore:
    return TokenStore.open(tiny_store)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_cache, "CHUNK_TOKENS", 16 * 100)


def write(members: list[Member], store: TokenStore, folder: Path, **changes: Any) -> TopKCache:
    options: dict[str, Any] = {"pooling": "logits", "temperature": 1.3, "top_k": TOP, **changes}
    return write_cache(members, store, folder=folder, **options)


def whole_log_p(members: list[Member], rows_nS: np.ndarray, pooling: Any, temperature: float) -> torch.Tensor:
    """Log-probabilities of all classes, float64 [n, T, V]."""
    tokens = torch.from_numpy(np.asarray(rows_nS, dtype=np.int64))
    with torch.no_grad():
        logits = [load_member(m).causal_lm(input_ids=tokens[:, :-1]).logits.double() for m in members]
    return torch.log_softmax(pool(logits, pooling) / temperature, -1)


@pytest.mark.parametrize("pooling", ["logits", "arithmetic"])
def test_the_likeliest_classes_are_kept_and_the_mass_of_all_others_is_exact(
    members: list[Member], store: TokenStore, tmp_path: Path, pooling: Any
) -> None:
    cache = write(members, store, tmp_path, pooling=pooling)
    domain_n, row_n = np.array([2, 0, 1, 0]), np.array([5, 160, 3, 0])
    ids, log_p, log_tail = cache.take(domain_n, row_n)
    expected = whole_log_p(members, store.gather(domain_n, row_n), pooling, 1.3)
    top = expected.topk(TOP, dim=-1)
    np.testing.assert_allclose(log_p, top.values.numpy(), atol=2e-5)
    np.testing.assert_allclose(np.take_along_axis(expected.numpy(), ids, 2), log_p, atol=2e-5)
    rest = expected.exp().scatter(-1, torch.from_numpy(ids), 0).sum(-1)
    np.testing.assert_allclose(np.exp(log_tail), rest.numpy(), rtol=1e-4)
    np.testing.assert_allclose(np.exp(log_p.astype(np.float64)).sum(-1) + np.exp(log_tail), 1, atol=1e-6)
    assert np.exp(log_tail).mean() > 0.1  # what a silent normalisation would hide


def test_all_classes_leave_nothing(members: list[Member], store: TokenStore, tmp_path: Path) -> None:
    vocabulary = store.manifest.vocab_size
    _, log_p, log_tail = write(members[:1], store, tmp_path, top_k=vocabulary).take(np.array([0]), np.array([0]))
    assert (log_tail == -np.inf).all()
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, atol=1e-5)


def test_an_interrupted_cache_goes_on_and_says_when_it_is_not_complete(
    members: list[Member], store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(members, store, tmp_path / "whole")
    calls: list[int] = []
    inner = topk_cache._predict

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return inner(*arguments)

    monkeypatch.setattr(topk_cache, "_predict", failing)
    with pytest.raises(KeyboardInterrupt):
        write(members, store, tmp_path / "cut")
    with pytest.raises(EnsembleError, match=r"not complete, \d of \d chunks of domain 'letters' are missing"):
        TopKCache.open(tmp_path / "cut", store, members=members, pooling="logits", temperature=1.3)
    again = write(members, store, tmp_path / "cut")
    rows = np.arange(10)
    for one, other in zip(
        again.take(np.zeros(10, int), 17 * rows), whole.take(np.zeros(10, int), 17 * rows), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    chunks = len(list((tmp_path / "whole").rglob("log_tail-*.npy")))
    assert len(calls) == chunks + 1  # two before the interruption were kept


def test_teachers_data_and_settings_are_checked_naming_what_differs(
    members: list[Member], store: TokenStore, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    write(members, store, folder)

    def reopen(**changes: Any) -> None:
        options: dict[str, Any] = {"members": members, "pooling": "logits", "temperature": 1.3, **changes}
        TopKCache.open(folder, options.pop("store", store), **options)

    reopen()
    with pytest.raises(
        EnsembleError, match=r"holds other predictions than are asked for \(temperature: 1.3 there, 1.0"
    ):
        reopen(temperature=1.0)
    with pytest.raises(EnsembleError, match=r"pooling: logits there, arithmetic here"):
        reopen(pooling="arithmetic")
    with pytest.raises(EnsembleError, match=r"members: "):
        reopen(members=[replace(members[0], fingerprint="0"), *members[1:]])
    rows = np.random.default_rng(0).integers(0, 200, (5, 17))
    with pytest.raises(EnsembleError, match=r"domains: "):
        reopen(store=extend_store(store, tmp_path / "more", "synthetic", rows, {}))
    with pytest.raises(EnsembleError, match=r"of the 6 likeliest classes .* not of 7"):
        write(members, store, folder, top_k=7)
    with pytest.raises(EnsembleError, match="no cache of teachers"):
        TopKCache.open(tmp_path / "none", store, members=members, pooling="logits", temperature=1.3)


@pytest.mark.parametrize("top_k", [0, 100_000])
def test_more_classes_than_there_are_is_refused(
    members: list[Member], store: TokenStore, tmp_path: Path, top_k: int
) -> None:
    with pytest.raises(EnsembleError, match=f"top_k is {top_k}, expected 1 to the vocabulary of"):
        write(members, store, tmp_path, top_k=top_k)


def test_a_lost_chunk_is_missed(members: list[Member], store: TokenStore, tmp_path: Path) -> None:
    write(members, store, tmp_path)
    shutil.rmtree(tmp_path / "colours")
    with pytest.raises(EnsembleError, match="chunks of domain 'colours' are missing"):
        TopKCache.open(tmp_path, store, members=members, pooling="logits", temperature=1.3)


@pytest.mark.parametrize("name", ["ids", "log_p"])
def test_a_lost_part_of_a_chunk_is_made_again(
    members: list[Member], store: TokenStore, tmp_path: Path, name: str
) -> None:
    write(members[:1], store, tmp_path)
    (tmp_path / "colours" / f"{name}-00000.npy").unlink()
    with pytest.raises(EnsembleError, match=r"1 of \d chunks of domain 'colours' are missing"):
        TopKCache.open(tmp_path, store, members=members[:1], pooling="logits", temperature=1.3)
    write(members[:1], store, tmp_path).take(np.array([store.index("colours")]), np.array([0]))


@contextmanager
def few_files(more: int) -> Iterator[None]:
    """This process may open `more` files."""
    taken = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    free = (number for number in itertools.count() if number not in taken)
    limit = next(itertools.islice(free, more, None))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_cache_of_many_chunks_needs_few_files(
    members: list[Member], store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk_cache, "CHUNK_TOKENS", 16 * 20)
    monkeypatch.setattr(topk_cache, "OPEN_CHUNKS", 4)
    domain = store.domains()[0]
    row_n = np.arange(domain.num_rows)
    assert len(row_n) / 20 * 3 > 24
    expected = write(members[:1], store, tmp_path).take(np.zeros_like(row_n), row_n)
    with few_files(18):
        cache = TopKCache.open(tmp_path, store, members=members[:1], pooling="logits", temperature=1.3)
        found = cache.take(np.zeros_like(row_n), row_n)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_teachers_see_a_tokens_own_document_where_the_student_does(
    members: list[Member], store: TokenStore, tmp_path: Path
) -> None:
    masked = write(members[:1], store, tmp_path / "masked", temperature=1.0, document_masks=True)
    teacher = load_member(members[0])
    teacher.document_end = store.manifest.eos_id
    row_n = np.arange(store.domains()[0].num_rows)
    rows_nS = np.asarray(store.gather(np.zeros_like(row_n), row_n))
    row_n = row_n[(rows_nS[:, 4:12] == teacher.document_end).any(axis=1)][:4]
    domain_n, tokens_BS = np.zeros_like(row_n), torch.from_numpy(rows_nS[row_n].astype(np.int64))
    with torch.no_grad():
        log_p_NV = torch.log_softmax(teacher.head.logits(teacher.hidden_states(tokens_BS)), -1)
    expected_BTk = log_p_NV.reshape(4, -1, log_p_NV.shape[1]).topk(TOP, dim=-1).values
    _, log_p_BTk, _ = masked.take(domain_n, row_n)
    np.testing.assert_allclose(log_p_BTk, expected_BTk, atol=2e-5)
    _, plain_BTk, _ = write(members[:1], store, tmp_path / "plain", temperature=1.0).take(domain_n, row_n)
    assert np.abs(log_p_BTk - plain_BTk).max() > 0.01


def test_a_cache_is_with_document_masks_or_without(members: list[Member], store: TokenStore, tmp_path: Path) -> None:
    write(members[:1], store, tmp_path)
    options: dict[str, Any] = {"members": members[:1], "pooling": "logits", "temperature": 1.3}
    with pytest.raises(EnsembleError, match=r"document_masks: False there, True here"):
        TopKCache.open(tmp_path, store, **options, document_masks=True)
    noted = json.loads((tmp_path / "cache.json").read_text())
    del noted["key"]["document_masks"]  # as it was noted when there was no choice
    (tmp_path / "cache.json").write_text(json.dumps(noted))
    TopKCache.open(tmp_path, store, **options)
    with pytest.raises(EnsembleError, match=r"document_masks: False there, True here"):
        write(members[:1], store, tmp_path, document_masks=True)


def test_a_student_with_document_masks_is_prepared_a_cache_with_them(
    members: list[Member], store: TokenStore, tmp_path: Path
) -> None:
    def student(masks: bool) -> PretrainConfig:
        base = tiny_config(tmp_path / "runs", store.folder, model__document_masks=masks)
        config = DistillConfig(
            run=Path("run.yaml"),
            folder=tmp_path / "made",
            teachers=(members[0].folder,),
            teacher_temperature=1.0,
            logits=LogitsConfig(top_k=TOP),
        )
        return prepare_student(config, base, lambda line: None, lambda stage, done, total: None)

    plain, masked = student(False), student(True)
    for one, other in ((plain, masked), (masked, plain)):
        open_teaching(one, store, torch.device("cpu"), lambda line: None)
        with pytest.raises(EnsembleError, match="document_masks: "):
            open_teaching(one.model_copy(update={"model": other.model}), store, torch.device("cpu"), lambda line: None)


def test_what_a_token_takes(members: list[Member], store: TokenStore, tmp_path: Path) -> None:
    write(members, store, tmp_path)
    tokens = sum(domain.num_rows for domain in store.domains()) * store.manifest.sequence_length
    size = sum(path.stat().st_size - 128 for path in tmp_path.rglob("*-*.npy"))
    assert size == tokens * bytes_per_token(TOP, store.manifest.vocab_size)
