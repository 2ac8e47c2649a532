"""A `transformers.Trainer` on a run's rows that notes what reaches the model; run in processes of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.journal import Journal
from mixwright.data_mixing.run_start import NewRun
from mixwright.data_mixing.store import TokenStore
from mixwright.pretrain.trainer_data import TrainerMixing

ROWS, STEPS = 8, 10
NEW = NewRun(policy={"kind": "temperature", "temperature": 1.0}, rows_per_step=ROWS, num_steps=STEPS, seed=3)


class Submits(TrainerCallback):
    """Somebody submits a policy while step 2 trains."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            journal = Journal(self._run_dir / "journal", "somebody")
            genesis = journal.poll()[0].body
            journal.append(accept({"kind": "static", "mixture": {"numbers": 1}}, genesis))


class StopsAt(TrainerCallback):
    """The job ends, as if it were killed, after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self._step


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


def train(
    folder: Path, store: Path, world: int, batch: int, settings: dict[str, Any], stop_at: int = STEPS,
    resume: bool = False, new: NewRun = NEW, submit: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One process of a training; returns the [B, T] inputs of every micro-batch, in order, and the losses."""
    torch.set_num_threads(1)
    seen: list[torch.Tensor] = []
    with TrainerMixing(folder / "run", TokenStore.open(store), begin=new, report_every=4) as mixing:
        arguments = TrainingArguments(
            output_dir=str(folder / "out"), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="steps",
            save_steps=stop_at, logging_steps=1, lr_scheduler_type="constant", **settings,
            **mixing.arguments(per_device_train_batch_size=batch, world_size=world),
        )  # fmt: skip
        model = tiny_llama()
        model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].clone()), with_kwargs=True)
        callbacks = [mixing, StopsAt(stop_at), *([Submits(folder / "run")] if submit else [])]
        trainer = Trainer(
            model, arguments, train_dataset=mixing.rows, callbacks=callbacks, compute_loss_func=mixing.loss
        )
        trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seen": [tensor.numpy() for tensor in seen], "losses": losses, "digest": mixing.run_digest}


def train_each(folder: Path, store: Path, world: int, cases: dict[str, tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """`train` for every (micro-batch, settings), below a folder of its own: starting a process takes longer."""
    results = {name: train(folder / name, store, world, *case) for name, case in cases.items()}
    torch.distributed.destroy_process_group()
    return results
