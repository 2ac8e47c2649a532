"""The DeepSpeed engine behind a small face: forward, backward, step, save, load.

The only file that imports deepspeed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import math
import os
import pickle  # nosec B403  # the name of an error
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

# DeepSpeed reads the accelerator choice and its log level while it is being imported.
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from mixwright.data_mixing.answers import one_line
from mixwright.pretrain.config import OptimizerConfig, PretrainConfig
from mixwright.pretrain.errors import NonFiniteLoss, RanksApart, TrainingError
from mixwright.pretrain.model_options.apply import follow_updates
from mixwright.pretrain.model_options.config import ModelOptions
from mixwright.pretrain.ranks import Ranks

_FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_CHECKPOINT_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
"""Classes whose instances DeepSpeed itself puts into checkpoints."""

logger = logging.getLogger(__name__)


LOST_AFTER_S = 600.0
"""How long a rank waits in a collective for one that may have died unseen."""
PATIENCE_S = 24 * 3600.0
"""How long the ranks wait for what the leader does alone: preparing data, a decision, converting, exporting."""


def start_ranks(say: Callable[[str], None], timeout_s: float = LOST_AFTER_S) -> Ranks:
    """Join the process group that the launcher (deepspeed, torchrun or plain python) describes.

    Raises TrainingError when the port is taken, RanksApart when the other ranks are not to be reached.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    world = int(os.environ["WORLD_SIZE"])
    if get_accelerator().device_name() == "cpu":
        _provide_shared_memory_op(world, say)
    device = own_device(int(os.environ["LOCAL_RANK"]))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=timeout_s))
    except dist.DistError as error:
        raise _not_joined(str(error)) from None
    if world == 1:
        return Ranks(0, 1, device, None)
    control, patient = (
        dist.new_group(backend="gloo", timeout=timedelta(seconds=limit_s)) for limit_s in (timeout_s, PATIENCE_S)
    )
    return Ranks(dist.get_rank(), world, device, control, patient)


def _not_joined(message: str) -> TrainingError:
    port = os.environ["MASTER_PORT"]
    if "EADDRINUSE" not in message:
        return RanksApart(
            f"rank {os.environ['RANK']} cannot join the others at {os.environ['MASTER_ADDR']}:{port}: {message}"
        )
    return TrainingError(
        f"MASTER_PORT: port {port} is taken on this machine, by another job perhaps: give this one a port of its own, "
        f"as in `deepspeed --master_port {int(port) + 1} ...`"
    )


def own_device(local_rank: int) -> torch.device:
    """This rank's device among those of its node, from now on the current one.

    DeepSpeed chooses it no sooner than with its engine; until then all ranks of a node would be on its first GPU.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    return torch.device(accelerator.current_device_name())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _provide_shared_memory_op(world: int, say: Callable[[str], None]) -> None:
    """Compile DeepSpeed's CPU all-reduce once, under a lock, or tell DeepSpeed to do without it.

    A kill during an earlier compilation leaves torch's lock file behind, on which every later start would wait
    for ever; our own lock (released by the kernel when its holder dies) shows that nobody compiles now.
    """
    name = "deepspeed_shm_comm"
    # ninja is installed beside the interpreter, which is not on PATH when a virtual environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++"]
    if world == 1 or not any(map(shutil.which, compilers)) or shutil.which("ninja") is None:
        deepspeed.ops.__compatible_ops__[name] = False
        if world > 1:
            say("no C++ compiler or ninja: DeepSpeed's shared-memory all-reduce is not built, gloo is used instead")
        return
    from torch.utils.cpp_extension import _get_build_directory

    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    folder = Path(_get_build_directory(name, verbose=False))
    built = (folder / f"{name}.so").exists()
    with _exclusive(folder.with_suffix(".mixwright.lock")):
        (folder / "lock").unlink(missing_ok=True)
        if not built and int(os.environ["LOCAL_RANK"]) == 0:
            say(f"compiling DeepSpeed's shared-memory all-reduce (once, about 30 s; kept in {folder})")
        started = time.monotonic()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
        except Exception as error:  # whatever the tool chain raises, training works without the op
            deepspeed.ops.__compatible_ops__[name] = False
            say(f"DeepSpeed's shared-memory all-reduce does not build, gloo is used instead: {str(error)[:200]}")
        logger.info("shared-memory all-reduce ready after %.1f s", time.monotonic() - started)


def extensions_folder() -> Path:
    """Where this environment keeps compiled ops; two that share a folder, as is torch's default, rebuild in turn."""
    from torch.utils.cpp_extension import get_default_build_root

    environment = hashlib.sha256(f"{sys.prefix} {sys.version} {torch.__version__}".encode()).hexdigest()[:12]
    return Path(get_default_build_root()) / f"mixwright-{environment}"


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class EngineSettings:
    """What a stage tells the engine: `per_step` samples of any kind, of all ranks, `per_micro_batch` of one rank.

    `samples` and `micro_batch` are the names of these two settings in the stage's configuration, for errors.
    """

    optimizer: OptimizerConfig
    dtype: str
    zero_stage: int
    clip_norm: float
    per_step: int
    per_micro_batch: int
    deepspeed: Mapping[str, Any]
    options: ModelOptions
    samples: str = "training.rows_per_step"
    micro_batch: str = "training.micro_batch_rows"

    @property
    def is_plain(self) -> bool:
        """Whether DeepSpeed neither shards nor mixes precisions."""
        return self.zero_stage == 0 and self.dtype == "float32"


def pretrain_settings(config: PretrainConfig) -> EngineSettings:
    """The engine's part of a pretraining run's configuration."""
    return EngineSettings(
        optimizer=config.optimizer,
        dtype=config.model.dtype,
        zero_stage=config.training.zero_stage,
        clip_norm=config.training.clip_norm,
        per_step=config.training.rows_per_step,
        per_micro_batch=config.training.micro_batch_rows,
        deepspeed=config.deepspeed,
        options=config.options,
    )


class Engine:
    """A model under DeepSpeed. Gradients are averaged over ranks and never divided by accumulation steps."""

    def __init__(self, settings: EngineSettings, model: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        # Plain DeepSpeed (ZeRO 0, float32) clips without telling the norm, so there we clip ourselves.
        self._clip_norm = settings.clip_norm if settings.is_plain else None
        optimizer = torch.optim.AdamW(
            decayed_groups(model, settings.optimizer.weight_decay),
            lr=settings.optimizer.lr,
            betas=settings.optimizer.betas,
            eps=settings.optimizer.eps,
            fused=True,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_settings(settings, ranks.size), dist_init_required=False
        )
        follow_updates(
            settings.options, optimizer, model, self._sum_of_parts if _zero_stage(settings) else lambda sums: sums
        )

    def _sum_of_parts(self, sums: Tensor) -> Tensor:
        """Sums over this rank's part of the optimizer's values, wherever they are kept, over all ranks."""
        return self.ranks.sum(sums.to(self.ranks.device)).to(sums.device)

    @property
    def module(self) -> Any:
        return self._engine.module

    def forward(self, *inputs: Any) -> Any:
        """What the model makes of one micro-batch: tensors in tuples, lists or dicts.

        Raises TypeError for another container: DeepSpeed would not find the tensors in it, so it would not see that a
        backward pass begins, and BF16_Optimizer would add earlier micro-batches of a step once more.
        """
        found = self._engine(*inputs)
        if not isinstance(found, Tensor | tuple | list | dict):
            raise TypeError(f"the model returns {type(found).__name__}, expected tensors in a tuple, list or dict")
        return found

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    @property
    def ends_step(self) -> bool:
        """Whether the micro-batch under way is the last one of its optimizer step."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    def step(self, lr: float, divisor: float = 1.0) -> float | None:
        """End one micro-batch; the last one of a step updates with `lr` and returns the norm of the gradient.

        Gradients are divided by `divisor` before they are clipped; the norm is the one after the division.
        Raises NonFiniteLoss when that norm is NaN or infinite.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        with self._divided(divisor):
            return self._update()

    def _update(self) -> float:
        if self._clip_norm is not None:
            norm = _finite(nn.utils.clip_grad_norm_(self.module.parameters(), self._clip_norm or math.inf))
            self._engine.step()
            return norm
        self._engine.step()
        return _finite(self._engine.get_global_grad_norm())

    @contextlib.contextmanager
    def _divided(self, divisor: float) -> Iterator[None]:
        """Divide the step's gradients where DeepSpeed keeps them.

        ZeRO divides them by its loss scale right before it clips, which is 1 outside float16.
        """
        optimizer = self._engine.optimizer
        if divisor == 1.0:
            yield
        elif hasattr(optimizer, "fp32_groups_gradients_flat"):  # BF16_Optimizer: no loss scale
            for gradient in optimizer.fp32_groups_gradients_flat:
                gradient.div_(divisor)
            yield
        elif self._engine.zero_optimization_stage() > 0:
            optimizer.loss_scaler.cur_scale = divisor
            try:
                yield
            finally:
                optimizer.loss_scaler.cur_scale = 1.0
        else:
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(divisor)
            yield

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def save(self, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        """Write a DeepSpeed checkpoint; every rank must call it."""
        self._engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)

    def load(self, folder: Path, tag: str, *, universal: bool) -> dict[str, Any]:
        """Read a checkpoint written by `save` (or its universal form); returns the client state."""
        self._engine._config.load_universal_checkpoint = universal
        try:
            with _plain_tensors_only():
                path, client_state = self._engine.load_checkpoint(str(folder), tag=tag)
        except pickle.UnpicklingError as error:
            raise TrainingError(
                f"{folder / tag}: holds more than tensors and plain values, and is not loaded: {one_line(error)}"
            ) from None
        if path is None:
            raise TrainingError(f"{folder / tag}: DeepSpeed cannot load this checkpoint")
        return dict(client_state)

    def full_parameters(self) -> dict[str, Tensor]:
        """All parameters in full on the leader (CPU, float32 or the model's dtype), empty elsewhere. Collective."""
        parameters = dict(self.module.named_parameters())
        if self._engine.zero_optimization_stage() < 3:
            return {name: p.detach().cpu() for name, p in parameters.items()} if self.ranks.is_leader else {}
        full: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.ranks.is_leader:
                    full[name] = parameter.detach().cpu().clone()
        return full


@contextlib.contextmanager
def _plain_tensors_only() -> Iterator[None]:
    """While this lasts, torch.load takes tensors, plain values and DeepSpeed's own few classes, whoever calls it.

    DeepSpeed calls it with weights_only=False, which would run whatever code a checkpoint names.
    """
    before = os.environ.get(_FORCE_WEIGHTS_ONLY)
    os.environ[_FORCE_WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(_CHECKPOINT_CLASSES):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE_WEIGHTS_ONLY]
        else:
            os.environ[_FORCE_WEIGHTS_ONLY] = before


def convert_to_universal(source: Path, target: Path) -> None:
    """Convert sharded optimizer states to one file per parameter, readable on any number of ranks."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    # Each worker imports DeepSpeed anew, which costs more than it saves unless there are many cores.
    workers = str(max((os.cpu_count() or 1) // 4, 1))
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    # A process of its own: the converter prints at length and expects to start worker processes.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrainingError(f"{source}: DeepSpeed cannot convert this checkpoint to its universal format: {last}")


def decayed_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices with decay; norms, biases and other vectors without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # adapters have no vectors, and ZeRO no empty groups


def accumulation_steps(settings: EngineSettings, world: int) -> int:
    """Micro-batches per rank and step; raises TrainingError when the global batch cannot be cut evenly."""
    whole, micro = settings.per_step, settings.per_micro_batch
    if whole % (world * micro):
        fitting = [m for m in range(1, whole // world + 1) if whole % (world * m) == 0]
        short = settings.micro_batch.rpartition(".")[2]
        hint = f"fitting {short}: {', '.join(map(str, fitting))}" if fitting else f"no {short} fits {world} ranks"
        raise TrainingError(
            f"{settings.samples} = {whole} is not a multiple of {world} ranks x {settings.micro_batch} = {micro}; "
            f"{hint}"
        )
    return whole // (world * micro)


def _bfloat16_settings(settings: EngineSettings) -> dict[str, Any]:
    """Mixed precision: float32 master parameters, and gradients that accumulate in float32 up to ZeRO 1."""
    if settings.dtype != "bfloat16":
        return {}
    accumulation = {"data_types": {"grad_accum_dtype": "fp32"}} if settings.zero_stage < 2 else {}
    return {"bf16": {"enabled": True}, **accumulation}


def _zero_stage(settings: EngineSettings) -> int:
    """The stage DeepSpeed is given: bfloat16 without ZeRO becomes ZeRO 1, the same arithmetic with a sharded optimizer.

    At stage 0 DeepSpeed 0.19.8 takes its float16 optimizer for bfloat16, and that one goes wrong from the second step
    (gradient norm 1.29 instead of 2.56 in the setting of tests/pretrain/test_engine.py).
    """
    stage = settings.zero_stage
    return 1 if stage == 0 and settings.dtype == "bfloat16" else stage


def _finite(norm: Tensor | float) -> float:
    value = float(norm)
    if not math.isfinite(value):
        raise NonFiniteLoss(f"the gradient norm is {value}")
    return value


def deepspeed_settings(settings: EngineSettings, world: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: ours first, then the user's `deepspeed:` section on top."""
    ours: dict[str, Any] = {
        "train_batch_size": settings.per_step,
        "train_micro_batch_size_per_gpu": settings.per_micro_batch,
        "gradient_accumulation_steps": accumulation_steps(settings, world),
        "gradient_clipping": 0.0 if settings.is_plain else settings.clip_norm,
        "steps_per_print": 1 << 62,
        **_bfloat16_settings(settings),
        # The optimizer is torch's fused AdamW, which DeepSpeed's ZeRO does not know by name.
        "zero_allow_untested_optimizer": True,
    }
    zero = {**settings.deepspeed.get("zero_optimization", {}), "stage": _zero_stage(settings)}
    return {**ours, **settings.deepspeed, "zero_optimization": zero}
