"""Preference runs in real processes: killed and resumed, on other ranks and launchers, with adapters, refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixwright.data_mixing.errors import MixingError
from mixwright.pretrain.rpo.config import load_rpo_config
from mixwright.pretrain.rpo.job import run_rpo
from mixwright.pretrain.rpo.pairs import open_pairs
from tests.pretrain.jobs import digests, finish, metrics, run_job, start_job, wait_for_step, write_config
from tests.pretrain.rpo_cases import NUM_STEPS, Silent, model_and_pairs, rpo_tree, write_model

SCRIPT = "rpo.py"
ACCELERATE = (
    "accelerate", "launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--main_process_port",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_pairs(tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> Path:
    """Folder of a run that was never interrupted."""
    folder = home / "undisturbed"
    output = run_job(config_in(home, folder), script=SCRIPT)
    assert "SFT term on chosen completions" in output
    return folder / "aligned"


def config_in(home: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_config(folder, rpo_tree(folder, home / "model", home / "pairs.jsonl", **changes))


def of_steps(run_dir: Path, key: str) -> list[Any]:
    return [record[key] for record in metrics(run_dir, "step")]


def refusal(config: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and error line of a run that must not start."""
    code, output = finish(start_job(config, *overrides, script=SCRIPT))
    assert "Traceback" not in output
    return code, next(line for line in output.splitlines() if line.startswith("error:"))


def test_a_run_learns_what_is_preferred_and_tells_of_it(undisturbed: Path) -> None:
    first, last = metrics(undisturbed, "train")[0], metrics(undisturbed, "train")[-1]
    assert last["loss"]["preference"] < first["loss"]["preference"]
    assert last["rewards"]["accuracy"] > 0.7
    assert sum(record["num_pairs"] for record in metrics(undisturbed, "train")) == 8 * NUM_STEPS
    evaluations = metrics(undisturbed, "evaluation")
    assert [record["step"] for record in evaluations] == [0, 6, NUM_STEPS]
    assert evaluations[0]["loss"]["preference"] == pytest.approx(np.log(2), abs=1e-5)
    assert evaluations[0]["divergence"]["kl"] == pytest.approx(0, abs=1e-6)
    assert evaluations[-1]["divergence"]["kl"] > 0
    assert all(record["num_pairs"] == 7 for record in evaluations)
    assert 0 < evaluations[0]["entropy_per_token"] < 6
    samples = [json.loads(line) for line in (undisturbed / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 6, 6, NUM_STEPS, NUM_STEPS]


def test_the_export_has_the_reported_log_probabilities(home: Path, undisturbed: Path) -> None:
    """By plain transformers, sequence by sequence, for the held-out pairs."""
    model = AutoModelForCausalLM.from_pretrained(undisturbed / "export").double()
    assert AutoTokenizer.from_pretrained(undisturbed / "export").chat_template
    (folder,) = (undisturbed.parent / "preferences").glob("pairs-*")
    pairs = open_pairs(folder).evaluation
    found = []
    for index in range(len(pairs)):
        group = pairs.group(index)
        tokens = torch.from_numpy(np.concatenate([group.prompt, group.completions[0]]).astype(np.int64))
        with torch.no_grad():
            log_p = torch.log_softmax(model(tokens[None, :-1]).logits[0], -1)
        found.append(float(log_p.gather(1, tokens[1:, None])[len(group.prompt) - 1 :].sum()))
    reported = metrics(undisturbed, "evaluation")[-1]["logp"]["chosen"]
    assert reported == pytest.approx(np.mean(found), rel=1e-5)


def test_killed_at_any_step_the_same_command_gives_the_same_run(home: Path, undisturbed: Path, tmp_path: Path) -> None:
    config = config_in(home, tmp_path)
    job = start_job(config, script=SCRIPT)
    wait_for_step(tmp_path / "aligned", 6, job)
    os.killpg(job.pid, signal.SIGKILL)
    finish(job)
    output = run_job(config, script=SCRIPT)
    assert "resuming after step" in output
    assert digests(tmp_path / "aligned") == digests(undisturbed)
    latest = {record["step"]: record["grad_norm"] for record in metrics(tmp_path / "aligned", "step")}
    assert list(latest.values()) == of_steps(undisturbed, "grad_norm")
    one, other = (load_file(folder / "export" / "model.safetensors") for folder in (undisturbed, tmp_path / "aligned"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_interrupted_it_writes_a_checkpoint_and_says_how_to_go_on(home: Path, tmp_path: Path) -> None:
    config = config_in(home, tmp_path, training__num_steps=400, checkpoint__every=400)
    job = start_job(config, script=SCRIPT)
    wait_for_step(tmp_path / "aligned", 3, job)
    job.send_signal(signal.SIGTERM)
    code, output = finish(job)
    assert (code, "run the same command again" in output) == (75, True)
    assert list((tmp_path / "aligned" / "checkpoints").glob("step-*/sealed.json"))


def test_an_evaluation_that_a_stop_did_not_wait_for_is_made_up_for(home: Path, tmp_path: Path) -> None:
    quick = {"evaluation__every": 1, "evaluation__kl_samples": 0, "evaluation__generations": 0}
    config, run_dir = config_in(home, tmp_path, training__num_steps=20, **quick), tmp_path / "aligned"
    job = start_job(config, script=SCRIPT)
    wait_for_step(run_dir, 3, job)
    job.send_signal(signal.SIGTERM)
    assert finish(job)[0] == 75
    stopped = metrics(run_dir, "step")[-1]["step"]
    assert [record["step"] for record in metrics(run_dir, "evaluation")] == list(range(stopped))
    run_job(config, script=SCRIPT)
    assert [record["step"] for record in metrics(run_dir, "evaluation")] == list(range(21))


@pytest.mark.parametrize(
    ("how", "zero_stage", "layout"),
    [({"launcher": ACCELERATE}, 0, "packed"), ({"num_ranks": 2}, 3, "shared_prompt")],
    ids=["accelerate", "deepspeed-zero-3"],
)
def test_two_ranks_do_what_one_does(
    home: Path, undisturbed: Path, tmp_path: Path, how: dict[str, Any], zero_stage: int, layout: str
) -> None:
    changes = {"training__zero_stage": zero_stage, "training__layout": layout, "training__micro_batch_pairs": 2}
    config = config_in(home, tmp_path)
    tree = rpo_tree(tmp_path, home / "model", home / "pairs.jsonl")
    tree["training"] |= {key.removeprefix("training__"): value for key, value in changes.items()}
    write_config(tmp_path, tree)
    output = run_job(config, script=SCRIPT, **how)
    assert f"2 rank(s), ZeRO {zero_stage}" in output
    assert digests(tmp_path / "aligned") == digests(undisturbed)
    assert of_steps(tmp_path / "aligned", "grad_norm") == pytest.approx(of_steps(undisturbed, "grad_norm"), rel=2e-3)
    mine, theirs = (metrics(folder, "evaluation")[-1] for folder in (tmp_path / "aligned", undisturbed))
    assert mine["rewards"] == pytest.approx(theirs["rewards"], rel=2e-3, abs=2e-3)
    assert mine["divergence"]["kl"] == pytest.approx(theirs["divergence"]["kl"], rel=0.05, abs=0.01)
    AutoModelForCausalLM.from_pretrained(tmp_path / "aligned" / "export")


def test_adapters_train_alone_and_are_merged_for_export(home: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 8.0}
    config = config_in(home, tmp_path, model__lora=lora, training__zero_stage=2)
    output = run_job(config, script=SCRIPT)
    run = tmp_path / "aligned"
    assert metrics(run, "evaluation")[0]["loss"]["preference"] == pytest.approx(np.log(2), abs=1e-5)
    trained, whole = (int(text.replace(",", "")) for text in counts_in(output))
    assert trained < whole / 4
    merged = load_file(run / "export" / "model.safetensors")
    before = load_file(home / "model" / "model.safetensors")
    assert merged.keys() == before.keys()
    moved = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert moved
    assert all("_proj" in name for name in moved)
    assert (run / "export" / "adapter" / "adapter_model.safetensors").is_file()


def counts_in(output: str) -> tuple[str, str]:
    line = next(line for line in output.splitlines() if line.startswith("model: "))
    whole, trained = line.removeprefix("model: ").split(" parameters, ")
    return trained.split(" trained")[0], whole


def test_a_loss_that_sees_the_whole_step_does_not_depend_on_how_it_is_cut(home: Path, tmp_path: Path) -> None:
    """AUC compares completions of all ranks and micro-batches with each other."""
    norms = []
    for name, size, how in (("whole", 8, {}), ("cut", 2, {"num_ranks": 2})):
        config = config_in(
            home, tmp_path / name, objective__loss="auc", training__num_steps=4, training__micro_batch_pairs=size,
            training__pairs_per_step=8, training__num_threads=1, evaluation__every=0, evaluation__kl_samples=0,
            evaluation__generations=0,
        )  # fmt: skip
        run_job(config, script=SCRIPT, **how)
        norms.append(of_steps(tmp_path / name / "aligned", "grad_norm"))
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.parametrize(
    ("how", "tolerance"),
    [({"model__dtype": "bfloat16"}, 0.03), ({"training__zero_stage": 2}, 2e-3)],
    ids=["bfloat16", "zero-2"],
)
def test_micro_batches_add_up_where_deepspeed_keeps_the_gradients(
    home: Path, undisturbed: Path, tmp_path: Path, how: dict[str, Any], tolerance: float
) -> None:
    """It must see every backward pass begin, or it counts earlier micro-batches of a step twice."""
    quick = {"evaluation__every": 0, "evaluation__kl_samples": 0, "evaluation__generations": 0}
    run_job(config_in(home, tmp_path, **how, **quick), "training.micro_batch_pairs=2", script=SCRIPT)
    # From the fourth step on the courses of bfloat16 and float32 part, whatever the micro-batches.
    found, expected = (of_steps(folder, "grad_norm")[:3] for folder in (tmp_path / "aligned", undisturbed))
    assert found == pytest.approx(expected, rel=tolerance)


def test_samples_of_the_reference_can_be_what_is_learned(home: Path, tmp_path: Path) -> None:
    sft = {"reduction": "token_mean", "weight": 0.5, "base": "reference"}
    config = config_in(home, tmp_path, objective__sft=sft, training__num_steps=4)
    output = run_job(config, script=SCRIPT)
    assert "SFT term on samples of the reference" in output
    (folder,) = (tmp_path / "preferences").glob("pairs-*/base-samples-*")
    with np.load(folder / "part-000000.npz") as part:
        assert len(part["lengths"]) == 38
        assert part["lengths"].min() >= 1


def test_the_same_command_on_a_complete_run_trains_nothing(home: Path, undisturbed: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    output = run_job(undisturbed.parent / "run.yaml", script=SCRIPT)
    assert "is complete" in output
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_a_stale_reference_is_refused(home: Path, undisturbed: Path, tmp_path: Path) -> None:
    (cache,) = (undisturbed.parent / "preferences").glob("pairs-*/reference-*")
    other = write_model(tmp_path / "other", seed=1)
    config = write_config(tmp_path, rpo_tree(tmp_path, other, home / "pairs.jsonl", reference__cache=str(cache)))
    code, line = refusal(config)
    assert code == 2
    assert "is stale" in line
    assert "parameters" in line


def test_a_damaged_reference_is_found_by_computing_some_again(home: Path, tmp_path: Path) -> None:
    config = config_in(home, tmp_path, training__num_steps=2, reference__verify_pairs=38)
    run_job(config, script=SCRIPT)
    (part,) = (tmp_path / "preferences").glob("pairs-*/reference-*/train/part-*.npy")
    values = np.load(part)
    values[:, 1] += 3.0
    np.save(part, values)
    code, line = refusal(config, "run.name=again")
    assert code == 2
    assert "differ by" in line
    code, line = refusal(config, "run.name=again", "reference.verify_pairs=0")
    assert code == 2
    assert "the policy before the first step is" in line
    assert "(reference.tolerance: 0.001)" in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__path": "nowhere/at/all"}, "model.path"),
        ({"data__train": "nothing.jsonl"}, "nothing.jsonl"),
        ({"data__columns": {"chosen": "chosn"}}, "did you mean 'chosen'"),
        ({"objective__beta": 0}, "objective.beta"),
        ({"training__num_epochs": 1}, "exactly one of `num_steps`"),
        ({"data__max_prompt_tokens": 64}, "no room for a completion"),
        ({"deepspeed__train_batch_size": 8}, "training.pairs_per_step"),
    ],
)
def test_bad_input_is_one_clear_line(home: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    tree = rpo_tree(tmp_path, home / "model", home / "pairs.jsonl", **changes)
    with pytest.raises(MixingError) as raised:
        run_rpo(load_rpo_config(write_config(tmp_path, tree)), Silent())
    assert raised.value.exit_code == 2
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "aligned" / "metrics.jsonl").exists()


def test_a_run_that_was_begun_with_another_objective_is_not_continued(home: Path, undisturbed: Path) -> None:
    (undisturbed / "done.json").rename(undisturbed / "kept")
    try:
        code, line = refusal(undisturbed.parent / "run.yaml", "objective.beta=0.7")
    finally:
        (undisturbed / "kept").rename(undisturbed / "done.json")
    assert code == 2
    assert "begun with other settings" in line
