"""The language with a gold reward: its reward by hand, its behaviour, preferences, samples, divergence, and a trial."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from mixwright.data_mixing.errors import ConfigError
from mixwright.pretrain.config import ModelConfig
from mixwright.pretrain.rpo import gold_task
from mixwright.pretrain.rpo.config import ObjectiveConfig
from mixwright.pretrain.rpo.gold_trial import GoldConfig, GoldTrial, make_world, run_gold
from mixwright.pretrain.rpo.small_lm import divergence, predictions, response_logp, sample
from mixwright.pretrain.rpo.trial import CurvePoint, find_record, log_steps, perform, trial_key

MODEL = ModelConfig(
    config={
        "model_type": "gpt2", "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_inner": 32,
        "initializer_range": 0.2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }
)  # fmt: skip
SMALL = GoldConfig.model_validate(
    {
        "model": MODEL, "num_prompts": 1, "validity": 1.0, "num_pairs": 64, "pairs_per_step": 16, "num_steps": 40,
        "num_points": 4, "num_samples": 128, "lr": 3e-3,
        "reference": {"num_steps": 150, "responses_per_step": 64, "lr": 0.02},
    }
)  # fmt: skip


def test_gold_rewards_by_hand() -> None:
    prompt_B = torch.tensor([8 + 3, 8 + 3, 8 + 11])
    response_BR = torch.tensor(
        [
            [7, 2, 0, 3, 5, 0, 1, 4],  # all b = a + 3 modulo 8
            [7, 2, 0, 4, 5, 0, 9, 4],  # two of them wrong, one for a token that is no digit
            [7, 2, 0, 3, 5, 0, 1, 4],  # prompt 11 has key 3 too
        ]
    )
    valid = torch.tensor([[True] * 4, [True, False, True, False], [True] * 4])
    assert gold_task.is_valid(prompt_B, response_BR).equal(valid)
    expected = torch.tensor([(7 + 0 + 5 + 1) / 28, (1 - 1 + 5 / 7 - 1) / 4, (7 + 0 + 5 + 1) / 28])
    torch.testing.assert_close(gold_task.gold_reward(prompt_B, response_BR), expected)


def test_the_behaviour_has_the_validity_it_is_asked_for() -> None:
    prompt_B, response_BR = gold_task.behave(20_000, 8, 0.9, torch.Generator().manual_seed(0))
    assert gold_task.is_valid(prompt_B, response_BR).double().mean().item() == pytest.approx(0.9, abs=0.005)
    assert set(response_BR.unique().tolist()) == set(range(8))
    assert set(prompt_B.unique().tolist()) == set(range(8, 16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


def test_preferences_are_between_valid_responses_and_mostly_for_the_better_one(folder: Path) -> None:
    pairs = make_world(SMALL, 1, folder).training
    chosen_PR, rejected_PR, base_PR = pairs.response_P3R.unbind(dim=1)
    assert pairs.prompt_P.shape == (64,)
    for response_PR in (chosen_PR, rejected_PR):
        assert gold_task.is_valid(pairs.prompt_P, response_PR).all()
    better_P = gold_task.gold_reward(pairs.prompt_P, chosen_PR) > gold_task.gold_reward(pairs.prompt_P, rejected_PR)
    assert 0.6 < better_P.double().mean().item() < 0.98
    assert not base_PR.equal(chosen_PR)
    tokens_NS = pairs.sequences(2)
    assert tokens_NS.shape == (128, 9)
    assert tokens_NS[2].tolist() == [pairs.prompt_P[1].item(), *chosen_PR[1].tolist()]
    assert tokens_NS[3].tolist() == [pairs.prompt_P[1].item(), *rejected_PR[1].tolist()]


def test_the_world_of_a_seed_is_one_and_its_reference_is_read_again(folder: Path) -> None:
    first = make_world(SMALL, 1, folder)
    (path,) = folder.glob("reference-*.safetensors")
    written = path.stat().st_mtime_ns
    second = make_world(SMALL, 1, folder)
    assert path.stat().st_mtime_ns == written
    assert first.training.response_P3R.equal(second.training.response_P3R)
    assert not first.held_out.response_P3R.equal(first.training.response_P3R)
    path.write_bytes(path.read_bytes()[:100])  # cut off: trained again, to the same parameters
    third = make_world(SMALL, 1, folder)
    assert third.training.response_P3R.equal(first.training.response_P3R)


def test_samples_come_from_the_predictions_that_a_plain_forward_gives(folder: Path) -> None:
    model = make_world(SMALL, 1, folder).reference
    prompt_B1 = torch.full((64, 1), 8)
    response_BR, logp_BRV = sample(model, prompt_B1, 3, torch.Generator().manual_seed(0))
    plain_BRV = predictions(model, torch.cat([prompt_B1, response_BR], dim=1), 1)
    torch.testing.assert_close(logp_BRV, plain_BRV, atol=1e-4, rtol=1e-4)
    first = torch.multinomial(plain_BRV[:, 0].exp(), 1, generator=torch.Generator().manual_seed(0))
    assert response_BR[:, :1].equal(first)


def test_the_divergence_of_samples_is_that_of_all_responses(folder: Path) -> None:
    policy, reference = make_world(SMALL, 1, folder).reference, make_world(SMALL, 2, folder).reference
    prompts = torch.full((81, 1), 8)
    every_BR = torch.tensor(list(product(range(9), repeat=2)))
    with torch.no_grad():
        tokens_BS = torch.cat([prompts, every_BR], dim=1)
        own_B, other_B = (response_logp(predictions(m, tokens_BS, 1), every_BR) for m in (policy, reference))
        exact = (own_B.exp() * (own_B - other_B)).sum().item()
        drawn_BR, logp_BRV = sample(policy, torch.full((4000, 1), 8), 2, torch.Generator().manual_seed(1))
        reference_BRV = predictions(reference, torch.cat([torch.full((4000, 1), 8), drawn_BR], dim=1), 1)
        found_B = divergence(logp_BRV, reference_BRV)
    assert own_B.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert found_B.mean().item() == pytest.approx(exact, abs=4 * found_B.std().item() / 4000**0.5 + 1e-6)


def trial(**objective: Any) -> GoldTrial:
    return GoldTrial(objective=ObjectiveConfig.model_validate(objective), seed=1, world=SMALL)


def swept(eta: float) -> GoldTrial:
    return trial(sft={"regulariser": "cumulative", "eta": eta})


def test_a_trial_begins_at_the_reference_and_eta_keeps_the_chosen_likely(folder: Path) -> None:
    ends = []
    for eta in (0.0, 0.2, 1.0):
        points = run_gold(swept(eta), folder)
        first, end = points[0].figures, points[-1].figures
        assert [point.step for point in points] == [0, 1, 3, 12, 40]
        assert first["kl"] == pytest.approx(0, abs=1e-4)
        assert end["accuracy"] > 0.6
        ends.append(end["chosen_logp"])
    assert ends == sorted(ends)


def test_eta_0_is_dpo_and_equal_lengths_make_conventions_equal(folder: Path) -> None:
    assert run_gold(swept(0.0), folder) == run_gold(trial(), folder)
    summed = run_gold(swept(0.2), folder)[-1].figures
    by_token = run_gold(trial(sft={"reduction": "token_mean", "weight": 0.2 * 0.1 * 8}), folder)[-1].figures
    assert by_token["chosen_logp"] == pytest.approx(summed["chosen_logp"], abs=1e-2)


def test_a_record_is_kept_and_named_by_all_that_decides_it(tmp_path: Path) -> None:
    ran: list[GoldTrial] = []

    def run(one: GoldTrial) -> tuple[CurvePoint, ...]:
        ran.append(one)
        return tuple(CurvePoint(step=step, figures={"reward": 0.5}) for step in (0, 1))

    first = perform(swept(0.2), tmp_path, run)
    assert perform(swept(0.2), tmp_path, run) == first == find_record(swept(0.2), tmp_path)
    assert len(ran) == 1
    assert first.curve("reward") == [0.5, 0.5]
    others = [swept(0.3), swept(0.2).model_copy(update={"seed": 2})]
    assert len({trial_key(one) for one in (swept(0.2), *others)}) == 3
    path = tmp_path / f"{first.key}.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"not the record of a trial .*; remove it to run again"):
        perform(swept(0.2), tmp_path, run)


def test_steps_are_spaced_evenly_in_the_logarithm() -> None:
    assert log_steps(1000, 4) == [0, 1, 10, 100, 1000]
    assert log_steps(3, 9) == [0, 1, 2, 3]
