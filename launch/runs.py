"""Which run a command means, and how to open what its journal tells."""

from __future__ import annotations

from pathlib import Path

from mixwright.data_mixing.errors import ConfigError, nearest
from mixwright.data_mixing.history import RunHistory
from mixwright.data_mixing.journal import Journal
from mixwright.data_mixing.snapshot import resume

RUNS = Path("runs")


def find_run(run_dir: Path | None) -> Path:
    """The folder of the run that is named, or else of the only live run under ./runs, or the only one there is.

    Raises ConfigError, listing the runs to choose from.
    """
    if run_dir is None:
        return _only_run()
    if _is_run(run_dir):
        return run_dir
    if not run_dir.is_dir():
        siblings = {str(path) for folder in {run_dir.parent, RUNS} for path in runs_in(folder)}
        raise ConfigError(f"{run_dir}: no such run folder{nearest(str(run_dir), siblings) if siblings else ''}")
    raise ConfigError(f"{run_dir}: holds no run (it has no journal/); training starts one")


def runs_in(folder: Path) -> list[Path]:
    """Run folders directly below `folder`, by name."""
    return sorted(path for path in folder.iterdir() if _is_run(path)) if folder.is_dir() else []


def open_history(run_dir: Path) -> tuple[Journal, RunHistory]:
    """The run as its journal tells it, and the journal to follow it with. Raises JournalError."""
    return resume(run_dir / "journal", writer="reader")


def _is_run(path: Path) -> bool:
    return (path / "journal").is_dir()


def _only_run() -> Path:
    runs = runs_in(RUNS)
    if len(runs) == 1:
        return runs[0]
    if not runs:
        raise ConfigError(f"there is no run under ./{RUNS}; name one with --run RUN_DIR")
    live = [run for run in runs if open_history(run)[1].end is None]
    if len(live) == 1:
        return live[0]
    choices = ", ".join(map(str, live or runs))
    raise ConfigError(f"{len(live)} runs under ./{RUNS} are live; choose one with --run: {choices}")
