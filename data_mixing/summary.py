"""What a manifest says of each domain, and the fingerprints that identify its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.manifest import SPLITS, DomainManifest, Dropped, RowFile, SplitCounts, fingerprint
from mixwright.data_mixing.scan import MAX_BAD_EXAMPLES
from mixwright.data_mixing.selection import Scan, Selection
from mixwright.data_mixing.sources import DomainInput
from mixwright.data_mixing.tokens import TokenFile


def check_filled(name: str, token_files: Sequence[TokenFile], scan: Scan, selection: Selection, width: int) -> None:
    """Raises DataError, with the numbers, when a domain has no full training row."""
    num_tokens = sum(file.num_tokens[0] for file in token_files)
    if num_tokens >= width:
        return
    counts = [int((selection.split_n == index).sum()) for index in range(len(SPLITS))]
    raise DataError(
        f"domain {name!r} is empty: {num_tokens} training tokens do not fill one row of {width}; documents: "
        f"{counts[0]} train, {counts[1]} validation, {counts[2]} test; dropped: {selection.num_duplicate} duplicate, "
        f"{scan.num_short} short, {selection.num_over_limit} over max_bytes, "
        f"{scan.num_bad} bad"
    )


def domain_manifest(
    item: DomainInput,
    scan: Scan,
    selection: Selection,
    token_files: Sequence[TokenFile],
    row_files: Sequence[tuple[RowFile, ...]],
    width: int,
) -> DomainManifest:
    """The manifest's entry of one domain; `row_files` are those of each split."""
    splits = {
        split: _split_counts(scan, selection, token_files, row_files[index], index, width)
        for index, split in enumerate(SPLITS)
    }
    return DomainManifest(
        name=item.name,
        fingerprint=domain_fingerprint(splits["train"].files),
        cap=item.source.cap,
        num_source_files=len(item.files),
        splits=splits,
        dropped=Dropped(
            duplicate=selection.num_duplicate,
            short=scan.num_short,
            over_limit=selection.num_over_limit,
            bad=scan.num_bad,
            bad_examples=scan.bad[:MAX_BAD_EXAMPLES],
        ),
    )


def _split_counts(
    scan: Scan,
    selection: Selection,
    token_files: Sequence[TokenFile],
    files: tuple[RowFile, ...],
    index: int,
    width: int,
) -> SplitCounts:
    member_n = selection.split_n == index
    num_tokens = sum(file.num_tokens[index] for file in token_files)
    return SplitCounts(
        num_documents=int(np.count_nonzero(member_n)),
        num_bytes=int(scan.num_bytes_n[member_n].sum()),
        num_tokens=num_tokens,
        num_rows=num_tokens // width,
        num_tail_tokens=num_tokens % width,
        files=files,
    )


def domain_fingerprint(train_files: Sequence[RowFile]) -> str:
    """Identity of a domain's training tokens."""
    return fingerprint([file.sha256 for file in train_files])


def store_fingerprint(domains: Sequence[DomainManifest], width: int, dtype: str, tokenizer: str) -> str:
    """Identity of a store's rows: the tokens of every domain and split in order, their shape, the tokenizer."""
    tokens = [[d.name, *([file.sha256 for file in d.splits[split].files] for split in SPLITS)] for d in domains]
    return fingerprint({"tokens": tokens, "width": width, "dtype": dtype, "tokenizer": tokenizer})
