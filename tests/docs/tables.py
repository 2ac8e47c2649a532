"""What a test does to commands of the docs beside running them as they stand. Each entry says why.

Entries are beginnings of commands in one line without comments (`Command.plain`); one that matches nothing any more
makes a test fail. A command that no entry names is run as it stands, and its exit code must be 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OTHER_MACHINES = "needs machines, or a cluster's address, that a test does not have"
ELSEWHERE = "takes minutes, and is run by a job of its own or by the file it names"
HOURS = "takes hours"

NOT_HERE: Mapping[str, str] = {
    "make ": ELSEWHERE,
    "mixwright doctor --folder /shared": OTHER_MACHINES,
    "deepspeed --hostfile": OTHER_MACHINES,
    "torchrun --nproc_per_node 2": "two ranks beside other tests crawl on two cores; tests/pretrain starts them",
    "sbatch ": OTHER_MACHINES,
    "kubectl ": OTHER_MACHINES,
    "mixwright submit": OTHER_MACHINES,
    "accelerate launch --use_deepspeed --num_processes 8": OTHER_MACHINES,
    "python launch/study.py": HOURS,
}
"""Commands that are not run, and why. They are still checked: syntax, sub-command, options, files, configurations."""

SMALL_STORE = (
    "sequence_length=64 tokenizer.train.vocab_size=512 tokenizer.train.max_bytes=200KB num_workers=1 "
    "domains.python.max_bytes=200KB domains.cpp.max_bytes=200KB domains.manual.max_bytes=150KB "
    "domains.readmes.max_bytes=150KB domains.licences.max_bytes=100KB domains.tables.max_bytes=100KB"
)
SMALL_RUN = (
    "model.config.hidden_size=32 model.config.intermediate_size=64 model.config.num_hidden_layers=1 "
    "model.config.num_attention_heads=2 model.config.num_key_value_heads=2 "
    "evaluation.rows_per_domain=2 evaluation.test_rows_per_domain=2 metrics.tensorboard=false"
)
SMALL_GRID = "recipe.epochs=0.2 tune.lr=[0.003] tune.weight_decay=[0.8] tune.epochs=[0.2] --workers 0"
FEW_STEPS = "training.num_steps=6 schedule.warmup_steps=2"

ADDED: Mapping[str, str] = {
    "mixwright data prepare configs/quickstart_corpora.yaml": SMALL_STORE,
    "deepspeed launch/pretrain.py --config configs/quickstart.yaml run.name=mine training.num_steps=2000": SMALL_RUN,
    "deepspeed launch/pretrain.py --config configs/quickstart.yaml run.name=trained": f"{SMALL_RUN} {FEW_STEPS}",
    "python launch/pretrain.py --config configs/quickstart.yaml run.name=trained": f"{SMALL_RUN} {FEW_STEPS}",
    "mixwright ensemble tune": SMALL_GRID,
    "mixwright ensemble train": f"{SMALL_GRID} --members 3",
    "mixwright ensemble eval": "--rows 8 --calibration-rows 8",
    "mixwright dashboard": "--port 0",
    "mixwright mix up --run runs/exp --metrics": "--metrics 0",
    "mixwright mix simulate configs/policies/{aioli": "--seeds 1",
    "mixwright mix hard-samples --run runs/exp --by lowest": "--first-step 0",
}
"""Arguments that are appended, so that minutes become seconds, fixed ports free ones, long runs short ones."""


SMALLER = (
    ("configs/ensemble/run.yaml", " rows_per_domain: 512", " rows_per_domain: 8"),
    ("configs/ensemble/run.yaml", "test_rows_per_domain: 1024", "test_rows_per_domain: 8"),
    ("configs/ensemble/run.yaml", "n_embd: 128", "n_embd: 32"),
    ("configs/ensemble/corpora.yaml", "max_bytes: 800_000", "max_bytes: 150_000"),
    ("configs/ensemble/distill.yaml", ", runs/ensemble/members/member-2, runs/ensemble/members/member-3]", "]"),
    ("configs/ensemble/distill.yaml", "num_rows: 2048", "num_rows: 32"),
    ("configs/ensemble/distill.yaml", "real_epochs: 4", "real_epochs: 0.1"),
    ("configs/rpo/example.yaml", "num_epochs: 1", "num_epochs: 0.3"),
    ("configs/rpo/example.yaml", "held_out_pairs: 200", "held_out_pairs: 16"),
    ("configs/rpo/example.yaml", "max_new_tokens: 48", "max_new_tokens: 8"),
)
"""What is changed in the copy of configs/ that pages work on: file, text, and what stands there instead."""


@dataclass(frozen=True)
class Until:
    """What a reader waits for before typing on: a run's service, and a step."""

    run_dir: str
    step: int


WAIT: Mapping[str, Until] = {
    "deepspeed launch/pretrain.py --config run.yaml > training.log": Until("runs/tutorial", 20),
}
"""After these commands a reader looks at the screen before typing on."""

UNTIL_THE_PAGE_ENDS: Mapping[str, Until] = {
    "deepspeed launch/pretrain.py --config configs/quickstart.yaml run.name=mine": Until("runs/mine", 10),
}
"""Foreground commands beside which the rest of the page is typed, in another terminal; ended with the page."""

INTERRUPTED: Mapping[str, str] = {
    "mixwright dashboard": "http://127.0.0.1",
    "mixwright mix status --watch": "step",
}
"""Commands that go on until Ctrl-C: what they must print before it. A dashboard is asked for its first page."""

EXIT_CODES: Mapping[str, int] = {}
"""Commands whose exit code is documented to be another than 0."""

ALONE = ("README.md", "docs/tutorial.md", "docs/ensembles.md", "docs/distillation.md")
"""Pages that begin in a folder of their own, without runs. All others share one with the runs they speak of."""
