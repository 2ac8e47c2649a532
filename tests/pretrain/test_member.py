"""Members on disk: what they are, what is missing, which go together."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.ensemble.member import (
    Member,
    check_together,
    end_of_document,
    inspect_member,
    load_member,
    parameters_hash,
)
from mixwright.pretrain.errors import EnsembleError
from tests.pretrain.members import new_model, write_member


def test_a_member_is_what_its_run_exported(members: list[Member], tiny_store: Path) -> None:
    store, member = TokenStore.open(tiny_store), members[1]
    assert member.name == "member-1"
    assert member.tokenizer_hash == store.manifest.tokenizer_hash
    assert member.vocab_size == store.manifest.vocab_size
    assert end_of_document(member) == store.manifest.eos_id
    model = load_member(member)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert member.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_members_of_different_seeds_differ_in_all_but_architecture(members: list[Member]) -> None:
    first, second = members[:2]
    assert first.architecture == second.architecture
    assert first.fingerprint != second.fingerprint
    assert first.origin != second.origin


def test_the_origin_is_of_the_parameters_before_training(tiny_store: Path, tmp_path: Path) -> None:
    store = TokenStore.open(tiny_store)
    member = write_member(tmp_path / "m", store, 5, init_seed=9, num_steps=2)
    assert member.origin == parameters_hash(new_model(store, 9))
    assert member.origin != parameters_hash(load_member(member))


def test_the_hash_of_parameters_follows_values_and_names(tiny_store: Path) -> None:
    model = new_model(TokenStore.open(tiny_store), 0)
    before = parameters_hash(model)
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[3] += 1e-6
    assert parameters_hash(model) != before


def test_what_is_missing_is_named(members: list[Member], tmp_path: Path) -> None:
    with pytest.raises(EnsembleError, match=r"nowhere: holds no model \(expected .*nowhere/config.json\)"):
        inspect_member(tmp_path / "nowhere")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("run: {}\n")
    with pytest.raises(EnsembleError, match=r"run: has no export: its run is not complete \(expected .*export"):
        inspect_member(run)
    without = tmp_path / "without"
    shutil.copytree(members[0].folder, without)
    (without / "model.safetensors").unlink()
    with pytest.raises(EnsembleError, match=r"holds no parameters \(expected \*.safetensors\)"):
        inspect_member(without)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_one_clear_line(members: list[Member], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(members[0].folder, folder)
    (folder / name).write_bytes(b"{ not what it was")
    with pytest.raises(EnsembleError, match="damaged") as caught:
        inspect_member(folder)
    assert "\n" not in str(caught.value)


def test_other_tokenizers_and_vocabularies_are_refused_naming_both(members: list[Member]) -> None:
    first, second = members[:2]
    check_together([first, second])
    with pytest.raises(EnsembleError, match=f"{first.folder} and {second.folder} have different tokenizers"):
        check_together([first, replace(second, tokenizer_hash="0" * 64)])
    with pytest.raises(EnsembleError, match=r"vocabularies of \d+ and 7 tokens: their logits cannot be averaged"):
        check_together([first, replace(second, vocab_size=7)])
    with pytest.raises(EnsembleError, match="at least one member"):
        check_together([])


def test_configurations_that_say_how_not_what_are_no_other_architecture(members: list[Member], tmp_path: Path) -> None:
    folder = tmp_path / "later"
    shutil.copytree(members[0].folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "99.0"}))
    assert inspect_member(folder).architecture == members[0].architecture
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert inspect_member(folder).architecture != members[0].architecture
