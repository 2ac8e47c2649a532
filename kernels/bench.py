"""Loss heads beside plain torch: time in interleaved rounds of one process, peak memory in a process per provider.

    python -m mixwright.kernels.bench [--rounds 12] [--shapes 2048,256,8192 4096,512,32768] [--only ours] [--out FOLDER]

Every provider computes the losses of N tokens and all gradients; "late" ones get row weights that depend on those
losses (softmax over the mean losses of 16 sequences), "mean" ones the token mean. The yardstick is three bare matmuls.
Writes kernels.json and .png. Use minima on a shared machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixwright.kernels.linear_loss import linear_loss
from mixwright.kernels.linear_nll import linear_nll

NUM_SEQUENCES = 16
Shape = tuple[int, int, int]
Provider = Callable[[Tensor, Tensor, Tensor], None]


def late_weights(nll_N: Tensor) -> Tensor:
    """Row weights that no forward could know: softmax of the sequences' mean losses, spread over their tokens."""
    nll_ST = nll_N.detach().reshape(NUM_SEQUENCES, -1)
    weight_S = torch.softmax(nll_ST.mean(1) / 0.4, 0) / nll_ST.shape[1]
    return weight_S.repeat_interleave(nll_ST.shape[1])


def three_matmuls(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    """The floor: the matmuls that any exact head has to do."""
    with torch.no_grad():
        logits_NV = hidden_ND @ weight_VD.T
        hidden_ND.grad = logits_NV @ weight_VD
        weight_VD.grad = logits_NV.T @ hidden_ND


def materialised_late(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    """F.cross_entropy(F.linear) without reduction."""
    nll_N = F.cross_entropy(F.linear(hidden_ND, weight_VD), targets_N, reduction="none")
    torch.autograd.backward((nll_N * late_weights(nll_N)).sum())


def materialised_mean(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    """F.cross_entropy(F.linear) with its mean."""
    torch.autograd.backward(F.cross_entropy(F.linear(hidden_ND, weight_VD), targets_N))


def torch_fused_late(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    """torch's own chunked head, without reduction."""
    options = torch.nn.LinearCrossEntropyOptions()
    nll_N = F.linear_cross_entropy(hidden_ND, weight_VD, targets_N, reduction="none", options=options)
    torch.autograd.backward((nll_N * late_weights(nll_N)).sum())


def torch_fused_mean(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    """torch's own chunked head with its mean."""
    torch.autograd.backward(
        F.linear_cross_entropy(hidden_ND, weight_VD, targets_N, options=torch.nn.LinearCrossEntropyOptions())
    )


def cached_late(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    """linear_nll, engine A."""
    nll_N = linear_nll(hidden_ND, weight_VD, targets_N, engine="cached").nll_N
    torch.autograd.backward((nll_N * late_weights(nll_N)).sum())


def recompute_late(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    """linear_nll, engine R."""
    nll_N = linear_nll(hidden_ND, weight_VD, targets_N, engine="recompute").nll_N
    torch.autograd.backward((nll_N * late_weights(nll_N)).sum())


def stream_mean(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    """linear_loss, engine S."""
    row_weight_N = torch.full(targets_N.shape, 1 / targets_N.numel(), device=targets_N.device)
    torch.autograd.backward(linear_loss(hidden_ND, weight_VD, targets_N, row_weight_N).loss_sum)


def liger_late(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    """Liger's fused head without reduction, where it is installed."""
    functional = importlib.import_module("liger_kernel.transformers.functional")
    nll_N = functional.liger_fused_linear_cross_entropy(hidden_ND, weight_VD, targets_N, reduction="none")
    torch.autograd.backward((nll_N * late_weights(nll_N)).sum())


def cut_cross_entropy_late(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    """Cut cross-entropy without reduction, where it is installed."""
    package = importlib.import_module("cut_cross_entropy")
    nll_N = package.linear_cross_entropy(hidden_ND, weight_VD, targets_N, reduction="none")
    torch.autograd.backward((nll_N * late_weights(nll_N)).sum())


def providers(device: str) -> dict[str, Provider]:
    """All that can run here, by the name in the table."""
    table: dict[str, Provider] = {
        "three matmuls": three_matmuls,
        "ours A, late": cached_late,
        "ours R, late": recompute_late,
        "F.cross_entropy, late": materialised_late,
        "ours S, mean": stream_mean,
        "F.cross_entropy, mean": materialised_mean,
    }
    if hasattr(F, "linear_cross_entropy"):
        table |= {"F.linear_cross_entropy, late": torch_fused_late, "F.linear_cross_entropy, mean": torch_fused_mean}
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        table["Liger, late"] = liger_late
    if device == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        table["cut cross-entropy, late"] = cut_cross_entropy_late
    return table


def inputs(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and head of ordinary scale (logits of about unit variance), with gradients on."""
    num_tokens, hidden_size, vocabulary = shape
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden_ND = torch.randn(num_tokens, hidden_size, generator=generator).to(device, dtype)
    weight_VD = (torch.randn(vocabulary, hidden_size, generator=generator) * hidden_size**-0.5).to(device, dtype)
    targets_N = torch.randint(0, vocabulary, (num_tokens,), generator=generator).to(device)
    return hidden_ND.requires_grad_(), weight_VD.requires_grad_(), targets_N


def run_once(provider: Provider, arguments: tuple[Tensor, Tensor, Tensor]) -> float:
    """Seconds of one forward and backward with gradients that start from None."""
    arguments[0].grad = arguments[1].grad = None
    start = time.perf_counter()
    provider(*arguments)
    if arguments[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


YARDSTICKS = ("three matmuls", "F.cross_entropy, late")


def time_shape(shape: Shape, device: str, rounds: int, only: str) -> dict[str, list[float]]:
    """Seconds per round of the providers, in turn within each round; the first round warms up and is dropped.

    `only`: part of the names of those to measure beside the yardsticks.
    """
    table = {name: run for name, run in providers(device).items() if name in YARDSTICKS or only in name}
    return interleaved(table, inputs(shape, device), rounds)


def interleaved(
    table: dict[str, Provider], arguments: tuple[Tensor, Tensor, Tensor], rounds: int
) -> dict[str, list[float]]:
    """Seconds per round of the providers, in turn within each round; the first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for round_index in range(rounds + 1):
        for name, provider in table.items():
            elapsed_s = run_once(provider, arguments)
            if round_index:
                seconds[name].append(elapsed_s)
    return seconds


def peak_bytes(name: str, shape: Shape, device: str) -> int:
    """Peak memory of one run beyond inputs and the matmul library's own buffers, gradients included."""
    arguments, provider = inputs(shape, device), providers(device)[name]
    run_once(three_matmuls, arguments)  # the library keeps its packing buffers
    run_once(provider, inputs((64, 16, 128), device))
    return peak_bytes_of(provider, arguments)


def peak_bytes_of(provider: Provider, arguments: tuple[Tensor, Tensor, Tensor]) -> int:
    """Peak memory of one run beyond what is there now: CUDA's own count, or resident pages on Linux."""
    arguments[0].grad = arguments[1].grad = None
    if arguments[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(provider, arguments)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    before = resident_kib("VmRSS")
    run_once(provider, arguments)
    return (resident_kib("VmHWM") - before) << 10


def resident_kib(key: str) -> int:
    """A figure of this process by its name in /proc, in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def measure_peak(name: str, shape: Shape, device: str) -> int | None:
    """`peak_bytes` in a process of its own; None where the platform cannot tell."""
    call = [sys.executable, "-m", __spec__.name, "--peak-of", name, "--shapes", ",".join(map(str, shape))]
    done = subprocess.run([*call, "--device", device], capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else None


def table_rows(seconds: dict[str, list[float]], peaks: dict[str, int | None]) -> list[dict[str, Any]]:
    """One row per provider; ratios are of minima."""
    floor_s, plain_s = (min(seconds[name]) for name in YARDSTICKS)
    return [
        {
            "provider": name,
            "min_ms": min(times) * 1e3,
            "median_ms": statistics.median(times) * 1e3,
            "to_three_matmuls": min(times) / floor_s,
            "to_cross_entropy": min(times) / plain_s,
            "peak_mib": peak / 2**20 if (peak := peaks[name]) is not None else None,
        }
        for name, times in seconds.items()
    ]


def print_table(shape: Shape, rows: list[dict[str, Any]]) -> None:
    """The table as text."""
    print(f"\nN={shape[0]} D={shape[1]} V={shape[2]}")
    print(f"{'provider':32}{'min ms':>9}{'median':>9}{'/3 mm':>8}{'/plain':>8}{'peak MiB':>10}")
    for row in rows:
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        ratios = f"{row['to_three_matmuls']:8.3f}{row['to_cross_entropy']:8.3f}"
        print(f"{row['provider']:32}{row['min_ms']:9.1f}{row['median_ms']:9.1f}{ratios}{peak:>10}")


def write_files(folder: Path, report: dict[str, Any]) -> None:
    """kernels.json and a bar chart of the ratios beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(json.dumps(report, indent=1))
    figure, axes = pyplot.subplots(1, len(report["shapes"]), figsize=(6 * len(report["shapes"]), 4), squeeze=False)
    for axis, entry in zip(axes[0], report["shapes"], strict=True):
        axis.barh([row["provider"] for row in entry["rows"]], [row["to_three_matmuls"] for row in entry["rows"]])
        axis.invert_yaxis()
        axis.set(title="N={} D={} V={}".format(*entry["shape"]), xlabel="time / three bare matmuls")
    figure.tight_layout()
    figure.savefig(folder / "kernels.png", dpi=120)


def parse_arguments() -> argparse.Namespace:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", help="N,D,V; default: shapes that suit the device")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--only", default="", help="part of the names of the providers to measure, such as 'ours'")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    options = parse_arguments()
    on_gpu = ["8192,4096,128256", "16384,2048,151936", "32768,1024,50304"]
    texts = options.shapes or (on_gpu if options.device == "cuda" else ["2048,256,8192", "4096,512,32768"])
    shapes: list[Shape] = [(int(n), int(d), int(v)) for n, d, v in (text.split(",") for text in texts)]
    if options.peak_of:
        print(peak_bytes(options.peak_of, shapes[0], options.device))
        return
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"torch {torch.__version__}, {hardware}, {torch.get_num_threads()} threads, minima of {options.rounds} rounds"
    )
    report: dict[str, Any] = {"torch": torch.__version__, "device": hardware, "shapes": []}
    for shape in shapes:
        seconds = time_shape(shape, options.device, options.rounds, options.only)
        rows = table_rows(seconds, {name: measure_peak(name, shape, options.device) for name in seconds})
        print_table(shape, rows)
        report["shapes"].append({"shape": shape, "rows": rows})
    write_files(options.out, report)
    print(f"\nwritten: {options.out}/kernels.json and .png")


if __name__ == "__main__":
    main()
