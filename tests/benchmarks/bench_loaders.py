"""Rows of five domains into a rank, beside mosaicml-streaming, Grain, torchdata and datasets, in one run.

    python -m tests.benchmarks.bench_loaders [--rounds 3] [--rows 60000] [--width 1024] [--peers-python PYTHON]

Every provider runs in a process of its own, the rounds take turns; medians. A provider that neither this interpreter
nor `--peers-python` (default: $MIXWRIGHT_PEERS_PYTHON) can import is named and left out. Settings are in
loader_providers.py, above each provider.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import loader_providers
from tests.data_mixing.corpora_for_tests import write_store

SHARES = {"web": 0.45, "code": 0.25, "books": 0.15, "maths": 0.10, "wiki": 0.05}
SIZES = (64, 512)
TIMEOUT_S = 900.0


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_data(folder, arguments.rows, arguments.width)
        pythons = {provider: found_python(provider, arguments.peers_python) for provider in loader_providers.PROVIDERS}
        for provider in [provider for provider, python in pythons.items() if python is None]:
            print(f"{provider}: left out, no interpreter here can import it")
        present = {provider: python for provider, python in pythons.items() if python is not None}
        errors = {provider: prepared(python, provider, folder) for provider, python in present.items()}
        rounds = [
            {provider: one_round(python, provider, folder) for provider, python in present.items()}
            for _ in range(arguments.rounds)
        ]
        print_table(rounds, errors, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--peers-python", default=os.environ.get("MIXWRIGHT_PEERS_PYTHON", ""))
    parser.add_argument("--folder", type=Path)
    return parser.parse_args()


def write_data(folder: Path, num_rows: int, width: int) -> None:
    """The same rows as a token store and as .npy files; the first token of a row is its domain."""
    chance, rows = np.random.default_rng(0), {}
    (folder / "npy").mkdir()
    for index, (name, share) in enumerate(SHARES.items()):
        rows_NW = chance.integers(0, 300, (round(num_rows * share), width + 1), np.uint16)
        rows_NW[:, 0] = index
        np.save(folder / "npy" / f"{name}.npy", rows_NW)
        rows[name] = {"train": rows_NW, "validation": rows_NW[:0], "test": rows_NW[:0]}
    batch = max(1, (4 << 20) // (2 * (width + 1)))
    write_store(folder / "store", rows, rows_per_batch=batch, rows_per_file=batch * 100)
    (folder / "shares.json").write_text(json.dumps(SHARES))


def found_python(provider: str, peers_python: str) -> str | None:
    """The first interpreter that can import what the provider needs."""
    package = loader_providers.PROVIDERS[provider][1]
    check = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    for python in filter(None, (sys.executable, peers_python)):
        if subprocess.run([python, "-c", check], capture_output=True, check=False).returncode == 0:
            return python
    return None


def run(python: str, provider: str, what: str, folder: Path, size: int) -> dict[str, Any]:
    """What the provider's process measured."""
    command = [python, loader_providers.__file__, provider, what, str(folder), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def prepared(python: str, provider: str, folder: Path) -> dict[str, Any]:
    """Make what the provider reads; its proportion error, which is the same in every round."""
    for size in SIZES:
        run(python, provider, "prepare", folder, size)
    return run(python, provider, "error", folder, SIZES[-1])


def one_round(python: str, provider: str, folder: Path) -> dict[str, Any]:
    """Figures for the small batches, and the speed with the large ones."""
    small, large = SIZES
    measured = run(python, provider, "measure", folder, small) | run(python, provider, "resume", folder, small)
    return measured | {"large": run(python, provider, "measure", folder, large)["tokens_per_s"]}


def print_table(
    rounds: list[dict[str, dict[str, Any]]], errors: dict[str, dict[str, Any]], arguments: argparse.Namespace
) -> None:
    print(f"\n{os.cpu_count()} cores {platform.machine()}, load {os.getloadavg()[0]:.1f}, ", end="")
    print(f"Python {platform.python_version()}; {len(SHARES)} domains, {arguments.rows:,} rows of ", end="")
    print(f"{arguments.width:,} + 1 uint16 tokens, int64 batches, {arguments.rounds} rounds in turns, medians")
    print(f"{'M tokens/s, rows a batch:':28}", end="")
    print("".join(f"{size:>9}{'ours is':>9}" for size in SIZES), end="")
    print(f"{'start s':>9}{'resume s':>10}{'error rows':>12}{'MiB':>7}")
    for name in errors:
        rates = [(median(rounds, name, key), median(rounds, "mixwright", key)) for key in ("tokens_per_s", "large")]
        print(f"{name + ' ' + errors[name]['version']:28}", end="")
        print("".join(f"{rate / 1e6:>9.1f}{ours / rate:>8.2f}x" for rate, ours in rates), end="")
        print(f"{median(rounds, name, 'start_s'):>9.2f}{median(rounds, name, 'resume_s'):>10.2f}", end="")
        print(f"{errors[name]['error_rows']:>12.1f}{median(rounds, name, 'memory_mib'):>7.0f}")
    print(f"start, resume (after {loader_providers.RESUME_SAMPLES:,} rows): to the first batch, without imports")
    print(f"error: largest |read - wanted| of a domain after {loader_providers.ERROR_SAMPLES:,} rows")
    print("MiB: anonymous and shared memory at most, beyond that after the imports")


def median(rounds: list[dict[str, dict[str, Any]]], name: str, key: str) -> float:
    return statistics.median(measured[name][key] for measured in rounds)


if __name__ == "__main__":
    main()
