"""The manifest of a cluster job: all that its processes are told, as one small JSON in the job's environment.

Every attempt at a run has the same manifest and the same run id; each gets a submission id of its own. Paths are
absolute and on storage that all nodes share. Secrets have no place in it: whoever may list jobs can read it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import secrets
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mixwright.data_mixing.config_file import StrictModel, validate
from mixwright.data_mixing.errors import ConfigError
from mixwright.data_mixing.manifest import fingerprint
from mixwright.data_mixing.plain_data import parse_json
from mixwright.launch.job_stages import STAGES, StageName
from mixwright.pretrain.config import Positive

VARIABLE = "MIXWRIGHT_JOB"
MAX_BYTES = 60_000
"""Linux allows 131,072 bytes for one environment variable, and Ray passes the manifest on inside another one."""
ID_LENGTH = 8
ROOMS = ("kernels", "data_mixing", "pretrain", "launch")


class Resources(StrictModel):
    """What a job takes: `ranks` training processes, each with so many CPUs and at most one GPU."""

    ranks: Positive = 1
    cpus_per_rank: Positive = 1
    gpus_per_rank: Literal[0, 1] = 0


class JobManifest(StrictModel):
    """A stage to run on a cluster. `config` is its configuration in full, as the stage's model reads it.

    `retries`: how often Ray Train starts the ranks again within one job; `stop_seconds`: how long a job that is told to
    stop may take for its checkpoint. `code` says which code wrote the manifest.
    """

    stage: StageName
    run: str
    run_dir: Path
    config: dict[str, Any]
    resources: Resources = Resources()
    retries: int = Field(default=3, ge=0)
    stop_seconds: Positive = 300
    code: str

    @property
    def digest(self) -> str:
        """Identifies what is run and on what, however it is kept going and by whatever code it was written."""
        return fingerprint(self.model_dump(mode="json", exclude={"code", "retries", "stop_seconds"}))[:16]

    def to_environment(self) -> dict[str, str]:
        """The manifest as environment variable; raises ConfigError when it is too large for one."""
        text = self.model_dump_json()
        if len(text.encode()) > MAX_BYTES:
            raise ConfigError(
                f"the configuration of run {self.run!r} takes {len(text.encode()):,} bytes as JSON, and {MAX_BYTES:,} "
                "travel with a job: name domains of `mixing.policy` by globs, or submit the policy once the job runs"
            )
        return {VARIABLE: text}


def make_manifest(
    stage: StageName, path: Path, overrides: Sequence[str], resources: Resources, retries: int, stop_seconds: int
) -> JobManifest:
    """The manifest of a configuration file as it is now. Raises ConfigError."""
    kind = STAGES[stage]
    config = kind.load(path, overrides)
    run_dir = kind.run_dir(config).resolve()
    return JobManifest(
        stage=stage,
        run=run_id(run_dir),
        run_dir=run_dir,
        config=absolute_tree(config, kind.names_or_paths),
        resources=resources,
        retries=retries,
        stop_seconds=stop_seconds,
        code=code_version(),
    )


def read_manifest(environment: Mapping[str, str]) -> JobManifest:
    """The manifest that this process of a job was given. Raises ConfigError."""
    try:
        tree = parse_json(environment[VARIABLE])
    except KeyError:
        raise ConfigError(
            f"{VARIABLE} is not set: this is the inside of a cluster job, see `mixwright submit`"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{VARIABLE}: not valid JSON: {error}") from None
    return validate(JobManifest, tree, VARIABLE)


def run_id(run_dir: Path) -> str:
    """Identifies a run by its folder: the name, for people, and a few digits of the whole path."""
    return f"{run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:ID_LENGTH]}"


def submission_id(run: str, attempt: int) -> str:
    """A new id, as Ray wants one for every submission."""
    return f"{run}-{attempt}-{secrets.token_hex(3)}"


def absolute_tree(config: StrictModel, names_or_paths: Sequence[str]) -> dict[str, Any]:
    """The configuration as a JSON tree, relative paths made absolute.

    `names_or_paths` are keys `section.key` of texts that name something here or elsewhere (the Hugging Face hub): those
    that exist here are taken for paths.
    """
    tree = _resolved(config.model_dump(mode="python"))
    for key in names_or_paths:
        *parents, leaf = key.split(".")
        section = tree
        for parent in parents:
            section = section[parent]
        if section[leaf] is not None and Path(section[leaf]).exists():
            section[leaf] = str(Path(section[leaf]).resolve())
    # Through JSON, so that what is sent is what was checked: tuples are lists from here on.
    result: dict[str, Any] = json.loads(json.dumps(tree))
    return result


def code_version() -> str:
    """The version of this package, and a hash of its source files."""
    digest = hashlib.sha256()
    for room in ROOMS:
        folders = [Path(path) for path in importlib.import_module(f"mixwright.{room}").__path__ if Path(path).is_dir()]
        for folder in folders:
            for file in sorted(folder.rglob("*.py")):
                digest.update(f"{room}/{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return f"{version('mixwright')}+{digest.hexdigest()[:ID_LENGTH]}"


def _resolved(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, Mapping):
        return {key: _resolved(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(item) for item in value]
    return value
