"""Records of earlier calls that were damaged since: one clear error that names the file, never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mixwright.data_mixing.corpora import DatasetSource
from mixwright.data_mixing.errors import MixingError
from mixwright.pretrain.distill import pipeline, topk_cache
from mixwright.pretrain.ensemble.curve import load_evaluation
from mixwright.pretrain.rpo import reading


def splits_of(path: Path) -> None:
    reading._check_split(DatasetSource(path=str(path.parent), split="train"))


def evaluation_of(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), losses=np.zeros(2))
    load_evaluation(path.parent)


READERS: dict[str, Callable[[Path], object]] = {
    "temperature.json": pipeline._recorded,
    topk_cache.CACHE: lambda path: topk_cache._read(path.parent),
    "evaluation.json": evaluation_of,
    "dataset_dict.json": splits_of,
}


@pytest.mark.parametrize("content", ["[]", "{}", "7", "{", "[" * 100_000, '{"temperature": NaN}', '{"splits": 3}'])
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_record_is_one_clear_error(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(MixingError) as told:
        READERS[name](tmp_path / name)
    assert str(tmp_path) in str(told.value)
    assert "\n" not in str(told.value)
