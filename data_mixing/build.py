"""The stages of making a store: choose documents, make the tokenizer, tokenise, write rows, describe.

Each stage is a list of tasks that are spread over processes; a task whose result is there is not run again.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.corpora import CorporaConfig
from mixwright.data_mixing.manifest import SPLITS, Manifest, RowFile, fingerprint
from mixwright.data_mixing.scan import ScanTask, Task, narrow, read_scan, run_scan
from mixwright.data_mixing.selection import DROPPED, Scan, Selection, concatenate, excerpt_bytes, select
from mixwright.data_mixing.shards import RowShape, plan_shards, read_row_file, row_shape, run_shard
from mixwright.data_mixing.sources import DomainInput, plan_tasks
from mixwright.data_mixing.staging import is_complete
from mixwright.data_mixing.summary import check_filled, domain_manifest, store_fingerprint
from mixwright.data_mixing.tokenizer import load_tokenizer, save_existing, save_trained, tokenizer_hash, train_tokenizer
from mixwright.data_mixing.tokens import ExcerptTask, TokenFile, TokenTask, read_excerpts, read_token_file, run_tokens
from mixwright.data_mixing.workers import Workers

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the work done, and the total work (bytes of source, or rows)."""


class _HasResult(Protocol):
    @property
    def result(self) -> Path: ...

    @property
    def work(self) -> int: ...


Staged = TypeVar("Staged", bound=_HasResult)


class Build:
    """One preparation in the folder `building`; `store` in it becomes the output. Call the stages in order."""

    def __init__(
        self, config: CorporaConfig, inputs: Sequence[DomainInput], building: Path, workers: Workers, progress: Progress
    ) -> None:
        self.config, self.inputs, self.building = config, inputs, building
        self.workers, self.progress = workers, progress
        self.store = building / "store"
        self.tokenizer_folder = self.store / "tokenizer"
        self.tasks: list[list[Task]] = []
        self.scans: list[list[Scan]] = []
        self.selections: list[Selection] = []

    def plan(self) -> None:
        """Cut the sources into tasks; streams are fetched for that."""
        self.progress("looking at the sources", 0, 1)
        self.tasks = plan_tasks(self.config, self.inputs, self.building / "spool")
        self.progress("looking at the sources", 1, 1)

    def choose_documents(self) -> None:
        """Read everything once; drop duplicates, short ones and what is over the limits; assign splits."""
        stop, seed = self.config.on_bad_document == "stop", self.config.seed
        scan_tasks = [
            [ScanTask(task, self.building / "scan" / f"{task.index:06d}.npz", seed, stop) for task in tasks]
            for tasks in self.tasks
        ]
        self._run("reading", run_scan, scan_tasks)
        self.scans = [[read_scan(task.result) for task in tasks] for tasks in scan_tasks]
        sources = [item.source for item in self.inputs]
        self.selections = select([concatenate(scans) for scans in self.scans], sources, self.config.split)

    def make_tokenizer(self) -> None:
        """Train or copy the tokenizer, unless that is done."""
        if self.tokenizer_folder.exists():
            return
        part = self.building / "tokenizer.part"
        shutil.rmtree(part, ignore_errors=True)
        trained = self.config.tokenizer.train
        if trained is None:
            save_existing(self.config.tokenizer, part)
        else:
            self.progress("training the tokenizer", 0, 1)
            excerpts = list(self._excerpts(trained.max_bytes))  # an error in here is ours, not the trainer's
            save_trained(train_tokenizer(excerpts, trained.vocab_size), part)
            self.progress("training the tokenizer", 1, 1)
        self.store.mkdir(exist_ok=True)
        part.rename(self.tokenizer_folder)

    def content_key(self) -> str:
        """Fingerprint of what the rows follow from: documents in order with their splits, tokenizer, shape."""
        documents = {}
        for item, scans, selection in zip(self.inputs, self.scans, self.selections, strict=True):
            kept_n = selection.split_n != DROPPED
            identity = concatenate(scans).identity_n2[kept_n].tobytes()
            documents[item.name] = hashlib.sha256(identity + selection.split_n[kept_n].tobytes()).hexdigest()
        shape = astuple(self._shape)
        return fingerprint({"documents": list(documents.items()), "tokenizer": self._tokenizer_hash, "shape": shape})

    def tokenise(self) -> list[tuple[TokenFile, ...]]:
        """Tokens of all documents that are kept, by domain; raises DataError when a domain fills no row."""
        token_tasks = [self._token_tasks(domain) for domain in range(len(self.inputs))]
        self._run("tokenising", run_tokens, token_tasks)
        token_files = [tuple(read_token_file(task.result) for task in tasks) for tasks in token_tasks]
        for item, files, scans, selection in zip(self.inputs, token_files, self.scans, self.selections, strict=True):
            check_filled(item.name, files, concatenate(scans), selection, self._shape.width)
        return token_files

    def write_rows(self, token_files: Sequence[tuple[TokenFile, ...]]) -> list[list[tuple[RowFile, ...]]]:
        """The row files by domain and split."""
        shard_tasks = [
            plan_shards(files, split, self._shape, self.store / item.name, self.building / "rows" / item.name)
            for item, files in zip(self.inputs, token_files, strict=True)
            for split in range(len(SPLITS))
        ]
        self._run("writing", run_shard, shard_tasks)
        row_files = [tuple(read_row_file(task.result) for task in tasks) for tasks in shard_tasks]
        return [row_files[i : i + len(SPLITS)] for i in range(0, len(row_files), len(SPLITS))]

    def describe(
        self,
        token_files: Sequence[tuple[TokenFile, ...]],
        row_files: Sequence[Sequence[tuple[RowFile, ...]]],
        signature: str,
    ) -> Manifest:
        """The manifest of the finished store."""
        tokenizer, shape = load_tokenizer(self.tokenizer_folder), self._shape
        domains = tuple(
            domain_manifest(item, concatenate(scans), selection, files, rows, shape.width)
            for item, scans, selection, files, rows in zip(
                self.inputs, self.scans, self.selections, token_files, row_files, strict=True
            )
        )
        return Manifest(
            fingerprint=store_fingerprint(domains, shape.width, shape.dtype, self._tokenizer_hash),
            sequence_length=self.config.sequence_length,
            dtype=shape.dtype,
            rows_per_file=shape.rows_per_file,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_hash=self._tokenizer_hash,
            domains=domains,
            config=self.config.determining(),
            content_key=self.content_key(),
            source_signature=signature,
        )

    @functools.cached_property
    def _tokenizer_hash(self) -> str:
        return tokenizer_hash(self.tokenizer_folder)

    @functools.cached_property
    def _shape(self) -> RowShape:
        dtype = load_tokenizer(self.tokenizer_folder).dtype
        return row_shape(self.config.sequence_length, dtype, self.config.shard_bytes)

    def _excerpts(self, max_bytes: int) -> Iterator[str]:
        """Text to train the tokenizer on: an equal share of each domain's training documents."""
        share = max_bytes // len(self.inputs)
        tasks = []
        for domain, selection in enumerate(self.selections):
            joined = concatenate(self.scans[domain])
            take_n = excerpt_bytes(joined.rank_n, joined.num_bytes_n, selection.split_n == 0, share)
            for task, scan, taken_m in self._by_task(domain, take_n):
                needed, left_m = narrow(task, scan, taken_m > 0)
                tasks += [ExcerptTask(needed, taken_m[left_m])] if needed.units else []
        return itertools.chain.from_iterable(self.workers.map(read_excerpts, tasks))

    def _token_tasks(self, domain: int) -> list[TokenTask]:
        folder, tokenizer = self.tokenizer_folder, self._tokenizer_hash
        tasks = []
        for task, scan, split_m in self._by_task(domain, self.selections[domain].split_n):
            needed, left_m = narrow(task, scan, split_m != DROPPED)
            result = self.building / "tokens" / f"{task.index:06d}.json"
            tasks.append(TokenTask(needed, split_m[left_m], scan.identity_n2[left_m], folder, tokenizer, result))
        return tasks

    def _by_task(self, domain: int, values_n: NDArray[Any]) -> Iterator[tuple[Task, Scan, NDArray[Any]]]:
        """Each task of a domain with its scan and the values of its documents."""
        scans = self.scans[domain]
        parts = np.split(values_n, np.cumsum([len(scan) for scan in scans])[:-1])
        return zip(self.tasks[domain], scans, parts, strict=True)

    def _run(self, stage: str, function: Callable[[Staged], None], tasks: Iterable[Sequence[Staged]]) -> None:
        """Run the tasks that have no result yet."""
        every = list(itertools.chain.from_iterable(tasks))
        pending = [task for task in every if not is_complete(task.result)]
        total = sum(task.work for task in every)
        done = total - sum(task.work for task in pending)
        self.progress(stage, done, total)
        for task, _ in zip(pending, self.workers.map(function, pending), strict=True):
            done += task.work
            self.progress(stage, done, total)
