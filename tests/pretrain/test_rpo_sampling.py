"""Samples of a policy, its divergence from a reference beside brute force, and samples of the reference on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.ranks import Ranks
from mixwright.pretrain.rpo import sampling
from mixwright.pretrain.rpo.base_samples import base_samples
from mixwright.pretrain.rpo.config import LoraConfig, PolicyModelConfig
from mixwright.pretrain.rpo.policy import PolicyModel, load_policy
from mixwright.pretrain.rpo.reference import ReferenceKey
from mixwright.pretrain.rpo.sampling import SamplingSettings, divergence_on_samples, sample_completions
from tests.pretrain.preferences import prepare
from tests.pretrain.rpo_cases import write_model, write_pairs

ALONE = Ranks(0, 1, torch.device("cpu"), None)
PROMPTS = [np.array(ids, np.int32) for ids in ([5, 9, 11], [7], [20, 21, 22, 23, 24])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("models")
    return [write_model(home / f"model-{seed}", seed=seed) for seed in range(2)]


def policy_of(folder: Path, **settings: object) -> PolicyModel:
    return load_policy(PolicyModelConfig(path=str(folder), **settings), layout="shared_prompt").eval()  # type: ignore[arg-type]


def test_samples_are_those_of_one_prompt_at_a_time_and_end_where_they_should(folders: list[Path]) -> None:
    """At a temperature near 0 chance is out of it: padding on the left must not change what is written."""
    model = policy_of(folders[0])
    settings = SamplingSettings(max_new_tokens=6, temperature=1e-4, end_ids=())
    together = sample_completions(model, PROMPTS, settings, seed=1)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        tokens = torch.from_numpy(prompt.astype(np.int64))[None]
        for token in completion.tolist():
            assert int(model.causal_lm(tokens).logits[0, -1].argmax()) == token
            tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)
    ends = SamplingSettings(6, 1e-4, (int(together[0][1]),))
    assert sample_completions(model, PROMPTS[:1], ends, seed=1)[0].tolist() == together[0][:2].tolist()


def brute_force(
    policy: PolicyModel, reference: PolicyModel, prompt: NDArray[np.int32], own: NDArray[np.int32]
) -> float:
    tokens = torch.from_numpy(np.concatenate([prompt, own]).astype(np.int64))[None]
    with torch.no_grad():
        own_TV, other_TV = (torch.log_softmax(m.causal_lm(tokens).logits[0].double(), -1) for m in (policy, reference))
    divergence_T = (own_TV.exp() * (own_TV - other_TV)).sum(-1)
    return float(divergence_T[len(prompt) - 1 : -1].sum())


def test_the_divergence_is_the_sum_of_those_of_next_tokens(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "KL_BLOCK_TOKENS", 3)
    policy, reference = map(policy_of, folders)
    completions = sample_completions(policy, PROMPTS, SamplingSettings(8, 1.0, ()), seed=2)
    found = divergence_on_samples(policy, reference, PROMPTS, completions)
    expected = [brute_force(policy, reference, *pair) for pair in zip(PROMPTS, completions, strict=True)]
    assert found == pytest.approx(expected, rel=1e-4)
    assert min(found) > 0.1
    assert divergence_on_samples(policy, policy, PROMPTS, completions) == pytest.approx([0, 0, 0], abs=1e-5)


def test_without_its_adapters_a_policy_is_its_reference(folders: list[Path]) -> None:
    policy, reference = policy_of(folders[0], lora=LoraConfig(rank=2)), policy_of(folders[0])
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    completions = sample_completions(policy, PROMPTS, SamplingSettings(8, 1.0, ()), seed=2)
    found = divergence_on_samples(policy, None, PROMPTS, completions)
    assert found == pytest.approx(divergence_on_samples(policy, reference, PROMPTS, completions), rel=1e-5)
    assert min(found) > 1e-3


def test_samples_of_the_reference_are_drawn_once_and_what_is_lost_is_drawn_again(
    folders: list[Path], tmp_path: Path
) -> None:
    prepared = prepare(write_pairs(tmp_path / "pairs.jsonl", 90), folders[0], tmp_path / "out", max_prompt_tokens=24)
    model, key = policy_of(folders[0]), ReferenceKey("parameters", "float32", prepared.fingerprint)
    settings, told = SamplingSettings(5, 1.0, (0,)), []

    def draw(seed: int = 0) -> list[list[int]]:
        found = base_samples(
            prepared, key, model, settings, seed, ALONE, lambda stage, done, total: told.append((done, total))
        )
        assert found.lengths.tolist() == [len(found.completion(i)) for i in range(90)]
        return [found.completion(i).tolist() for i in range(90)]

    first = draw()
    assert told == [(64, 90), (90, 90)]
    assert draw() == first
    assert len(told) == 2
    (part, _) = sorted(prepared.folder.glob("base-samples-*/part-*.npz"))
    part.unlink()
    assert draw() == first
    assert told[2:] == [(64, 90)]
    assert draw(seed=1) != first
    part.write_bytes(b"no archive")
    with pytest.raises(TrainingError, match="cannot be read"):
        draw()
