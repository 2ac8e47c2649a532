"""Before the first step of a preference run: positions, the adapters' seed, the reference in two layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.model import DTYPES, cast_parameters
from mixwright.pretrain.ranks import Ranks
from mixwright.pretrain.rpo import job
from mixwright.pretrain.rpo.config import Layout, ReferenceConfig, RpoConfig, load_rpo_config
from mixwright.pretrain.rpo.job import RpoJob
from mixwright.pretrain.rpo.objective import Objective
from mixwright.pretrain.rpo.policy import PolicyModel, load_policy
from mixwright.pretrain.rpo.reference import Pass, reference_log_probs
from mixwright.pretrain.rpo.start import longest_sequence, prepare, reference_key
from tests.pretrain.jobs import metrics, run_job, write_config
from tests.pretrain.rpo_cases import Silent, model_and_pairs, rpo_tree, write_model

ALONE = Ranks(0, 1, torch.device("cpu"), None)
NO_SAMPLES = {"evaluation__generations": 0, "evaluation__kl_samples": 0}
GPT2 = {"model_type": "gpt2", "num_attention_heads": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_pairs(tmp_path_factory)


def config_in(folder: Path, home: Path, model: Path | None = None, **changes: Any) -> RpoConfig:
    tree = rpo_tree(folder, model or home / "model", home / "pairs.jsonl", **changes)
    return load_rpo_config(write_config(folder, tree))


class Built(Exception):
    """A job has come as far as its model."""


def build(config: RpoConfig, monkeypatch: pytest.MonkeyPatch) -> PolicyModel:
    """The model that a job builds, before the reference and the engine."""
    found: list[PolicyModel] = []

    def stop(*arguments: Any) -> None:
        found.extend(one for one in arguments if isinstance(one, PolicyModel))
        raise Built

    monkeypatch.setattr(job, "find_preferences", stop)
    with pytest.raises(Built):
        RpoJob.build(config, ALONE, prepare(config, Silent()), Silent())
    return found[0]


def adapters(model: PolicyModel) -> Tensor:
    return torch.cat([parameter.detach().flatten() for name, parameter in model.named_parameters() if "lora_A" in name])


def test_the_seed_of_the_run_draws_its_adapters(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = {"rank": 2}
    first, same, other = (
        adapters(build(config_in(tmp_path, home, model__lora=lora, run__name=name, run__seed=seed), monkeypatch))
        for name, seed in (("first", 3), ("same", 3), ("other", 4))
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("changes", "sampled"),
    [
        (NO_SAMPLES, None),
        ({"evaluation__max_new_tokens": 90}, ("evaluation", 90)),
        ({**NO_SAMPLES, "evaluation__max_new_tokens": 90}, None),
        ({"data__max_tokens": 124, "objective__sft": {"reduction": "seq_mean", "eta": 1.0, "base": "reference"}},
         ("train", 100)),
    ],
    ids=["pairs", "evaluation-samples", "no-samples", "base-samples"],
)  # fmt: skip
def test_the_longest_sequence_is_that_of_the_data_or_of_samples(
    home: Path, tmp_path: Path, changes: dict[str, Any], sampled: tuple[str, int] | None
) -> None:
    config = config_in(tmp_path, home, **changes)
    pairs = prepare(config, Silent())
    sets = {"train": pairs.train, "evaluation": pairs.evaluation}
    groups = {name: [one.group(index) for index in range(len(one))] for name, one in sets.items()}
    expected = [
        len(group.prompt) + len(completion)
        for one in groups.values()
        for group in one
        for completion in group.completions
    ]
    if sampled is not None:
        name, num_new = sampled
        expected += [len(group.prompt) + num_new for group in groups[name]]
    assert longest_sequence(config, pairs, Objective(config.objective)) == max(expected)


def test_positions_that_do_not_suffice_are_one_clear_line(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = config_in(tmp_path, home, data__max_tokens=4096, **NO_SAMPLES)
    longest = longest_sequence(roomy, prepare(roomy, Silent()), Objective(roomy.objective))
    for positions in (longest, longest - 1):
        model = write_model(tmp_path / f"{positions}", **GPT2, max_position_embeddings=positions)
        config = config_in(
            tmp_path, home, model, data__max_tokens=4096, run__name=f"with-{positions}", **NO_SAMPLES
        )  # fmt: skip
        if positions == longest:
            build(config, monkeypatch)
            continue
        with pytest.raises(TrainingError, match=f"up to {longest} tokens exceed .* = {positions}: ") as raised:
            build(config, monkeypatch)
        assert raised.value.exit_code == 2
        assert "\n" not in str(raised.value)


def reference_in(config: RpoConfig, layout: Layout, **settings: Any) -> None:
    """Compute or verify the reference's log-probabilities."""
    pairs = prepare(config, Silent())
    model = cast_parameters(load_policy(config.model, layout=layout), DTYPES[config.model.dtype])
    how = Pass(model, layout, 4, ALONE)
    reference_log_probs(pairs, reference_key(config, pairs), ReferenceConfig(**settings), how, lambda *told: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reference_is_verified_as_closely_as_its_dtype_is_exact(home: Path, tmp_path: Path, dtype: str) -> None:
    config = config_in(tmp_path, home, model__dtype=dtype)
    reference_in(config, "shared_prompt")
    reference_in(config, "padded", verify_pairs=38)
    if dtype == "bfloat16":
        with pytest.raises(TrainingError, match=r"reference.tolerance: 0.001\)"):
            reference_in(config, "padded", verify_pairs=38, tolerance=1e-3)


def test_what_a_loss_makes_of_rounding_does_not_stop_its_run(home: Path, tmp_path: Path) -> None:
    """In another layout bfloat16 rounds otherwise, and IPO has a slope of 1 / beta."""
    changes = {"model__dtype": "bfloat16", "training__num_steps": 1, "reference__verify_pairs": 0, **NO_SAMPLES}
    tree = rpo_tree(tmp_path, home / "model", home / "pairs.jsonl", **changes)
    config = write_config(tmp_path, tree | {"objective": {"loss": "ipo", "beta": 0.01}})
    reference_in(load_rpo_config(config), "shared_prompt")
    run_job(config, "training.layout=padded", script="rpo.py")
    [record] = metrics(tmp_path / "aligned", "train")
    assert 0.02 < abs(record["loss"]["preference"] - 2500) < 25
