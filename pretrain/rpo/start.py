"""Before a run's first step: the model's folder, tokenised pairs, the reference, and whether it is the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mixwright.data_mixing.permutation import mix_key
from mixwright.data_mixing.plain_data import read_json_object
from mixwright.data_mixing.staging import atomic_file
from mixwright.pretrain.errors import CheckpointMismatch
from mixwright.pretrain.model import DTYPES, cast_parameters
from mixwright.pretrain.progress import Watcher, stage_progress
from mixwright.pretrain.ranks import Ranks
from mixwright.pretrain.rpo.base_samples import base_samples
from mixwright.pretrain.rpo.config import RpoConfig
from mixwright.pretrain.rpo.groups import BASE
from mixwright.pretrain.rpo.model_folder import find_model, parameters_fingerprint
from mixwright.pretrain.rpo.objective import Objective
from mixwright.pretrain.rpo.pair_files import TOKENIZER
from mixwright.pretrain.rpo.pairs import PreparedPairs, prepare_pairs
from mixwright.pretrain.rpo.policy import PolicyModel
from mixwright.pretrain.rpo.preferences import Preferences
from mixwright.pretrain.rpo.reference import Pass, ReferenceKey, reference_log_probs
from mixwright.pretrain.rpo.sampling import SamplingSettings, end_ids
from mixwright.pretrain.rpo.templates import load_tokenizer

IDENTITY = "identity.json"


def with_model_folder(config: RpoConfig) -> RpoConfig:
    """The configuration with `model.path` as the Hugging Face folder that it means. Raises TrainingError."""
    model = config.model.model_copy(update={"path": str(find_model(config.model.path))})
    return config.model_copy(update={"model": model})


def prepare(config: RpoConfig, watcher: Watcher) -> PreparedPairs:
    """The run's pairs, tokenised now or before. Raises DataError."""
    return prepare_pairs(
        config.data,
        model_folder=config.model.path,
        chat_template=config.model.chat_template,
        folder=config.prepared_folder,
        seed=config.run.seed,
        say=watcher.say,
        progress=stage_progress(watcher.say),
    )


def reference_key(config: RpoConfig, prepared: PreparedPairs) -> ReferenceKey:
    """What decides the reference's log-probabilities. Raises TrainingError for a model without parameters."""
    return ReferenceKey(parameters_fingerprint(Path(config.model.path)), config.model.dtype, prepared.fingerprint)


def longest_sequence(config: RpoConfig, prepared: PreparedPairs, objective: Objective) -> int:
    """Tokens of the longest prompt with a completion that the run may read or write."""
    train_n3, evaluation_n3 = prepared.train.lengths, prepared.evaluation.lengths
    found = [int((n3[:, 0] + n3[:, 1:].max(axis=1)).max()) for n3 in (train_n3, evaluation_n3) if len(n3)]
    if len(evaluation_n3) and (config.evaluation.generations or config.evaluation.kl_samples):
        found.append(int(evaluation_n3[:, 0].max()) + config.evaluation.max_new_tokens)
    if objective.num_completions == 3:
        found.append(int(train_n3[:, 0].max()) + _base_tokens(config))
    return max(found)


def tokenizer_of(prepared: PreparedPairs) -> Any:
    """The tokenizer that the pairs were made with, its chat template included."""
    return load_tokenizer(str(prepared.folder / TOKENIZER), None)


def find_preferences(
    config: RpoConfig,
    prepared: PreparedPairs,
    key: ReferenceKey,
    model: PolicyModel,
    objective: Objective,
    ranks: Ranks,
    watcher: Watcher,
) -> Preferences:
    """All that training reads; what is missing is computed with `model`, which is still the reference. Collective."""
    cast_parameters(model, DTYPES[config.model.dtype])
    tell = stage_progress(watcher.say)
    how = Pass(model, config.training.layout, config.training.micro_batch_pairs, ranks)
    reference = reference_log_probs(prepared, key, config.reference, how, tell)
    base = None
    if objective.sft is not None and objective.sft.place == BASE:
        settings = SamplingSettings(_base_tokens(config), 1.0, end_ids(model, tokenizer_of(prepared)))
        seed = mix_key(config.run.seed) >> 1
        base = base_samples(prepared, key, model, settings, seed, ranks, tell)
    return Preferences(prepared.train, prepared.evaluation, reference, base)


def _base_tokens(config: RpoConfig) -> int:
    """Most tokens of a sample of the reference that the SFT term learns from."""
    return config.data.max_tokens - config.data.max_prompt_tokens


def check_same_run(config: RpoConfig, key: ReferenceKey, num_steps: int) -> None:
    """Note what decides the run's course, or compare it with the first start's. Raises CheckpointMismatch."""
    training = config.training
    decides = {
        "model": key.parameters,
        "pairs": key.pairs,
        "objective": config.objective.model_dump(mode="json"),
        "run.seed": config.run.seed,
        "training.pairs_per_step": training.pairs_per_step,
        "num_steps": num_steps,
        "model.lora": config.model.model_dump(mode="json")["lora"],
        "model.dtype": config.model.dtype,
    }
    path = config.run_dir / IDENTITY
    if not path.is_file():
        with atomic_file(path) as file:
            file.write(json.dumps(decides, indent=1).encode())
        return
    try:
        found = read_json_object(path, strict=True)
    except (OSError, ValueError) as error:
        raise CheckpointMismatch(f"{path}: cannot be read: {error}") from None
    differing = [name for name in decides if found.get(name) != decides[name]]
    if differing:
        shown = "; ".join(f"{name} was {found.get(name)}, is {decides[name]}" for name in differing)
        raise CheckpointMismatch(
            f"{config.run_dir}: run {config.run.name!r} was begun with other settings ({shown[:600]}): "
            "give them again, or choose another run.name"
        )
