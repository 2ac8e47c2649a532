"""What K teachers cost a student's head: time beside a plain head and plain torch, peak memory beyond the inputs.

    python -m mixwright.kernels.bench_distillation [--rounds 12] [--shapes 2048,256,8192] [--device cpu]

Every provider computes losses of N tokens and all gradients, in turn within each round of one process; peaks are of a
process each. `limit` is (K + 3) / 3 x 1.15 of the plain head. `top 64` has cached teachers; `plain torch` forms all
logits and takes F.kl_div.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mixwright.kernels.bench import Provider, Shape, inputs, interleaved, peak_bytes_of, run_once, three_matmuls
from mixwright.kernels.distillation import TopK, linear_distillation
from mixwright.kernels.ensemble_kl import Teacher
from mixwright.kernels.linear_nll import linear_nll

NUM_TEACHERS = (1, 2, 4, 8)
SHARE = 0.9
TOP = 64
SLACK = 1.15
PLAIN = "plain head (linear_nll)"


def teachers_of(shape: Shape, device: str, count: int) -> list[Teacher]:
    """Teachers of the student's size."""
    made = []
    for _ in range(count):
        hidden_ND, weight_VD, _ = inputs(shape, device)
        made.append(Teacher(hidden_ND.detach(), weight_VD.detach()))
    return made


def plain(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> None:
    """Cross-entropy alone."""
    torch.autograd.backward(linear_nll(hidden_ND, weight_VD, labels_N).nll_N.mean())


def ours(teachers: Sequence[Teacher] | TopK) -> Provider:
    """Cross-entropy and divergence from teachers."""

    def run(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> None:
        torch.autograd.backward(
            linear_distillation(hidden_ND, weight_VD, labels_N, teachers, share=SHARE).loss_N.mean()
        )

    return run


def materialised(teachers: Sequence[Teacher]) -> Provider:
    """The same with all logits in memory."""

    def run(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> None:
        with torch.no_grad():
            target_NV = torch.log_softmax(torch.stack([h @ w.T for h, w in teachers]).float().mean(0), 1)
        logits_NV = F.linear(hidden_ND, weight_VD).float()
        kl = F.kl_div(torch.log_softmax(logits_NV, 1), target_NV, reduction="batchmean", log_target=True)
        torch.autograd.backward((1 - SHARE) * F.cross_entropy(logits_NV, labels_N) + SHARE * kl)

    return run


def cached(shape: Shape, device: str) -> TopK:
    """What is kept of one teacher, as a cache on disk keeps it."""
    [teacher] = teachers_of(shape, device, 1)
    log_p_NV = torch.log_softmax((teacher.hidden_ND @ teacher.weight_VD.T).float(), 1)
    top = log_p_NV.topk(min(TOP, shape[2]), dim=1)
    return TopK(top.indices, top.values, log_p_NV.scatter(1, top.indices, -math.inf).logsumexp(1))


def make(name: str, shape: Shape, device: str) -> Provider:
    """The provider of a name, with its teachers."""
    if name == PLAIN:
        return plain
    if name == f"top {TOP}":
        return ours(cached(shape, device))
    kind, _, count = name.partition(", K = ")
    return (ours if kind == "ours" else materialised)(teachers_of(shape, device, int(count)))


def names() -> list[str]:
    """In the order of the table."""
    return [PLAIN, *(f"ours, K = {k}" for k in NUM_TEACHERS), f"top {TOP}", "plain torch, K = 1", "plain torch, K = 4"]


def limit_of(name: str) -> float | None:
    """What our head may cost at most, in plain heads."""
    kind, _, count = name.partition(", K = ")
    return (int(count) + 3) / 3 * SLACK if kind == "ours" else None


def measure(shape: Shape, device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of every provider by round."""
    return interleaved({name: make(name, shape, device) for name in names()}, inputs(shape, device), rounds)


def peak_bytes(name: str, shape: Shape, device: str) -> int:
    """Peak memory of one run beyond inputs, teachers' hidden states and heads, and the matmul library's buffers."""
    arguments, provider = inputs(shape, device), make(name, shape, device)
    run_once(three_matmuls, arguments)
    small = (64, 16, 128)
    run_once(make(name, small, device), inputs(small, device))
    return peak_bytes_of(provider, arguments)


def measure_peak(name: str, shape: Shape, device: str) -> float:
    """`peak_bytes` of a process of its own, in MiB; NaN where the platform cannot tell."""
    call = [sys.executable, "-m", __spec__.name, "--peak-of", name, "--shapes", ",".join(map(str, shape))]
    done = subprocess.run([*call, "--device", device], capture_output=True, text=True, check=False)
    return int(done.stdout) / 2**20 if done.returncode == 0 else math.nan


def print_table(shape: Shape, device: str, seconds: dict[str, list[float]]) -> None:
    """Medians, ratios of medians paired by round, peaks."""
    print(f"\nN={shape[0]} D={shape[1]} V={shape[2]}, {device}, {torch.get_num_threads()} thread(s)")
    print(f"{'provider':26}{'median ms':>11}{'to plain':>10}{'limit':>8}{'peak MiB':>10}")
    for name, times in seconds.items():
        ratio = statistics.median(own / base for own, base in zip(times, seconds[PLAIN], strict=True))
        limit = limit_of(name)
        peak = measure_peak(name, shape, device)
        shown = "" if limit is None else f"{limit:.2f}"
        print(f"{name:26}{1e3 * statistics.median(times):11.1f}{ratio:10.2f}{shown:>8}{peak:10.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--shapes", nargs="+", default=["2048,256,8192", "4096,512,32768"], help="N,D,V")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for text in arguments.shapes:
        num_tokens, hidden_size, vocabulary = map(int, text.split(","))
        shape = (num_tokens, hidden_size, vocabulary)
        if arguments.peak_of:
            print(peak_bytes(arguments.peak_of, shape, arguments.device))
            return
        print_table(shape, arguments.device, measure(shape, arguments.device, arguments.rounds))


if __name__ == "__main__":
    main()
