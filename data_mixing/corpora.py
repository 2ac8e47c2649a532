"""What a token store is made of: the configuration of `mixwright data prepare`, and the files that it names."""

from __future__ import annotations

import glob
import os
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ByteSize, Field, model_validator

from mixwright.data_mixing.config_file import StrictModel, read_yaml, set_override, validate
from mixwright.data_mixing.domain import Cap, check_domain_name
from mixwright.data_mixing.errors import ConfigError, DataError, nearest

Format = Literal["auto", "text", "jsonl", "parquet", "docstrings"]
_RESERVED_NAMES = ("tokenizer", "manifest.json")


def _check_name(name: str) -> str:
    if name in _RESERVED_NAMES:
        raise ValueError(f"domain name {name!r} is taken by the store's own {name}")
    return check_domain_name(name)


class DatasetSource(StrictModel):
    """A Hugging Face `datasets` path: a hub name, a folder of data files, or a `save_to_disk` folder.

    A relative path starts at the configuration file's folder; what is not there is a hub name.
    With `streaming`, documents are taken from a seeded shuffle buffer until the domain's `max_bytes`.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False


class DomainSource(StrictModel):
    """Where the documents of one domain come from: either `paths` (globs) or `dataset`.

    `{stdlib}` and `{site_packages}` in a pattern stand for folders of the running Python; relative patterns
    start at the configuration file's folder. Formats: `text` one document per file, `jsonl` one per line,
    `parquet` one per row, `docstrings` one per docstring of a Python file, `auto` by suffix. `.gz` is handled.
    """

    paths: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dataset: DatasetSource | None = None
    format: Format = "auto"
    text_field: str = "text"
    min_chars: int = Field(default=1, ge=1)
    """Documents with fewer characters (outer white space not counted) are dropped and counted."""
    max_bytes: ByteSize | None = Field(default=None, gt=0)
    """A seeded spread of documents with at most this many UTF-8 bytes in total."""
    cap: Cap = Cap()

    @model_validator(mode="after")
    def _one_source(self) -> DomainSource:
        if bool(self.paths) == bool(self.dataset):
            raise ValueError("give either paths or dataset")
        return self


class TrainedTokenizer(StrictModel):
    """A byte-level BPE, trained on an equal share of each domain's training documents."""

    vocab_size: int = Field(ge=257, le=1 << 20)
    max_bytes: ByteSize = Field(default=ByteSize(50_000_000), gt=0)


class TokenizerSource(StrictModel):
    """Either `path` (folder, tokenizer.json or hub name) or `train`."""

    path: str | None = None
    train: TrainedTokenizer | None = None
    eos_token: str | None = None
    """The token that ends a document; by default the tokenizer's own."""

    @model_validator(mode="after")
    def _one_source(self) -> TokenizerSource:
        if (self.path is None) == (self.train is None):
            raise ValueError("give either path or train")
        if self.train is not None and self.eos_token is not None:
            raise ValueError("eos_token belongs to a tokenizer given by path")
        return self


class SplitFractions(StrictModel):
    """Shares of documents held out for validation and test; the rest is for training."""

    validation: float = Field(default=0.02, ge=0, lt=1)
    test: float = Field(default=0.02, ge=0, lt=1)

    @model_validator(mode="after")
    def _something_to_train_on(self) -> SplitFractions:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation + test must be below 1, found {self.validation + self.test:g}")
        return self


class CorporaConfig(StrictModel):
    """How to make one token store. Relative paths are resolved against the configuration file's folder."""

    output: Path
    sequence_length: int = Field(gt=0, le=1 << 24)
    tokenizer: TokenizerSource
    domains: dict[Annotated[str, AfterValidator(_check_name)], DomainSource] = Field(min_length=1)
    split: SplitFractions = SplitFractions()
    on_bad_document: Literal["stop", "skip"] = "stop"
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    shard_bytes: ByteSize = Field(default=ByteSize(1 << 30), gt=0)
    num_workers: int | None = Field(default=None, ge=1)
    """Processes; None means one per core that this process may use. The result does not depend on it."""

    def determining(self) -> dict[str, Any]:
        """The part that determines the store's content: all but where it is written and how fast."""
        return self.model_dump(mode="json", exclude={"output", "num_workers"})


def load_corpora_config(path: Path, overrides: Sequence[str] = ()) -> CorporaConfig:
    """Read a corpora configuration; `output` becomes absolute, and so does a tokenizer path that exists.

    Raises ConfigError naming file and key.
    """
    tree = read_yaml(path)
    for override in overrides:
        set_override(tree, override)
    config = validate(CorporaConfig, tree, str(path))
    changes: dict[str, Any] = {"output": (path.parent / config.output).resolve()}
    if config.tokenizer.path is not None:
        local = _local_or_hub(config.tokenizer.path, path.parent)
        changes["tokenizer"] = config.tokenizer.model_copy(update={"path": local})
    return config.model_copy(update=changes)


def _local_or_hub(name: str, base: Path) -> str:
    """The absolute path when something is there, seen from `base`; else `name`, for the hub."""
    path = base / name
    return str(path.resolve()) if path.exists() else name


def locate_dataset(source: DomainSource, base: Path) -> DomainSource:
    """`source` with a local dataset's path made absolute; a hub name stays as it is.

    Not done to the configuration itself: a store holds that, and would be of another one once the folder moves.
    """
    if source.dataset is None:
        return source
    dataset = source.dataset.model_copy(update={"path": _local_or_hub(source.dataset.path, base)})
    return source.model_copy(update={"dataset": dataset})


def find_files(name: str, source: DomainSource, base: Path) -> list[Path]:
    """The files of a domain, in sorted order; raises DataError when a pattern matches none."""
    excluded = {file for pattern in source.exclude for file in _matches(pattern, base)}
    found: set[str] = set()
    for pattern in source.paths:
        files = _matches(pattern, base) - excluded
        if not files:
            raise DataError(f"domain {name!r}: {_no_match(pattern, base)}")
        found |= files
    return [Path(file) for file in sorted(found)]


def _matches(pattern: str, base: Path) -> set[str]:
    if not glob.has_magic(pattern):
        path = Path(_expand(pattern, base, str))
        return {str(path)} if path.is_file() else set()
    # Path.glob takes no absolute pattern, and patterns here may start anywhere.
    found = glob.iglob(_expand(pattern, base, glob.escape), recursive=True)  # noqa: PTH207
    return {file for file in found if Path(file).is_file()}


def _expand(pattern: str, base: Path, quote: Callable[[str], str]) -> str:
    """`pattern` as an absolute path, with placeholders filled in; `quote` protects what is no pattern."""
    folders = {"stdlib": sysconfig.get_path("stdlib"), "site_packages": sysconfig.get_path("purelib")}

    def replace(match: re.Match[str]) -> str:
        if match[1] not in folders:
            raise ConfigError(f"{pattern}: unknown placeholder {match[0]}{nearest(match[1], folders)}")
        return quote(folders[match[1]])

    return os.path.normpath(os.path.join(quote(str(base)), re.sub(r"\{(\w+)\}", replace, pattern)))  # noqa: PTH118


def _no_match(pattern: str, base: Path) -> str:
    path = Path(_expand(pattern, base, str))
    if glob.has_magic(pattern):
        return f"no file matches {pattern!r} (looked for {path})"
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"{path}: no such file{nearest(path.name, siblings) if siblings else ''}"
