"""One way of feeding a rank, measured in this process; started by bench_loaders with the interpreter that has it.

    python loader_providers.py PROVIDER {prepare|measure|resume|error} FOLDER ROWS_PER_BATCH

Imports nothing of ours outside of `mixwright`, so that peers can live in an environment of their own. Every provider
yields int64 batches [B, T+1]; the first token of a row is its domain. Prints one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEED = 7
EPOCH_SAMPLES = 1_200_000
RESUME_SAMPLES = 1_000_000 // 512 * 512
ERROR_SAMPLES = 100_000 // 512 * 512
MEASURE_S = 4.0

Batches = Iterator[Any]
Provider = Callable[[Path, int, int], Batches]
"""From (folder, rows of a batch, samples that were read before) to batches; `prepare` may have left a state there."""


def shares(folder: Path) -> dict[str, float]:
    """Proportion of each domain, in order."""
    found: dict[str, float] = json.loads((folder / "shares.json").read_text())
    return found


def arrays(folder: Path) -> list[np.ndarray]:
    """Rows of each domain, mapped."""
    return [np.load(folder / "npy" / f"{name}.npy", mmap_mode="r") for name in shares(folder)]


# --- mixwright ---------------------------------------------------------------------------------------------------


def mixwright(folder: Path, size: int, done: int) -> Batches:
    """The whole path: journal, leader, plan, digests, reports, prefetch thread."""
    from mixwright.data_mixing.loader import NewRun, open_loader
    from mixwright.data_mixing.store import TokenStore

    new = NewRun({"kind": "static", "mixture": shares(folder)}, size, EPOCH_SAMPLES // size, SEED)
    loader = open_loader(
        folder / f"run-{size}",
        TokenStore.open(folder / "store"),
        begin=new,
        micro_batch_rows=size,
        start_step=done // size,
    )
    with loader:
        for step in loader:
            yield step.micro_batches[0].tokens_BS
            loader.end_step()


def prepare_mixwright(folder: Path, size: int) -> None:
    """A run with a checkpoint after RESUME_SAMPLES; what its digest is does not matter for the time to go on."""
    from mixwright.data_mixing.entries import Checkpoint
    from mixwright.data_mixing.journal import Journal

    next(mixwright(folder, size, 0))
    checkpoint = Checkpoint(step=RESUME_SAMPLES // size, tag="bench", digest="0" * 16)
    Journal(folder / f"run-{size}" / "journal", "bench").append(checkpoint)


# --- mosaicml-streaming ------------------------------------------------------------------------------------------


def import_streaming() -> Any:
    """The package; it imports torchvision, whose binary operators (not used here) fail to load beside a CPU torch."""
    import torch

    schemas = {"nms": "(Tensor a, Tensor b, float c) -> Tensor", "qnms": "(Tensor a, Tensor b, float c) -> Tensor"}
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for name, schema in schemas.items():
            torch.library.define(f"torchvision::{name}", schema)
    import streaming

    return streaming


def streaming(folder: Path, size: int, done: int) -> Batches:
    """StreamingDataset over local, uncompressed MDS shards, one Stream a domain, `py1e` shuffle, no worker."""
    library = import_streaming()
    library.base.util.clean_stale_shared_memory()
    streams = [library.Stream(local=str(folder / "mds" / n), proportion=p) for n, p in shares(folder).items()]
    dataset = library.StreamingDataset(
        streams=streams, epoch_size=EPOCH_SAMPLES, shuffle=True, shuffle_seed=SEED, batch_size=size,
        num_canonical_nodes=1,
    )  # fmt: skip
    loader = library.StreamingDataLoader(dataset, batch_size=size, num_workers=0, collate_fn=stack_tokens)
    if done:
        loader.load_state_dict(json.loads((folder / "streaming.json").read_text()))
    yield from loader


def stack_tokens(samples: list[dict[str, np.ndarray]]) -> Any:
    import torch

    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))


def prepare_streaming(folder: Path, size: int) -> None:
    if (folder / "mds").exists():
        return
    library = import_streaming()
    for name, rows_NW in zip(shares(folder), arrays(folder), strict=True):
        columns = {"tokens": f"ndarray:uint16:{rows_NW.shape[1]}"}
        with library.MDSWriter(out=str(folder / "mds" / name), columns=columns) as writer:
            for row_W in rows_NW:
                writer.write({"tokens": np.asarray(row_W)})
    state = {
        "epoch": 0, "sample_in_epoch": RESUME_SAMPLES, "num_canonical_nodes": 1, "shuffle_seed": SEED,
        "initial_physical_nodes": 1,
    }  # fmt: skip
    (folder / "streaming.json").write_text(json.dumps(state))


# --- Grain -------------------------------------------------------------------------------------------------------


def grain(folder: Path, size: int, done: int) -> Batches:
    """MapDataset of mapped arrays, shuffled and repeated, MapDataset.mix, batch; read threads as Grain sets them."""
    import grain as library

    parts = [library.MapDataset.source(rows_NW).shuffle(seed=SEED).repeat() for rows_NW in arrays(folder)]
    mixed = library.MapDataset.mix(parts, weights=list(shares(folder).values()))
    iterator = iter(mixed.batch(size, batch_fn=stack_rows).to_iter_dataset())
    if done:
        iterator.set_state({"next_index": done // size})
    yield from iterator


def stack_rows(rows: Any) -> np.ndarray:
    return np.stack(rows).astype(np.int64)


# --- torchdata ---------------------------------------------------------------------------------------------------


class MappedRows:
    """All domains behind one another; a batch is gathered at once (`__getitems__`)."""

    def __init__(self, folder: Path) -> None:
        self._parts = arrays(folder)
        self._starts = np.cumsum([0, *map(len, self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitems__(self, indices: list[int]) -> np.ndarray:
        index_n = np.asarray(indices)
        part_n = np.searchsorted(self._starts, index_n, side="right") - 1
        result_NW = np.empty((len(index_n), self._parts[0].shape[1]), np.int64)
        for part in np.unique(part_n):
            chosen = part_n == part
            result_NW[chosen] = self._parts[part][index_n[chosen] - self._starts[part]]
        return result_NW


class NoRows(MappedRows):
    """The same numbers of rows without reading any, to come to a state quickly."""

    def __getitems__(self, indices: list[int]) -> np.ndarray:
        return np.zeros((1, 1), np.int64)


def stateful_loader(folder: Path, size: int, rows: MappedRows) -> Any:
    import torch
    from torch.utils.data import WeightedRandomSampler
    from torchdata.stateful_dataloader import StatefulDataLoader

    sizes = [len(rows_NW) for rows_NW in arrays(folder)]
    weight_n = np.concatenate([np.full(n, p / n) for n, p in zip(sizes, shares(folder).values(), strict=True)])
    generator = torch.Generator().manual_seed(SEED)
    sampler = WeightedRandomSampler(torch.from_numpy(weight_n), EPOCH_SAMPLES, replacement=True, generator=generator)
    return StatefulDataLoader(rows, batch_size=size, sampler=sampler, collate_fn=torch.from_numpy, num_workers=0)


def torchdata(folder: Path, size: int, done: int) -> Batches:
    """StatefulDataLoader over mapped arrays with batched access, WeightedRandomSampler with replacement, no worker."""
    import torch

    loader = stateful_loader(folder, size, MappedRows(folder))
    if done:
        loader.load_state_dict(torch.load(folder / f"torchdata-{size}.pt", weights_only=False))
    while True:
        yield from loader


def prepare_torchdata(folder: Path, size: int) -> None:
    import torch

    loader = stateful_loader(folder, size, NoRows(folder))
    for _ in itertools.islice(loader, RESUME_SAMPLES // size):
        pass
    torch.save(loader.state_dict(), folder / f"torchdata-{size}.pt")


# --- datasets ----------------------------------------------------------------------------------------------------


def datasets_interleave(folder: Path, size: int, done: int) -> Batches:
    """interleave_datasets of our Arrow files, shuffled and repeated as tables (it is 15 times faster than as streams).

    Batches are read in numpy format; going on is `skip`.
    """
    import datasets

    parts = []
    for name, share in shares(folder).items():
        files = [datasets.Dataset.from_file(str(file)) for file in sorted((folder / "store" / name).glob("train-*"))]
        table = datasets.concatenate_datasets(files)
        parts.append(table.shuffle(seed=SEED).repeat(math.ceil(1.05 * EPOCH_SAMPLES * share / len(table))))
    mixed = datasets.interleave_datasets(parts, probabilities=list(shares(folder).values()), seed=SEED)
    for batch in mixed.with_format("numpy").skip(done).iter(batch_size=size):
        yield batch["tokens"].astype(np.int64)


# --- measuring ---------------------------------------------------------------------------------------------------

PROVIDERS: dict[str, tuple[Provider, str, Callable[[Path, int], None] | None]] = {
    "mixwright": (mixwright, "mixwright.data_mixing", prepare_mixwright),
    "mosaicml-streaming": (streaming, "streaming", prepare_streaming),
    "grain": (grain, "grain", None),
    "torchdata": (torchdata, "torchdata", prepare_torchdata),
    "datasets": (datasets_interleave, "datasets", None),
}
"""Function, the package that it needs, and what is to be done once before."""


def import_provider(name: str) -> None:
    """Import what the provider needs, so that imports are not measured."""
    match name:
        case "mixwright":
            import mixwright.data_mixing.loader  # noqa: F401
        case "mosaicml-streaming":
            import_streaming()
        case "grain":
            import grain  # noqa: F401
        case "torchdata":
            import torchdata.stateful_dataloader  # noqa: F401
        case "datasets":
            import datasets  # noqa: F401


def memory_mib() -> float:
    """Anonymous and shared memory of this process; mapped files, which the page cache holds anyway, do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024


def measure(provider: Provider, folder: Path, size: int) -> dict[str, float]:
    before, began = memory_mib(), time.perf_counter()
    batches = provider(folder, size, 0)
    first = np.asarray(next(batches))
    start_s = time.perf_counter() - began
    assert first.shape[0] == size
    assert first.dtype == np.int64
    num_batches, peak, began = 0, before, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < MEASURE_S:
        next(batches)
        num_batches += 1
        if num_batches % 32 == 0:
            peak = max(peak, memory_mib())
    peak = max(peak, memory_mib())
    rate = num_batches * size * (first.shape[1] - 1) / elapsed
    return {"tokens_per_s": rate, "start_s": start_s, "memory_mib": peak - before}


def resume(provider: Provider, folder: Path, size: int) -> dict[str, float]:
    began = time.perf_counter()
    next(provider(folder, size, RESUME_SAMPLES))
    return {"resume_s": time.perf_counter() - began}


def error(provider: Provider, folder: Path, size: int) -> dict[str, float]:
    """Largest |rows read - rows wanted| of a domain after ERROR_SAMPLES rows."""
    count_G = np.zeros(len(shares(folder)), np.int64)
    for batch in itertools.islice(provider(folder, size, 0), ERROR_SAMPLES // size):
        count_G += np.bincount(np.asarray(batch)[:, 0], minlength=len(count_G))
    return {"error_rows": float(np.abs(count_G - ERROR_SAMPLES * np.array(list(shares(folder).values()))).max())}


def version(package: str) -> str:
    from importlib import metadata

    return metadata.version(package)


MEASURES = {"measure": measure, "resume": resume, "error": error}


def main() -> None:
    name, what, folder, size = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    provider, _, prepare = PROVIDERS[name]
    import_provider(name)
    result: dict[str, Any] = {"version": version(name)}
    if what in MEASURES:
        result |= MEASURES[what](provider, folder, size)
    elif prepare is not None:
        prepare(folder, size)
    print(json.dumps(result), flush=True)
    os._exit(0)  # threads of a half-read loader are not waited for


if __name__ == "__main__":
    main()
