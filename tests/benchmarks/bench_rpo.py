"""A step of preference optimisation beside TRL's DPOTrainer: CPU time, and peak memory of each side's own process.

    python -m tests.benchmarks.bench_rpo [--rounds 6] [--checkpointing]

The setting of spec/posttraining.md 4.1: a float32 Llama (hidden 256, 4 layers, 8,192 tokens), pairs of 128 + 128
tokens, 8 pairs a step, one thread, AdamW, beta 0.1. Every provider is a process with a model of its own; they take
turns step by step and read the same pairs in the same order, so that their losses can be compared. TRL's own default is
gradient checkpointing, which makes it slower and smaller: `--checkpointing` gives it to all, without it nobody has it.

CPU seconds are user and system time, which a busy machine disturbs less than the clock. Prints medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import numpy as np

VOCABULARY, HIDDEN, LAYERS = 8192, 256, 4
PAIRS, PAIRS_PER_STEP, PROMPT_TOKENS, COMPLETION_TOKENS = 64, 8, 128, 128
BETA, LEARNING_RATE, CLIP_NORM = 0.1, 1e-5, 1.0
END = 0

TRL, PRECOMPUTED = "TRL", "TRL, precomputed references"
LAYOUTS = {"ours, shared_prompt": "shared_prompt", "ours, packed": "packed"}
PROVIDERS = (TRL, PRECOMPUTED, *LAYOUTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing for all")
    parser.add_argument("--provider", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.provider:
        be_provider(arguments.provider, arguments.folder, arguments.checkpointing)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        results = measure(Path(folder), arguments.rounds, arguments.checkpointing)
    print_table(results, arguments.rounds, arguments.checkpointing)


def draw_tokens() -> np.ndarray:
    """Prompt, chosen and rejected of all pairs, [pairs, 3, tokens]; completions get their end beside it."""
    assert PROMPT_TOKENS == COMPLETION_TOKENS
    return np.random.default_rng(0).integers(2, VOCABULARY, (PAIRS, 3, PROMPT_TOKENS)).astype(np.int32)


def name_of(token: int) -> str:
    """What the tokenizer calls a token; no name is part of another."""
    return f"<{token}>"


def write_model(folder: Path) -> None:
    """The model, and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=688, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=END,
        eos_token_id=END, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    names = Tokenizer(models.WordLevel({name_of(token): token for token in range(VOCABULARY)}, unk_token=name_of(1)))
    names.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=names, eos_token=name_of(END), pad_token=name_of(END), unk_token=name_of(1)
    )
    tokenizer.save_pretrained(folder)


class Worker:
    """A provider's process: a line to it makes one step, its answer is the CPU seconds that the step took."""

    def __init__(self, provider: str, folder: Path, checkpointing: bool) -> None:
        call = [sys.executable, "-m", "tests.benchmarks.bench_rpo", "--provider", provider, "--folder", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        self._provider, self._log = provider, folder / f"{PROVIDERS.index(provider)}.log"
        self._process = subprocess.Popen(
            [*call, *(["--checkpointing"] if checkpointing else [])], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log.open("w"),
        )  # fmt: skip

    def answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self._provider} ended:\n{self._log.read_text()[-3000:]}")
        return json.loads(line)

    def ask(self, what: str) -> Any:
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self.answer()


def measure(folder: Path, rounds: int, checkpointing: bool) -> dict[str, dict[str, Any]]:
    """CPU seconds by round, peak memory and losses of every provider; its first step warms up."""
    workers: dict[str, Worker] = {}
    for provider in PROVIDERS:
        workers[provider] = Worker(provider, folder, checkpointing)
        workers[provider].answer()  # ready: they do not disturb each other's preparation
        workers[provider].ask("step")
    seconds: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
    for _ in range(rounds):
        for provider, worker in workers.items():
            seconds[provider].append(worker.ask("step"))
    return {provider: {"seconds": seconds[provider], **worker.ask("end")} for provider, worker in workers.items()}


def be_provider(provider: str, folder: Path, checkpointing: bool) -> None:
    """Answer the parent's lines until it says end."""
    import torch

    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print, answers must stay alone
    if provider in LAYOUTS:
        losses = run_ours(LAYOUTS[provider], folder, checkpointing, steps_asked_for(answers))
    else:
        losses = run_trl(provider == PRECOMPUTED, folder, checkpointing, steps_asked_for(answers))
    say(answers, {"losses": losses, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})


def say(answers: TextIO, what: Any) -> None:
    print(json.dumps(what), file=answers, flush=True)


def steps_asked_for(answers: TextIO) -> Iterator[None]:
    """Yields where a step is to be made; what is done until it is resumed is that step."""
    say(answers, "ready")
    for line in sys.stdin:
        if line.strip() == "end":
            return
        began = time.process_time()
        yield
        say(answers, time.process_time() - began)


def run_ours(layout: Any, folder: Path, checkpointing: bool, steps: Iterator[None]) -> list[float]:
    """What a rank does: lay out, forward, objective, backward, clip, update; references were kept beforehand."""
    import torch

    from mixwright.pretrain.rpo.config import ObjectiveConfig, PolicyModelConfig
    from mixwright.pretrain.rpo.groups import Group
    from mixwright.pretrain.rpo.layout import lay_out
    from mixwright.pretrain.rpo.objective import Objective, StepScope
    from mixwright.pretrain.rpo.policy import load_policy

    config = PolicyModelConfig(path=str(folder), gradient_checkpointing=checkpointing)
    model, objective = load_policy(config, layout=layout), Objective(ObjectiveConfig(beta=BETA))
    groups = [
        Group(index, prompt, tuple(np.append(completion, np.int32(END)) for completion in completions))
        for index, (prompt, *completions) in enumerate(draw_tokens())
    ]
    batches = [groups[first : first + PAIRS_PER_STEP] for first in range(0, PAIRS, PAIRS_PER_STEP)]
    with torch.no_grad():
        references = [model(lay_out(batch, layout)).logp_PC for batch in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    scope = StepScope(PAIRS_PER_STEP, PAIRS_PER_STEP * (COMPLETION_TOKENS + 1))
    losses = []
    for step, _ in enumerate(steps):
        place = step % len(batches)
        loss, _ = objective(model(lay_out(batches[place], layout)), references[place], scope)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def run_trl(precomputed: bool, folder: Path, checkpointing: bool, steps: Iterator[None]) -> list[float]:
    """The peer, with the same pairs in the same order, the same optimizer and no bfloat16."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class Turns(TrainerCallback):  # type: ignore[misc]
        """A step lasts from the end of the one before to its own end."""

        def on_train_begin(self, _: Any, __: Any, control: Any, **___: Any) -> None:
            self._next(control)

        def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
            self._next(control)

        def _next(self, control: Any) -> None:
            control.should_training_stop = next(steps, "end") == "end"

    rows = [
        dict(zip(("prompt", "chosen", "rejected"), map(in_words, parts), strict=True)) for parts in draw_tokens()
    ]  # fmt: skip
    arguments = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=PAIRS_PER_STEP, num_train_epochs=1000, beta=BETA,
        bf16=False, use_cpu=True, gradient_checkpointing=checkpointing, precompute_ref_log_probs=precomputed,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=CLIP_NORM,
        optim="adamw_torch_fused", report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = InOrder(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Turns()],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def in_words(tokens: np.ndarray) -> str:
    """With a space before it, so that a prompt and what comes after it are split between two words."""
    return "".join(f" {name_of(int(token))}" for token in tokens)


def print_table(results: dict[str, dict[str, Any]], rounds: int, checkpointing: bool) -> None:
    import torch
    import transformers
    import trl

    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}, one thread, ",
        end="",
    )
    print(f"{rounds} rounds in turns, gradient checkpointing {'on' if checkpointing else 'off'}, medians")
    print(f"{'':30}{'CPU-s/step':>11}{'to TRL':>9}{'to TRL pre.':>12}{'peak MiB':>10}{'to TRL':>9}{'losses':>22}")
    plain_s, kept_s = (median(results[name]["seconds"]) for name in (TRL, PRECOMPUTED))
    for name, result in results.items():
        seconds, peak = median(result["seconds"]), result["peak_bytes"]
        ratios = f"{seconds / plain_s:9.3f}{seconds / kept_s:12.3f}"
        losses = f"{result['losses'][0]:.6f} .. {result['losses'][-1]:.5f}"
        relative = peak / results[TRL]["peak_bytes"]
        print(f"{name:30}{seconds:11.3f}{ratios}{peak / 2**20:10,.0f}{relative:9.3f}{losses:>22}")


if __name__ == "__main__":
    main()
