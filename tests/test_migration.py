"""The examples of docs/migration: they run as they stand, and what is said to be equal is."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mixwright.data_mixing.config_file import validate
from mixwright.data_mixing.corpora import load_corpora_config
from mixwright.data_mixing.plan import run_digest
from mixwright.data_mixing.prepare import prepare
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.config import PretrainConfig
from mixwright.pretrain.rpo.config import RpoConfig
from mixwright.pretrain.rpo.groups import Group
from mixwright.pretrain.rpo.layout import lay_out
from mixwright.pretrain.rpo.objective import Objective, StepScope
from mixwright.pretrain.rpo.policy import load_policy
from mixwright.pretrain.rundir import read_history
from tests.pretrain.rpo_cases import write_model, write_pairs

PAGES = Path(__file__).resolve().parent.parent / "docs" / "migration"
BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"
WORDS = {"letters": "alpha beta gamma delta epsilon zeta", "numbers": "one two three four five six seven"}


def blocks(page: str, language: str) -> list[str]:
    """Code of a page, in order."""
    return re.findall(rf"```{language}\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)


def run(code: str, **names: Any) -> dict[str, Any]:
    """The names that an example has defined; `names` are those that the page takes for granted."""
    exec(compile(code, str(PAGES), "exec"), names)
    return names


# --- transformers.Trainer --------------------------------------------------------------------------------------------


def test_the_trainer_as_it_was_and_with_our_rows(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before, after = blocks("transformers_trainer.md", "python")
    was = run(before, corpora=tiny_store.parent, tokenizer_folder=tiny_store / "tokenizer", output=tmp_path)
    now = run(after, store_folder=tiny_store, output=tmp_path)
    assert was["trainer"].state.global_step == now["trainer"].state.global_step == 20
    history = read_history(tmp_path / "after")
    assert history.end is not None
    assert int(history.end.digest, 16) == run_digest(history.plan(), 20)
    assert "colours" not in {
        name for report in history.reports for name, loss in report.domains.items() if loss.num_tokens
    }


def test_the_file_says_what_the_trainer_was_told(tiny_store: Path, tmp_path: Path) -> None:
    (text,) = blocks("transformers_trainer.md", "yaml")
    config = validate(PretrainConfig, yaml.safe_load(text), "page")
    before, _ = blocks("transformers_trainer.md", "python")
    without_training = before.replace("trainer.train()\n", "")
    was = run(without_training, corpora=tiny_store.parent, tokenizer_folder=tiny_store / "tokenizer", output=tmp_path)
    told = was["arguments"]
    assert config.run.seed == told.seed
    assert config.optimizer.lr == told.learning_rate
    assert config.optimizer.betas == (told.adam_beta1, told.adam_beta2)
    assert (config.optimizer.weight_decay, config.optimizer.eps) == (told.weight_decay, told.adam_epsilon)
    assert config.training.clip_norm == told.max_grad_norm
    assert config.training.num_steps == told.max_steps
    assert config.training.micro_batch_rows == told.per_device_train_batch_size
    assert config.training.rows_per_step == told.per_device_train_batch_size * told.gradient_accumulation_steps


# --- TRL -------------------------------------------------------------------------------------------------------------


def test_the_converted_dpo_configuration_has_the_same_loss(tmp_path: Path) -> None:
    """TRL's tokens, references that make margins neither 0 nor extreme, its arguments beside our file."""
    trl = pytest.importorskip("trl")
    model_folder, pairs = write_model(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 16)
    (example,) = blocks("trl.md", "python")
    done = run(example, output=tmp_path / "trl", model_folder=model_folder, pairs=pairs)
    assert done["trainer"].state.global_step == 2
    (text,) = blocks("trl.md", "yaml")
    config = validate(RpoConfig, yaml.safe_load(text), "page")
    told = done["arguments"]
    assert (config.optimizer.lr, config.training.num_steps, config.data.max_tokens) == (1e-4, 2, told.max_length)
    assert config.training.pairs_per_step == told.per_device_train_batch_size * told.gradient_accumulation_steps

    rows = [dict(row) for row in done["trainer"].train_dataset.select(range(4))]
    for index, row in enumerate(rows):
        row["ref_chosen_logps"] = -5.0 * len(row["chosen_ids"]) + index
        row["ref_rejected_logps"] = -5.0 * len(row["rejected_ids"]) - index
    trainer = trl.DPOTrainer(
        done["AutoModelForCausalLM"].from_pretrained(model_folder).train(),
        args=dataclasses.replace(told, precompute_ref_log_probs=True),
        train_dataset=done["load_dataset"]("json", data_files=str(pairs), split="train"),
        processing_class=done["AutoTokenizer"].from_pretrained(model_folder),
    )
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(rows))

    groups = [
        Group(index, *(_ids(row["prompt_ids"]),), (_ids(row["chosen_ids"]), _ids(row["rejected_ids"])))
        for index, row in enumerate(rows)
    ]
    reference_P2 = torch.tensor([[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in rows])
    policy = load_policy(config.model.model_copy(update={"path": str(model_folder)}), layout=config.training.layout)
    scope = StepScope(len(groups), sum(len(row["chosen_ids"]) for row in rows))
    loss, _ = Objective(config.objective)(policy(lay_out(groups, config.training.layout)), reference_P2, scope)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-5)


def _ids(row: list[int]) -> Any:
    return np.array(row, dtype=np.int32)


# --- mosaicml-streaming ----------------------------------------------------------------------------------------------


def write_texts(folder: Path) -> dict[str, list[str]]:
    chance = np.random.default_rng(1)
    texts = {name: [" ".join(chance.choice(words.split(), 60)) for _ in range(80)] for name, words in WORDS.items()}
    for name, documents in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return texts


def test_texts_of_a_streaming_dataset_become_a_run(tmp_path: Path) -> None:
    """From the JSONL that the page's conversion writes, to a run with exact counts."""
    write_texts(tmp_path)
    (corpora,) = blocks("mosaicml_streaming.md", "yaml")
    (tmp_path / "corpora.yaml").write_text(corpora)
    prepare(load_corpora_config(tmp_path / "corpora.yaml"), tmp_path)
    code = blocks("mosaicml_streaming.md", "python")[2]
    done = run(code, store_folder=tmp_path / "store", run_dir=tmp_path / "run")
    assert dict(zip(done["names"], done["counts"].tolist(), strict=True)) == {"letters": 56, "numbers": 24}
    assert TokenStore.open(tmp_path / "store").names == ("letters", "numbers")


def test_mds_folders_become_the_texts_that_they_were_made_of(tmp_path: Path) -> None:
    """In a process of the interpreter that has the package, as for the benchmarks: ours need not have it."""
    python = os.environ.get("MIXWRIGHT_PEERS_PYTHON", sys.executable)
    looked_for = "import importlib.util as u; exit(u.find_spec('streaming') is None)"
    if subprocess.run([python, "-c", looked_for], check=False).returncode:
        pytest.skip(f"{python} has no mosaicml-streaming (MIXWRIGHT_PEERS_PYTHON names one that has)")
    write_texts(tmp_path)
    (tmp_path / "corpora").mkdir()
    before, conversion, _ = blocks("mosaicml_streaming.md", "python")
    program = f"{MAKE_MDS}\n{before}\nassert sum(map(len, batches)) == 80\n{conversion}"
    done = subprocess.run(
        [python, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in WORDS:
        assert (tmp_path / "corpora" / f"{name}.jsonl").read_text() == (tmp_path / f"{name}.jsonl").read_text()


MAKE_MDS = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(BENCHMARKS)!r})
from loader_providers import import_streaming
folder = Path(sys.argv[1])
mds, corpora = folder / "mds", folder / "corpora"
for name in {list(WORDS)}:
    with import_streaming().MDSWriter(out=str(mds / name), columns={{"text": "str"}}) as writer:
        for line in (folder / f"{{name}}.jsonl").open():
            writer.write(json.loads(line))
"""
"""MDS folders of the texts, as the page takes them for granted."""
