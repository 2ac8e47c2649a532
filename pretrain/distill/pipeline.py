"""From teachers to the run of a student: temperature, samples, the store with them, the cache; each made once.

Everything is below one folder, in places named by what decides their content, so equal parts are shared by students and
the same call goes on where it was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mixwright.data_mixing.config_file import validate
from mixwright.data_mixing.extended import extend_store
from mixwright.data_mixing.manifest import fingerprint
from mixwright.data_mixing.plain_data import read_json_object
from mixwright.data_mixing.staging import atomic_file
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.distill.config import DistillConfig
from mixwright.pretrain.distill.sample import SamplingConfig, sample_rows
from mixwright.pretrain.distill.teaching import check_store
from mixwright.pretrain.distill.topk_cache import write_cache
from mixwright.pretrain.ensemble.curve import fit_temperature
from mixwright.pretrain.ensemble.member import Member, check_together, inspect_member
from mixwright.pretrain.errors import EnsembleError

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, what is done of it, and all of it."""

KEY_LENGTH = 12


def prepare_student(config: DistillConfig, base: PretrainConfig, say: Say, progress: Progress) -> PretrainConfig:
    """Everything before the student's first step; returns its run. Raises EnsembleError and DataError."""
    members = [inspect_member(path) for path in config.teachers]
    check_together(members)
    store = TokenStore.open(base.data.store)
    check_store(members[0], store)
    temperature = _temperature(config, members, store, say)
    store = _with_samples(config, members, store, temperature, say, progress)
    cache = _cache(config, members, store, temperature, base.model.document_masks, say, progress)
    return _student(config, base, store, temperature, cache)


def _temperature(config: DistillConfig, members: Sequence[Member], store: TokenStore, say: Say) -> float:
    """The teachers' temperature; a fitted one is kept."""
    if config.teacher_temperature != "fit":
        return config.teacher_temperature
    rows = config.calibration_rows_per_domain
    decides = {"members": _identity(members), "pooling": config.pooling, "store": store.fingerprint, "rows": rows}
    path = config.folder / f"temperature-{_key(decides)}.json"
    if not path.is_file():
        value = fit_temperature(
            members, store, pooling=config.pooling, rows_per_domain=rows, folder=config.folder / "spool"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(json.dumps({"temperature": value, **decides}, indent=1).encode())
    fitted = _recorded(path)
    say(f"temperature of the teachers on the validation split: {fitted:.3f}")
    return fitted


def _recorded(path: Path) -> float:
    try:
        return float(read_json_object(path, strict=True)["temperature"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EnsembleError(f"{path}: not the record of a temperature ({error!r}); remove it to fit it again") from None


def _with_samples(
    config: DistillConfig,
    members: Sequence[Member],
    store: TokenStore,
    temperature: float,
    say: Say,
    progress: Progress,
) -> TokenStore:
    """The store with the teachers' samples as a domain more; the store itself without samples."""
    samples = config.samples
    if samples is None:
        return store
    settings = SamplingConfig(
        num_rows=samples.num_rows,
        batch_rows=samples.batch_rows,
        source=samples.source,
        pooling=config.pooling,
        temperature=temperature * samples.temperature,
        seed=samples.seed,
    )
    manifest = store.manifest
    decides = {"members": _identity(members), "settings": settings.model_dump(mode="json"), "store": store.fingerprint}
    key = _key(decides)
    rows_nS = sample_rows(
        members,
        settings,
        sequence_length=manifest.sequence_length,
        eos_id=manifest.eos_id,
        folder=config.folder / f"samples-{key}",
        progress=lambda done, total: progress("sampling", done, total),
    )
    output = config.folder / f"store-{key}"
    extended = extend_store(store, output, samples.domain, rows_nS, decides)
    say(f"store with {samples.num_rows:,} sampled rows: {output}")
    return extended


def _cache(
    config: DistillConfig,
    members: Sequence[Member],
    store: TokenStore,
    temperature: float,
    document_masks: bool,
    say: Say,
    progress: Progress,
) -> Path | None:
    """The teachers' cached predictions of all training rows of the store, when they are asked for."""
    if config.logits is None or config.logits.top_k is None:
        return None
    top_k = config.logits.top_k
    decides = {
        "members": _identity(members),
        "pooling": config.pooling,
        "temperature": temperature,
        "store": store.fingerprint,
        "top_k": top_k,
        **({"document_masks": True} if document_masks else {}),
    }
    folder = config.folder / f"cache-{_key(decides)}"
    write_cache(
        members,
        store,
        pooling=config.pooling,
        temperature=temperature,
        top_k=top_k,
        folder=folder,
        document_masks=document_masks,
        progress=lambda done, total: progress("caching", done, total),
    )
    say(f"the {top_k} best predictions of the teachers for every token: {folder}")
    return folder


def _student(
    config: DistillConfig, base: PretrainConfig, store: TokenStore, temperature: float, cache: Path | None
) -> PretrainConfig:
    """The student's run, checked as a whole."""
    tree = base.model_dump(mode="json")
    tree["data"] = {"store": str(store.folder)}
    share = config.samples.share if config.samples is not None else 0.0
    if config.policy is not None or config.samples is not None:
        tree["mixing"]["policy"] = config.policy or _mixture(config, store, share)
    if config.real_epochs is not None:
        synthetic = config.samples.domain if config.samples is not None else None
        rows = sum(domain.num_rows for domain in store.domains() if domain.name != synthetic)
        steps = max(round(config.real_epochs * rows / (base.training.rows_per_step * (1 - share))), 1)
        warmup = base.schedule.warmup_steps * steps // base.training.num_steps
        tree["training"]["num_steps"], tree["schedule"]["warmup_steps"] = steps, warmup
        tree["evaluation"]["every"] = min(base.evaluation.every, steps) or steps
    if config.logits is not None:
        tree["distillation"] = {
            "teachers": [str(path) for path in config.teachers],
            "share": config.logits.share,
            "pooling": config.pooling,
            "teacher_temperature": temperature,
            "temperature": config.logits.temperature,
            "cache": None if cache is None else str(cache),
        }
    return validate(PretrainConfig, tree, "student")


def _mixture(config: DistillConfig, store: TokenStore, share: float) -> dict[str, Any]:
    """Real domains by their sizes, the synthetic one by its share: an ordinary policy."""
    assert config.samples is not None
    real = {domain.name: domain.num_rows for domain in store.domains() if domain.name != config.samples.domain}
    total = sum(real.values())
    mixture = {name: (1 - share) * rows / total for name, rows in real.items()}
    return {"kind": "static", "mixture": {**mixture, config.samples.domain: share}}


def _identity(members: Sequence[Member]) -> list[str]:
    return [member.fingerprint for member in members]


def _key(decides: dict[str, Any]) -> str:
    return fingerprint(decides)[:KEY_LENGTH]
