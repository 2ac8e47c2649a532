"""What members make of fixed rows, on disk: their last hidden states, from which logits are formed block by block.

Members are run one after the other, and only one is in memory at a time. A block of tokens is as long as its logits of
all members may be large, so memory does not grow with the number of members. What was written is found again.

N = n * T tokens of n rows of T + 1, D hidden size, V vocabulary, K members, m tokens of a block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mixwright.data_mixing.staging import atomic_file
from mixwright.pretrain.ensemble.member import Member, load_member
from mixwright.pretrain.head import Head, LanguageModel

BLOCK_BYTES = 64 << 20
"""Logits of all members for one block of tokens."""
BATCH_TOKENS = 8192
"""Tokens of one forward."""

_KEY_LENGTH = 16


@dataclass(frozen=True)
class SpooledMember:
    """Features [N, D] of a member, mapped from disk, and its head, whose matrix is mapped as well."""

    member: Member
    features_ND: NDArray[np.float32]
    head: Head

    @torch.no_grad()
    def logits(self, span: slice) -> Tensor:
        """float32 [m, V] of the tokens of `span`."""
        # A copy: torch wants memory that may be written to.
        return self.head.logits(torch.from_numpy(np.array(self.features_ND[span])))


def spool(
    members: Sequence[Member], rows_nS: NDArray[np.int64], folder: Path, document_end: int | None = None
) -> list[SpooledMember]:
    """Run members over rows (ids, [n, T + 1]) where that has not been done; one member in memory at a time.

    With `document_end`, the id that ends a document, tokens of a row attend to their own document only.
    """
    key = hashlib.sha256(np.ascontiguousarray(rows_nS, dtype="<i8").data).hexdigest()[:_KEY_LENGTH]
    key = key if document_end is None else f"{key}-masked"
    return [
        _spooled(member, rows_nS, folder / f"{member.fingerprint[:_KEY_LENGTH]}-{key}", document_end)
        for member in members
    ]


def spans(num_tokens: int, vocab_size: int, num_members: int) -> Iterator[slice]:
    """Blocks of tokens whose logits of all members, and as much scratch, take about BLOCK_BYTES."""
    size = max(BLOCK_BYTES // (4 * vocab_size * (num_members + 2)), 16)
    for first in range(0, num_tokens, size):
        yield slice(first, min(first + size, num_tokens))


def _spooled(member: Member, rows_nS: NDArray[np.int64], folder: Path, document_end: int | None) -> SpooledMember:
    features, head = folder / "features.npy", folder / "head.json"
    if not head.is_file():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        model = load_member(member)
        model.document_end = document_end
        _write_features(model, rows_nS, features)
        _write_head(model.head, folder)
        del model
    return SpooledMember(member, np.load(features, mmap_mode="r"), _read_head(folder))


@torch.no_grad()
def _write_features(model: LanguageModel, rows_nS: NDArray[np.int64], path: Path) -> None:
    num_rows, width = rows_nS.shape
    batch_rows = max(BATCH_TOKENS // width, 1)
    with atomic_file(path) as file:
        for first in range(0, num_rows, batch_rows):
            tokens_BS = torch.from_numpy(np.ascontiguousarray(rows_nS[first : first + batch_rows]))
            features_ND, _ = model.head.operands(model.hidden_states(tokens_BS))
            block_ND = features_ND.float().numpy()
            if first == 0:
                _write_header(file, (num_rows * (width - 1), block_ND.shape[1]))
            file.write(block_ND.tobytes())


def _write_header(file: object, shape: tuple[int, int]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})  # type: ignore[arg-type]


def _write_head(head: Head, folder: Path) -> None:
    """The matrix as `operands` gives it, the bias, and what is done to logits."""
    _, weight_VD = head.operands(torch.zeros(1, head.weight.shape[1]))
    with atomic_file(folder / "weight.npy") as file:
        np.save(file, weight_VD.detach().float().numpy())
    if head.bias is not None:
        with atomic_file(folder / "bias.npy") as file:
            np.save(file, head.bias.detach().float().numpy())
    with atomic_file(folder / "head.json") as file:
        file.write(json.dumps({"softcap": head.softcap, "temperature": head.temperature}).encode())


def _read_head(folder: Path) -> Head:
    settings = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    weight_VD = np.load(folder / "weight.npy", mmap_mode="c")  # copied on write, which never happens
    projection = nn.Linear(weight_VD.shape[1], weight_VD.shape[0], bias=False, device="meta")
    projection.weight = nn.Parameter(torch.from_numpy(weight_VD), requires_grad=False)
    bias = folder / "bias.npy"
    if bias.is_file():
        projection.bias = nn.Parameter(torch.from_numpy(np.load(bias)), requires_grad=False)
    return Head(projection, settings["softcap"], settings["temperature"])
