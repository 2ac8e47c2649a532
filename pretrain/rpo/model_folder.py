"""Where the model of a run is: a folder, the export of a run of ours, or a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from mixwright.data_mixing.answers import one_line
from mixwright.pretrain.ensemble.member import EXPORT, files_hash
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.model_options.exporting import refuse_export_without_head

PARAMETER_FILES = ("*.safetensors", "*.bin")
_WANTED = (*PARAMETER_FILES, "*.json", "*.jinja", "*.model", "*.txt")


def find_model(path: str) -> Path:
    """The Hugging Face folder that `model.path` means; a hub repository is fetched. Raises TrainingError."""
    folder = Path(path)
    if (folder / EXPORT / "config.json").is_file():
        folder = folder / EXPORT
    elif not folder.exists() and not path.startswith((".", "/")) and path.count("/") == 1:
        folder = _fetch(path)
    if not (folder / "config.json").is_file():
        what = "is a run without an export: it is not complete" if (folder / "config.yaml").is_file() else "no model"
        raise TrainingError(f"model.path: {path!r}: {what} (expected {folder / 'config.json'})")
    refuse_export_without_head(folder)
    return folder


def parameters_fingerprint(folder: Path) -> str:
    """SHA-256 of all parameter files of a model. Raises TrainingError when there are none."""
    files = sorted(file for pattern in PARAMETER_FILES for file in folder.glob(pattern))
    if not files:
        raise TrainingError(f"model.path: {folder} holds no parameters (expected {' or '.join(PARAMETER_FILES)})")
    return files_hash(files)


def _fetch(repository: str) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=list(_WANTED)))  # nosec B615  # the user's model, without its code
    except Exception as error:  # the hub's client documents none of what it raises
        raise TrainingError(
            f"model.path: {repository!r} is no folder, and the hub does not give it: {one_line(error)}"
        ) from None
