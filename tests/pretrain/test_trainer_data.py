"""The order contract under `transformers.Trainer`: what reaches the model is the plan's batch, in order."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixwright.data_mixing.errors import JournalError, PlanMismatch
from mixwright.data_mixing.feeder import store_order
from mixwright.data_mixing.plan import Plan, run_digest
from mixwright.data_mixing.run_start import NewRun
from mixwright.data_mixing.seal import Seal
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.errors import TrainingError
from mixwright.pretrain.rundir import read_history
from mixwright.pretrain.trainer_data import PlannedRows, TrainerMixing
from tests.pretrain.trainer_cases import NEW, ROWS, STEPS, train, train_each
from tests.ranks import run_ranks


def planned(plan: Plan, store: TokenStore, step: int) -> np.ndarray:
    """The inputs [rows_per_step, T] of a step, in order."""
    refs = plan.rows(step)
    return store.gather(store_order(plan.genesis, store)[refs.domain_n], refs.row_n)[:, :-1].astype(np.int64)


def by_step(ranks: list[dict[str, Any]], accumulation: int) -> list[np.ndarray]:
    """What reached the models of all processes in each optimizer step, in order of (accumulation, process)."""
    micro = [rank["seen"] for rank in ranks]
    assert len({len(seen) for seen in micro}) == 1
    steps = range(0, len(micro[0]), accumulation)
    return [
        np.concatenate([seen[first + k] for k in range(accumulation) for seen in micro]) for first in steps
    ]  # fmt: skip


def check(folder: Path, store: Path, ranks: list[dict[str, Any]], accumulation: int, first_step: int = 0) -> None:
    history, tokens = read_history(folder / "run"), TokenStore.open(store)
    plan = history.plan()
    found = by_step(ranks, accumulation)
    assert len(found) == STEPS - first_step
    for step, batch in enumerate(found, first_step):
        np.testing.assert_array_equal(batch, planned(plan, tokens, step), err_msg=f"step {step}")
    assert ranks[0]["digest"] == run_digest(plan, STEPS)
    assert history.end is not None
    assert int(history.end.digest, 16) == run_digest(plan, STEPS)
    reports = [(r.first_step, r.last_step, int(r.digest, 16)) for r in history.reports if r.kind == "train"]
    for first, last, digest in reports:
        assert digest == sum(plan.digest(step) for step in range(first, last + 1)) % (1 << 64)
    assert reports[-1][1] == STEPS - 1


@pytest.mark.parametrize(
    ("batch", "settings"),
    [
        (8, {}),
        (2, {"dataloader_num_workers": 2}),
        (1, {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4}),
    ],
)
def test_one_process_reads_the_plan_in_order(
    tiny_store: Path, tmp_path: Path, batch: int, settings: dict[str, Any]
) -> None:
    found = train(tmp_path, tiny_store, 1, batch, settings)
    check(tmp_path, tiny_store, [found], ROWS // batch)


TWO_PROCESSES: dict[str, tuple[int, dict[str, Any]]] = {
    "shards": (4, {}),
    "workers": (2, {"dataloader_num_workers": 2}),
    "dispatch": (2, {"accelerator_config": {"dispatch_batches": True}}),
}


@pytest.mark.slow
def test_two_processes_read_the_plan_in_order_however_accelerate_shares_it_out(
    tiny_store: Path, tmp_path: Path
) -> None:
    ranks = run_ranks(train_each, 2, tmp_path, tiny_store, 2, TWO_PROCESSES)
    alone = train(tmp_path / "alone", tiny_store, 1, ROWS, {})
    for name, (batch, _) in TWO_PROCESSES.items():
        check(tmp_path / name, tiny_store, [rank[name] for rank in ranks], ROWS // batch // 2)
        assert ranks[0][name]["losses"] == pytest.approx(alone["losses"], abs=1e-4)


def test_a_training_that_is_resumed_reads_on_where_its_checkpoint_was(tiny_store: Path, tmp_path: Path) -> None:
    first = train(tmp_path, tiny_store, 1, 2, {}, stop_at=6)
    assert len(first["seen"]) == 6 * 4
    assert read_history(tmp_path / "run").end is None
    rest = train(tmp_path, tiny_store, 1, 4, {"dataloader_num_workers": 2}, resume=True)
    check(tmp_path, tiny_store, [rest], 2, first_step=6)
    assert read_history(tmp_path / "run").checkpoints[0].step == 6


def test_a_policy_that_comes_while_it_trains_is_followed_by_worker_processes(tiny_store: Path, tmp_path: Path) -> None:
    new = NewRun(policy=NEW.policy, rows_per_step=ROWS, num_steps=40, seed=3)
    found = train(tmp_path, tiny_store, 1, 4, {"dataloader_num_workers": 2}, stop_at=40, new=new, submit=True)
    history, tokens = read_history(tmp_path / "run"), TokenStore.open(tiny_store)
    effective_step = history.commits[1].effective_step
    assert 2 < effective_step < 40
    for step, batch in enumerate(by_step([found], 2)):
        np.testing.assert_array_equal(batch, planned(history.plan(), tokens, step), err_msg=f"step {step}")
    last = history.reports[-1]
    assert set(last.domains) == {"numbers"}
    assert last.domains["numbers"].num_rows == ROWS * (last.last_step - last.first_step + 1)


def test_rows_that_are_asked_for_out_of_order_are_refused(tiny_store: Path, tmp_path: Path) -> None:
    with TrainerMixing(tmp_path / "run", TokenStore.open(tiny_store), begin=NEW) as mixing:
        with pytest.raises(TrainingError, match="train_sampling_strategy='sequential'"):
            mixing.rows.__getitems__([3, 1])
        with pytest.raises(TrainingError, match=r"expected 'sequential' \(mixing.arguments\)"):
            train_with_other_arguments(tmp_path, mixing, train_sampling_strategy="random")
        with pytest.raises(TrainingError, match=r"x processes is 4, expected 8"):
            train_with_other_arguments(tmp_path, mixing, gradient_accumulation_steps=2)
        with pytest.raises(TrainingError, match="no multiple of per_device_train_batch_size x processes = 3 x 1"):
            mixing.arguments(per_device_train_batch_size=3)


def train_with_other_arguments(folder: Path, mixing: TrainerMixing, **changes: Any) -> None:
    from transformers import Trainer, TrainingArguments

    from tests.pretrain.trainer_cases import tiny_llama

    settings = {**mixing.arguments(per_device_train_batch_size=2), **changes}
    arguments = TrainingArguments(output_dir=str(folder / "out"), use_cpu=True, report_to=[], **settings)
    Trainer(tiny_llama(), arguments, train_dataset=mixing.rows, callbacks=[mixing]).train()


def test_labels_of_other_rows_stop_the_training_with_the_next_report(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PlannedRows.tokens

    def swapped(self: PlannedRows, indices: Any) -> np.ndarray:
        return right(self, indices)[::-1].copy()

    monkeypatch.setattr(PlannedRows, "tokens", swapped)
    with pytest.raises(PlanMismatch, match=r"steps 0-3: \d+ labels are not those of the plan's rows"):
        train(tmp_path, tiny_store, 1, 4, {})
    assert not read_history(tmp_path / "run").reports


def test_a_reader_waits_until_a_step_is_settled_and_says_what_it_waited_for(tiny_store: Path, tmp_path: Path) -> None:
    with TrainerMixing(tmp_path / "run", TokenStore.open(tiny_store), begin=NEW, wait_timeout_s=0.2) as mixing:
        with pytest.raises(JournalError, match=r"step 0 is not settled after 0.2 s .*does rank 0 train"):
            mixing.rows[0]
        Seal(3, 2).write(tmp_path / "run")
        copied = pickle.loads(pickle.dumps(mixing.rows))
        assert len(copied[3 * ROWS - 1]["input_ids"]) == 16
        with pytest.raises(JournalError, match=r"step 3 is not settled .*before 3\)"):
            copied[3 * ROWS]
