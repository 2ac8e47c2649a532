"""The same numbers as TRL's DPOTrainer where both compute the same: one model, one micro-batch, one set of references.

What differs in TRL 1.16, and how the comparison takes it into account:

- `ipo` averages log-ratios over the completion's tokens: our `length_normalised`. `sigmoid_norm` is that for `dpo`.
- `sigmoid` ignores `label_smoothing`; `aot` knows it but sorts the pairs of a batch, so a single pair is compared.
- `sft` is the mean over the tokens of the micro-batch, ours over those of the optimizer step: alike for a single one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixwright.pretrain.rpo.config import ObjectiveConfig, PolicyModelConfig
from mixwright.pretrain.rpo.groups import CHOSEN, REJECTED, Group
from mixwright.pretrain.rpo.layout import lay_out
from mixwright.pretrain.rpo.objective import Objective, StepScope
from mixwright.pretrain.rpo.policy import load_policy
from tests.pretrain.rpo_cases import write_model

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

BETA = 0.3
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "dpo": ({"loss_type": "sigmoid"}, {}, 4),
    "hinge": ({"loss_type": "hinge"}, {"loss": "hinge"}, 4),
    "ipo": ({"loss_type": "ipo"}, {"loss": "ipo", "length_normalised": True}, 4),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.2}, {"loss": "robust", "label_smoothing": 0.2}, 4),
    "length-normalised dpo": ({"loss_type": "sigmoid_norm"}, {"length_normalised": True}, 4),
    "smoothed dpo, one pair": ({"loss_type": "aot", "label_smoothing": 0.1}, {"label_smoothing": 0.1}, 1),
    "dpo + sft": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
        {"sft": {"reduction": "token_mean", "weight": 0.7}},
        4,
    ),
}
"""Settings of TRL, settings of ours, pairs in the micro-batch."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def draw_groups(count: int) -> tuple[list[Group], Tensor]:
    """Pairs of unequal lengths and references beside them, [P, 2], such that margins are neither 0 nor extreme."""
    chance = np.random.default_rng(1)
    groups = []
    for index in range(count):
        prompt, chosen, rejected = (
            chance.integers(1, 60, size).astype(np.int32) for size in (3 + index, 4 + 2 * index, 9 - index)
        )
        groups.append(Group(index, prompt, (chosen, rejected)))
    reference_P2 = -5.0 * torch.tensor([[len(one) for one in group.completions] for group in groups], dtype=torch.float)
    return groups, reference_P2 + torch.from_numpy(chance.normal(size=(count, 2))).float()


def theirs(settings: dict[str, Any], model_path: Path, folder: Path, micro_batch: list[dict[str, Any]]) -> Any:
    """TRL's loss of a micro-batch, and the model whose gradients it left."""
    arguments = trl.DPOConfig(
        output_dir=str(folder), beta=BETA, bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False,
        precompute_ref_log_probs=True, **settings,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).train(),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "one", "chosen": " two", "rejected": " three"}]),
        processing_class=AutoTokenizer.from_pretrained(model_path),
    )
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(micro_batch))
    loss.backward()
    return loss.detach(), trainer.model


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_trl(case: str, model_path: Path, tmp_path: Path) -> None:
    their_settings, our_settings, count = CASES[case]
    groups, reference_P2 = draw_groups(count)
    micro_batch = [
        {
            "prompt_ids": group.prompt.tolist(),
            "chosen_ids": group.completions[CHOSEN].tolist(),
            "rejected_ids": group.completions[REJECTED].tolist(),
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }
        for group, (chosen, rejected) in zip(groups, reference_P2.tolist(), strict=True)
    ]
    expected, their_model = theirs(their_settings, model_path, tmp_path, micro_batch)
    policy = load_policy(PolicyModelConfig(path=str(model_path)), layout="shared_prompt")
    objective = Objective(ObjectiveConfig(beta=BETA, **our_settings))
    scope = StepScope(count, sum(len(group.completions[CHOSEN]) for group in groups))
    loss, figures = objective(policy(lay_out(groups, "shared_prompt")), reference_P2, scope)
    loss.backward()
    assert 0.01 < (figures.reward_P2[:, CHOSEN] - figures.reward_P2[:, REJECTED]).abs().max() < 20
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    for (name, own), (their_name, their) in zip(
        policy.causal_lm.named_parameters(), their_model.named_parameters(), strict=True
    ):
        assert name == their_name
        torch.testing.assert_close(own.grad, their.grad, rtol=1e-3, atol=1e-5)
