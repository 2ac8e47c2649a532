"""`mixwright data`: make a token store from text, and look at one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.manifest import SPLITS
from mixwright.launch.ending import EXIT_CTRL_C, EXIT_REFUSED
from mixwright.launch.help_text import examples
from mixwright.launch.json_output import print_json
from mixwright.launch.mix_options import AsJson

# Commands import what they need when they run: `mixwright --help` should not wait for pyarrow.
if TYPE_CHECKING:
    from mixwright.data_mixing.build import Progress as ReportProgress
    from mixwright.data_mixing.manifest import DomainManifest, Manifest

app = typer.Typer(help="Make token stores from text, and look at them.", no_args_is_help=True)

StoreFolder = Annotated[Path, typer.Argument(metavar="STORE", help="folder of a token store")]


@app.command(
    epilog=examples(
        "mixwright data prepare configs/quickstart_corpora.yaml",
        "mixwright data prepare corpora.yaml output=/data/store sequence_length=2048 --replace",
    )
)
def prepare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="corpora configuration (YAML)")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="replace a finished store of other content")] = False,
    as_json: AsJson = False,
) -> None:
    """Tokenise corpora into a store; run it again to continue after an interruption."""
    from mixwright.data_mixing.corpora import load_corpora_config
    from mixwright.data_mixing.prepare import prepare as prepare_store

    corpora = load_corpora_config(config, overrides or [])
    try:
        with _progress_bars() as report:
            prepared = prepare_store(corpora, config.parent.resolve(), replace=replace, progress=report)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command continues from here")
        raise typer.Exit(EXIT_CTRL_C) from None
    if as_json:
        print_json({"made": prepared.made, "output": corpora.output, **stats_of(prepared.manifest)})
    elif prepared.made:
        print_stats(prepared.manifest)
    else:
        typer.echo(f"{corpora.output} is complete and up to date: nothing to do")


@app.command(epilog=examples("mixwright data stats runs/store", "mixwright data stats runs/store --json"))
def stats(store: StoreFolder, as_json: AsJson = False) -> None:
    """Documents, rows and tokens of every domain and split, and what was dropped."""
    from mixwright.data_mixing.store import TokenStore

    manifest = TokenStore.open(store).manifest
    if as_json:
        print_json(stats_of(manifest))
    else:
        print_stats(manifest)


@app.command(
    epilog=examples(
        "mixwright data show runs/store code 17",
        "mixwright data show runs/store code 17 --split validation --ids",
        "mixwright data show runs/store code 17 --json",
    )
)
def show(
    store: StoreFolder,
    domain: Annotated[str, typer.Argument(metavar="DOMAIN")],
    row: Annotated[int, typer.Argument(metavar="ROW")],
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="split of the domain")] = "train",
    ids: Annotated[bool, typer.Option("--ids", help="print token ids instead of text")] = False,
    as_json: AsJson = False,
) -> None:
    """Print one row as text."""
    from mixwright.data_mixing.store import TokenStore
    from mixwright.data_mixing.tokenizer import load_tokenizer

    opened = TokenStore.open(store)
    tokens = opened.rows(domain, split, row, 1)[0].tolist()
    num_rows, text = opened.num_rows(domain, split), load_tokenizer(opened.tokenizer_folder).decode(tokens)
    if as_json:
        place = {"domain": domain, "split": split, "row": row, "num_rows": num_rows}
        print_json({**place, "tokens": tokens, "text": text})
        return
    typer.echo(f"{domain} {split} row {row} of {num_rows}, {len(tokens)} tokens", err=True)
    typer.echo(" ".join(map(str, tokens)) if ids else text)


@app.command(epilog=examples("mixwright data verify runs/store", "mixwright data verify runs/store --json"))
def verify(store: StoreFolder, as_json: AsJson = False) -> None:
    """Read every token and compare it with the manifest; exit code 2 when something differs."""
    from mixwright.data_mixing.store import TokenStore
    from mixwright.data_mixing.verify import verify as verify_store

    opened = TokenStore.open(store)
    total = sum(split.num_rows for domain in opened.manifest.domains for split in domain.splits.values())
    done, problems = 0, []
    with _progress_bars() as report:
        for check in verify_store(opened):
            done += check.num_rows
            report("checking", done, total)
            problems += [f"{store}: {check.what}: {check.problem}"] if check.problem else []
    if as_json:
        print_json({"rows": total, "fingerprint": opened.fingerprint, "problems": problems})
        raise typer.Exit(EXIT_REFUSED if problems else 0)
    if problems:
        raise DataError("\n".join(problems))
    typer.echo(f"{store}: {total:,} rows are as recorded; fingerprint {opened.fingerprint}")


def stats_of(manifest: Manifest) -> dict[str, Any]:
    """What `data stats` knows, as plain data."""
    return {
        "fingerprint": manifest.fingerprint,
        "sequence_length": manifest.sequence_length,
        "vocab_size": manifest.vocab_size,
        "domains": [
            {
                "name": domain.name,
                "splits": {
                    name: split.model_dump(mode="json", exclude={"files"}) for name, split in domain.splits.items()
                },
                "dropped": domain.dropped,
            }
            for domain in manifest.domains
        ],
    }


def print_stats(manifest: Manifest) -> None:
    """The table of `data stats`, what was left out, and a line for every held-out split that holds nothing."""
    title = f"{manifest.sequence_length + 1} tokens per row, vocabulary {manifest.vocab_size:,}"
    table = Table(title=title, title_justify="left")
    table.add_column("domain")
    for column in ("documents", "tokens", "B/token", "train rows", "validation", "test"):
        table.add_column(column, justify="right")
    for domain in manifest.domains:
        table.add_row(*_stats_row(domain))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for line in (*_left_out(manifest), *_warnings(manifest)):
        console.print(line, markup=False)


def _stats_row(domain: DomainManifest) -> list[str]:
    train = domain.splits["train"]
    return [
        escape(domain.name),
        f"{sum(split.num_documents for split in domain.splits.values()):,}",
        f"{sum(split.num_tokens for split in domain.splits.values()):,}",
        f"{train.num_bytes / train.num_tokens:.2f}",
        *(f"{domain.splits[split].num_rows:,}" for split in SPLITS),
    ]


def _left_out(manifest: Manifest) -> Iterator[str]:
    for domain in manifest.domains:
        dropped = domain.dropped
        reasons = {
            "duplicate": dropped.duplicate, "short": dropped.short, "over max_bytes": dropped.over_limit,
            "bad": dropped.bad,
        }  # fmt: skip
        counts = [f"{count:,} {reason}" for reason, count in reasons.items() if count]
        if counts:
            yield f"left out of {domain.name}: {', '.join(counts)}"


def _warnings(manifest: Manifest) -> Iterator[str]:
    for domain in manifest.domains:
        for split, counts in domain.splits.items():
            if counts.num_rows == 0 and manifest.config["split"].get(split, 0) > 0:
                yield f"warning: domain {domain.name!r} has no {split} row ({counts.num_documents} documents)"
        yield from (f"skipped: {example}" for example in domain.dropped.bad_examples)


@contextmanager
def _progress_bars() -> Iterator[ReportProgress]:
    """A progress callback that shows one bar per stage, with the time that is left."""
    columns = (
        TextColumn("{task.description:>22}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done, total=total)

        yield report
