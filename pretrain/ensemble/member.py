"""A member of an ensemble: a Hugging Face folder that a run exported, and what decides whether it fits others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from mixwright.data_mixing.answers import one_line
from mixwright.data_mixing.errors import DataError
from mixwright.data_mixing.manifest import fingerprint
from mixwright.data_mixing.plain_data import read_json_object
from mixwright.data_mixing.staging import atomic_file
from mixwright.data_mixing.tokenizer import load_tokenizer, tokenizer_hash
from mixwright.pretrain.errors import EnsembleError, TrainingError
from mixwright.pretrain.head import LanguageModel
from mixwright.pretrain.model_options.exporting import refuse_export_without_head

EXPORT = "export"
ORIGIN = "origin.json"

_CHUNK_BYTES = 1 << 22
_NOT_ARCHITECTURE = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache")


@dataclass(frozen=True)
class Member:
    """A trained model on disk. `folder` is its Hugging Face export, `fingerprint` identifies its parameters.

    `architecture` is a hash of the model's configuration. `origin` identifies the parameters that its training began
    from, None when the folder does not say: members of one origin are branches of one checkpoint.
    """

    name: str
    folder: Path
    fingerprint: str
    tokenizer_hash: str
    vocab_size: int
    num_parameters: int
    architecture: str
    origin: str | None


def inspect_member(path: Path) -> Member:
    """The member that a run folder (its export) or an export holds. Raises EnsembleError naming what is missing."""
    folder = path / EXPORT if (path / EXPORT).is_dir() else path
    if not (folder / "config.json").is_file():
        is_run = (path / "config.yaml").is_file() and folder == path
        state = "has no export: its run is not complete" if is_run else "holds no model"
        expected = (path / EXPORT if is_run else folder) / "config.json"
        raise EnsembleError(f"member {path}: {state} (expected {expected})")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EnsembleError(f"member {path}: {folder} holds no parameters (expected *.safetensors)")
    try:
        refuse_export_without_head(folder)
        tokenizer = tokenizer_hash(folder)
        config = read_json_object(folder / "config.json")
        return Member(
            name=path.resolve().name if folder is not path else folder.resolve().name,
            folder=folder,
            fingerprint=files_hash(files),
            tokenizer_hash=tokenizer,
            vocab_size=int(config["vocab_size"]),
            num_parameters=_num_parameters(files),
            architecture=fingerprint({key: config[key] for key in config if key not in _NOT_ARCHITECTURE}),
            origin=_read_origin(folder),
        )
    except (TrainingError, DataError) as error:
        raise EnsembleError(f"member {path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise EnsembleError(f"member {path}: {folder} cannot be read: {one_line(error)}") from None


def check_together(members: Sequence[Member]) -> None:
    """Raise EnsembleError for members whose predictions are not over the same tokens, naming the first such pair."""
    if not members:
        raise EnsembleError("an ensemble needs at least one member")
    first = members[0]
    for other in members[1:]:
        if other.tokenizer_hash != first.tokenizer_hash:
            raise EnsembleError(
                f"members {first.folder} and {other.folder} have different tokenizers ({first.tokenizer_hash[:12]} and "
                f"{other.tokenizer_hash[:12]}): their predictions are not over the same tokens"
            )
        if other.vocab_size != first.vocab_size:
            raise EnsembleError(
                f"members {first.folder} and {other.folder} have vocabularies of {first.vocab_size} and "
                f"{other.vocab_size} tokens: their logits cannot be averaged"
            )


def load_member(member: Member, device: torch.device | str = "cpu") -> LanguageModel:
    """The member's model in float32, for evaluation, without gradients. Raises EnsembleError."""
    disable_progress_bar()
    try:
        causal_lm = AutoModelForCausalLM.from_pretrained(member.folder, dtype=torch.float32)  # nosec B615  # a local folder
    except (OSError, ValueError) as error:
        raise EnsembleError(f"member {member.folder}: cannot be loaded: {one_line(error)}") from None
    model = LanguageModel(causal_lm).to(device).eval()
    return model.requires_grad_(False)


def end_of_document(member: Member) -> int:
    """Id of the token that ends a document."""
    return load_tokenizer(member.folder).eos_id


def parameters_hash(model: nn.Module) -> str:
    """SHA-256 over names and values of all parameters, in order of names: the origin of a run that begins here."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\0".encode())
        digest.update(_bytes_of(parameter))
    return digest.hexdigest()


def write_origin(folder: Path, origin: str) -> None:
    """Note in a run's folder or export which parameters its training began from."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / ORIGIN) as file:
        file.write(json.dumps({"initial_parameters": origin}).encode() + b"\n")


def _read_origin(folder: Path) -> str | None:
    path = folder / ORIGIN
    return str(read_json_object(path, strict=True)["initial_parameters"]) if path.is_file() else None


def _bytes_of(parameter: Tensor) -> Any:
    flat = parameter.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def files_hash(files: Sequence[Path]) -> str:
    """SHA-256 of the contents of files, in their order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _num_parameters(files: Sequence[Path]) -> int:
    count = 0
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                size = 1
                for extent in tensors.get_slice(name).get_shape():
                    size *= extent
                count += size
    return count
