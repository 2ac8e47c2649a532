"""Rows from nodes with the token store to nodes without: the Ray actor, and how a node's agent uses it.

Each agent (`launch/feed_agent.py`) has an actor of its own, which ends with it. One call is for the rows of many steps,
and they are *returned*, so that they belong to the caller and outlive the actor (spec/mixing.md 3.3). It has no state:
killed, it is restarted by Ray, the calls under way are made again, and the rows are the same.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions
from numpy.typing import NDArray

from mixwright.data_mixing.answers import Answer, failure, one_line, unpack
from mixwright.data_mixing.errors import MixingError, ServiceUnavailable
from mixwright.data_mixing.manifest import MANIFEST
from mixwright.data_mixing.store import TokenStore

STORE_RESOURCE = "mixwright_store"
"""Nodes with the data say so: `ray start --resources='{"mixwright_store": 1}'`. Without any such node, all count."""
_SHARE = 0.001


class FeedActor:
    """Reads the store in `store_folder` of its node. Answers are arrays, or plain data as of the controller."""

    def __init__(self, store_folder: str) -> None:
        self._folder = Path(store_folder)
        self._store: TokenStore | None = None

    def describe(self) -> Answer:
        """The manifest's text, the tokenizer's files by name (base64), and who answers."""
        try:
            store = self._open()
        except MixingError as error:
            return failure(error)
        files = sorted(path for path in store.tokenizer_folder.iterdir() if path.is_file())
        tokenizer = {path.name: base64.b64encode(path.read_bytes()).decode() for path in files}
        return {"ok": {"manifest": (self._folder / MANIFEST).read_text(), "tokenizer": tokenizer, "pid": os.getpid()}}

    def rows(self, split: str, refs_2n: NDArray[np.int64]) -> Answer | NDArray[Any]:
        """Rows (domain refs_2n[0, i], row refs_2n[1, i]) in order: [n, T+1] of the store's dtype."""
        try:
            return self._open().gather(refs_2n[0], refs_2n[1], split)
        except MixingError as error:
            return failure(error)

    def _open(self) -> TokenStore:
        self._store = self._store or TokenStore.open(self._folder)
        return self._store


class Feed:
    """An actor as its agent holds it, in a process that is attached to the cluster. Safe to use from threads."""

    def __init__(self, store_folder: Path, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        share = {STORE_RESOURCE: _SHARE} if STORE_RESOURCE in ray.cluster_resources() else {}
        options = ray.remote(FeedActor).options(
            num_cpus=0, resources=share, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD"
        )
        self._actor = options.remote(str(store_folder))

    def describe(self) -> Answer:
        """Raises ServiceUnavailable when there is no answer in time, and what is wrong with the store."""
        return unpack(self._get(self._actor.describe.remote()))

    def ask(self, split: str, refs_2n: NDArray[np.int64]) -> Any:
        """A call under way, for `take`."""
        return self._actor.rows.remote(split, refs_2n)

    def take(self, call: Any) -> NDArray[Any]:
        """The rows of a call: a view of this node's object store, read-only. Raises as `describe` does."""
        found = self._get(call)
        if isinstance(found, dict):
            unpack(found)
        rows: NDArray[Any] = found
        return rows

    def _get(self, call: Any) -> Any:
        try:
            return ray.get(call, timeout=self._timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise ServiceUnavailable(f"the feed actor gave no answer within {self._timeout_s:g} s") from None
        except ray.exceptions.RayError as error:
            raise ServiceUnavailable(f"the feed actor failed: {one_line(error)}") from None
