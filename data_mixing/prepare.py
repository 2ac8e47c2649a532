"""Text in, token store out: `prepare` makes the store that a configuration describes, or finds that it is made.

All work happens in `<output>.building/`, in tasks whose results are files that are complete or absent. A run that
was killed is continued by the same call and ends with the same bytes. The last two steps are to write the
manifest and to rename the finished store into place.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from mixwright.data_mixing.build import Build, Progress
from mixwright.data_mixing.config_file import differences
from mixwright.data_mixing.corpora import CorporaConfig
from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.manifest import MANIFEST, Manifest, write_manifest
from mixwright.data_mixing.sources import find_inputs, source_signature
from mixwright.data_mixing.staging import Resumable, atomic_file, clear, exclusive, write_error
from mixwright.data_mixing.store import TokenStore
from mixwright.data_mixing.workers import Workers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """The store at `config.output`; `made` is False when a finished one was found to be what was asked for."""

    manifest: Manifest
    made: bool


def prepare(config: CorporaConfig, base: Path, *, replace: bool = False, progress: Progress | None = None) -> Prepared:
    """Make the token store that `config` describes; relative source paths start at `base`.

    Raises DataError for unusable input, for a finished store of other content at `config.output` (which `replace`
    allows to replace), and for a full disk or storage that fails (Resumable). After those, or a kill, the same call
    continues.
    """
    inputs = find_inputs(config, base)
    signature = source_signature(config, inputs)
    existing = _finished_store(config, replace)
    building = config.output.with_name(config.output.name + ".building")
    if existing is not None and existing.source_signature == signature:
        if building.exists():
            with exclusive(building):
                shutil.rmtree(building)
        return Prepared(existing, made=False)
    with exclusive(building):
        try:
            with Workers(config.num_workers) as workers:
                build = Build(config, inputs, building, workers, progress or _silent)
                prepared = _run(build, signature, existing)
        except Resumable:
            raise
        except DataError:
            shutil.rmtree(building)  # of no use any more: the input has to change first
            raise
        except OSError as error:
            raise write_error(building, error) from None
        shutil.rmtree(building)
    return prepared


def _run(build: Build, signature: str, existing: Manifest | None) -> Prepared:
    _continue_or_begin(build.building, signature)
    build.plan()
    build.choose_documents()
    build.make_tokenizer()
    if existing is not None:
        return Prepared(_recognise(build, signature, existing), made=False)
    token_files = build.tokenise()
    manifest = build.describe(token_files, build.write_rows(token_files), signature)
    write_manifest(build.store, manifest)
    _put_in_place(build.building, build.config.output)
    return Prepared(manifest, made=True)


def _recognise(build: Build, signature: str, existing: Manifest) -> Manifest:
    """Files were touched since the store was made: it stands if the documents are still the same."""
    if existing.content_key != build.content_key():
        raise DataError(
            f"{build.config.output}: holds a store made of other documents (source files changed since); "
            "choose another output, or --replace it"
        )
    manifest = existing.model_copy(update={"source_signature": signature})
    write_manifest(build.config.output, manifest)
    return manifest


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _finished_store(config: CorporaConfig, replace: bool) -> Manifest | None:
    """The manifest at the output, None when it is free or to be replaced; raises DataError for anything else."""
    output = config.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / MANIFEST).is_file():
        raise DataError(f"{output}: exists and is not a token store; choose another output")
    if replace:
        return None
    try:
        manifest = TokenStore.open(output).manifest
    except DataError as error:
        raise DataError(f"{error} (--replace does that)") from None
    changed = differences(manifest.config, config.determining())
    if changed:
        raise DataError(
            f"{output}: holds a store of another configuration ({', '.join(list(changed)[:5])} differ); "
            "choose another output, or --replace it"
        )
    return manifest


def _continue_or_begin(building: Path, signature: str) -> None:
    """Keep what is there when it was begun with the same input, else clear it."""
    mark = building / "signature"
    if mark.is_file() and mark.read_text(encoding="utf-8") == signature:
        logger.info("%s: continuing", building)
        return
    clear(building)
    with atomic_file(mark) as file:
        file.write(signature.encode())


def _put_in_place(building: Path, output: Path) -> None:
    """Replace `output` by the finished store; a reader that has the old one open keeps it."""
    if output.exists():
        old = building / "replaced"
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    output.parent.mkdir(parents=True, exist_ok=True)
    (building / "store").rename(output)
