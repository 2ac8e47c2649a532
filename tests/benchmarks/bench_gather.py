"""Random rows out of a token store, beside `datasets` on the same files, in interleaved rounds of one process.

    python -m tests.benchmarks.bench_gather [--rows 200000] [--width 1024] [--domains 1000] [--rounds 7] [--folder DIR]

Writes about 400 MB below --folder (a temporary folder by default, removed at the end), checks that every method
returns the same rows, and prints tokens per second: medians over the rounds, warm page cache, one thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mixwright.data_mixing.row_files import RowFileView, open_rows
from mixwright.data_mixing.store import TokenStore
from tests.data_mixing.corpora_for_tests import write_store

BATCHES = (32, 512)
GATHERS_PER_ROUND = 40
Method = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        console = Console(highlight=False, soft_wrap=True)
        console.print(machine())
        console.print(one_domain(Path(folder) / "one", arguments.rows, arguments.width, arguments.rounds))
        console.print(many_domains(Path(folder) / "many", arguments.domains, arguments.width, arguments.rounds))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--domains", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    return parser.parse_args()


def machine() -> str:
    return (
        f"{os.cpu_count()} cores {platform.machine()}, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, numpy {np.__version__}, pyarrow {pa.__version__}, "
        f"datasets {datasets.__version__}"
    )


# --- one domain ------------------------------------------------------------------------------------------------


def one_domain(folder: Path, num_rows: int, width: int, num_rounds: int) -> Table:
    """`rows` of one domain by every method, in batches of each size."""
    rows_NW = np.random.default_rng(0).integers(0, 300, (num_rows, width), np.uint16)
    empty_NW = rows_NW[:0]
    splits = {"train": rows_NW, "validation": empty_NW, "test": empty_NW}
    batch = max(1, (4 << 20) // rows_NW[0].nbytes)
    store = TokenStore.open(write_store(folder, {"web": splits}, rows_per_batch=batch, rows_per_file=batch * 10_000))
    methods = one_domain_methods(store, folder / "web" / "train-00000.arrow", width, num_rows)
    table = Table(
        title=f"one domain, {num_rows:,} rows of {width:,} uint16 tokens, million tokens/s", title_justify="left"
    )
    table.add_column("method")
    chance, columns = np.random.default_rng(1), []
    for batch_rows in BATCHES:
        draws = [chance.integers(0, num_rows, batch_rows) for _ in range(GATHERS_PER_ROUND)]
        check_equal(methods, draws[0])
        columns.append(median_rates(methods, draws, width, num_rounds))
        table.add_column(f"{batch_rows} rows", justify="right")
        table.add_column("store is", justify="right")
    for name in methods:
        cells = [
            (f"{rates[name] / 1e6:,.0f}", f"{rates['TokenStore.gather'] / rates[name]:.1f} x") for rates in columns
        ]
        table.add_row(escape(name), *(cell for pair in cells for cell in pair))
    return table


def one_domain_methods(store: TokenStore, path: Path, width: int, num_rows: int) -> dict[str, Method]:
    table = datasets.Dataset.from_file(str(path)).with_format("numpy")
    shuffled = table.shuffle(seed=0)
    where = np.argsort(np.asarray(shuffled._indices.column(0)))  # so that it is asked for the same rows
    view = open_rows(path, width, "uint16", num_rows)
    by_batch = RowFileView(None, split_batches(view, num_rows), view.first_row_b)
    return {
        "TokenStore.gather": lambda row_n: store.gather(np.zeros(len(row_n), np.int64), row_n),
        "fallback: a view per batch": by_batch.take,
        "Dataset[list], numpy format": lambda row_n: table[row_n.tolist()]["tokens"],
        "Dataset.shuffle()[list], numpy format": lambda row_n: shuffled[where[row_n].tolist()]["tokens"],
    }


def split_batches(view: RowFileView, num_rows: int) -> tuple[np.ndarray, ...]:
    assert view.strided is not None
    sizes = np.diff([*view.first_row_b, num_rows])
    return tuple(view.strided[i, :size] for i, size in enumerate(sizes))


# --- many domains ----------------------------------------------------------------------------------------------


def many_domains(folder: Path, num_domains: int, width: int, num_rounds: int) -> Table:
    """Rows of mixed domains in one call, beside one `Dataset` per domain; and what opening costs."""
    chance, rows_each = np.random.default_rng(2), 16
    rows_NW = chance.integers(0, 300, (num_domains * rows_each, width), np.uint16)
    empty_NW = rows_NW[:0]
    write_store(
        folder,
        {
            f"d{i}": {"train": rows_NW[i * rows_each : (i + 1) * rows_each], "validation": empty_NW, "test": empty_NW}
            for i in range(num_domains)
        },
        rows_per_batch=rows_each,
        rows_per_file=rows_each,
    )
    begin = time.perf_counter()
    store = TokenStore.open(folder)
    opened_s = time.perf_counter() - begin
    store.gather(np.arange(num_domains), np.zeros(num_domains, np.int64))
    touched_s = time.perf_counter() - begin - opened_s
    tables = [datasets.Dataset.from_file(str(f)).with_format("numpy") for f in files_in_order(folder, num_domains)]

    def from_store(pick_n: np.ndarray) -> np.ndarray:
        return store.gather(pick_n // rows_each, pick_n % rows_each)

    def from_tables(pick_n: np.ndarray) -> np.ndarray:
        return np.stack([tables[pick // rows_each][pick % rows_each]["tokens"] for pick in pick_n.tolist()])

    methods: dict[str, Method] = {"TokenStore.gather": from_store, "a Dataset per domain, row by row": from_tables}
    table = Table(
        title=f"{num_domains:,} domains, million tokens/s; opened in {opened_s * 1e3:.0f} ms, one row of each first "
        f"read in {touched_s * 1e3:.0f} ms",
        title_justify="left",
    )
    table.add_column("method")
    columns = []
    for batch_rows in BATCHES:
        draws = [chance.integers(0, num_domains * rows_each, batch_rows) for _ in range(GATHERS_PER_ROUND)]
        check_equal(methods, draws[0])
        columns.append(median_rates(methods, draws, width, num_rounds))
        table.add_column(f"{batch_rows} rows", justify="right")
    for name in methods:
        table.add_row(name, *(f"{rates[name] / 1e6:,.0f}" for rates in columns))
    return table


def files_in_order(folder: Path, num_domains: int) -> list[Path]:
    return [folder / f"d{i}" / "train-00000.arrow" for i in range(num_domains)]


# --- timing ----------------------------------------------------------------------------------------------------


def check_equal(methods: Mapping[str, Method], row_n: np.ndarray) -> None:
    """A method that is fast because it returns something else is no method."""
    expected = next(iter(methods.values()))(row_n)
    for name, method in methods.items():
        assert np.array_equal(method(row_n), expected), name


def median_rates(
    methods: Mapping[str, Method], draws: list[np.ndarray], width: int, num_rounds: int
) -> dict[str, float]:
    """Tokens per second of each method: the median over rounds in which the methods take turns."""
    rates: dict[str, list[float]] = {name: [] for name in methods}
    num_tokens = sum(map(len, draws)) * width
    for _ in range(num_rounds):
        for name, method in methods.items():
            begin = time.perf_counter()
            run_all(method, draws)
            rates[name].append(num_tokens / (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in rates.items()}


def run_all(method: Method, draws: list[Any]) -> None:
    for row_n in draws:
        method(row_n)


if __name__ == "__main__":
    main()
