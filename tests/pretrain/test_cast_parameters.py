"""Models in bfloat16: their parameters are, while what tells positions apart stays exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.config import DistillationConfig
from mixwright.pretrain.distill.teaching import RunTeachers, open_teaching
from mixwright.pretrain.ensemble.member import Member
from mixwright.pretrain.model import cast_parameters
from mixwright.pretrain.ranks import Ranks
from mixwright.pretrain.rpo.config import RpoConfig, load_rpo_config
from mixwright.pretrain.rpo.export import lone_policy, whole_policy
from mixwright.pretrain.rpo.objective import Objective
from mixwright.pretrain.rpo.policy import load_policy
from mixwright.pretrain.rpo.start import find_preferences, prepare, reference_key
from tests.pretrain.jobs import write_config
from tests.pretrain.members import new_model
from tests.pretrain.rpo_cases import Silent, rpo_tree, write_model, write_pairs
from tests.pretrain.tiny import LLAMA, tiny_config

ALONE = Ranks(0, 1, torch.device("cpu"), None)


def frequencies(model: Any) -> Tensor:
    found: Tensor = model.backbone.rotary_emb.inv_freq
    return found


def assert_only_parameters_are_bfloat16(model: nn.Module, frequencies_F: Tensor) -> None:
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(frequencies(model), frequencies_F)
    assert frequencies(model).dtype == torch.float32


def test_parameters_are_cast_and_buffers_are_not(tiny_store: Path) -> None:
    model = new_model(TokenStore.open(tiny_store), seed=0)
    before_F, num_before = frequencies(model).clone(), len(list(model.parameters()))
    assert cast_parameters(model, torch.bfloat16) is model
    assert_only_parameters_are_bfloat16(model, before_F)
    assert model.head.weight is model.causal_lm.get_input_embeddings().weight
    assert len(list(model.parameters())) == num_before
    assert model(torch.arange(12).reshape(2, 6)).nll_N.isfinite().all()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RpoConfig:
    """A run in bfloat16."""
    folder = tmp_path_factory.mktemp("rpo")
    model, pairs = write_model(folder / "model"), write_pairs(folder / "pairs.jsonl", 12)
    tree = rpo_tree(folder, model, pairs, model__dtype="bfloat16", data__held_out_pairs=2)
    return load_rpo_config(write_config(folder, tree))


def test_policy_and_reference_tell_positions_apart(config: RpoConfig) -> None:
    policy = load_policy(config.model, layout="shared_prompt")
    before_F = frequencies(policy).clone()
    pairs = prepare(config, Silent())
    find_preferences(
        config, pairs, reference_key(config, pairs), policy, Objective(config.objective), ALONE, Silent()
    )  # fmt: skip
    parameters = {name: parameter.detach() for name, parameter in policy.named_parameters()}
    reference = lone_policy(config.model, "cpu", torch.bfloat16)
    for model in (policy, whole_policy(config.model, parameters, "cpu"), reference):
        assert_only_parameters_are_bfloat16(model, before_F)


def test_teachers_tell_positions_apart(members: list[Member], tiny_store: Path, tmp_path: Path) -> None:
    lesson = DistillationConfig(teachers=tuple(member.folder for member in members[:2]))
    config = tiny_config(tmp_path, tiny_store, model__dtype="bfloat16").model_copy(update={"distillation": lesson})
    teaching = open_teaching(config, TokenStore.open(tiny_store), ALONE.device, Silent().say)
    assert isinstance(teaching, RunTeachers)
    expected_F = frequencies(new_model(TokenStore.open(tiny_store), seed=0, **LLAMA))
    for teacher in teaching._teachers:
        assert_only_parameters_are_bfloat16(teacher, expected_F)
