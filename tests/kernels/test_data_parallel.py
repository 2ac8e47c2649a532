"""The head under data parallelism on real gloo ranks: weights from all ranks' losses, unequal and empty shares, DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mixwright.kernels.linear_nll import linear_nll, linear_nll_reference
from mixwright.kernels.token_losses import palm_z_loss, segment_means, spread_over_tokens, weighted_sum
from tests.kernels.problems import assert_all_close, random_problem
from tests.ranks import run_ranks

WORLD, CLASSES, HIDDEN = 3, 50, 8
LENGTHS = [3, 9, 1, 5, 7, 2, 4, 6]  # tokens of the samples of one optimizer step
SHARES = {  # samples of each rank, in micro-batches
    "equal counts of samples": [[[0, 1, 2]], [[3, 4, 5]], [[6, 7]]],
    "unequal": [[[0]], [[1, 2, 3, 4, 5, 6]], [[7]]],
    "a rank without tokens": [[[0, 1, 2, 3]], [[]], [[4, 5, 6, 7]]],
    "one by eight": [[[0, 1, 2, 3, 4, 5, 6, 7]], [[]], [[]]],
    "eight by one": [[[0], [1], [2], [3], [4], [5], [6], [7]], [[]] * 8, [[]] * 8],
    "accumulated unequally": [[[0, 1], [2]], [[], [3, 4, 5]], [[6], [7]]],
}
ENGINES = ["cached", "recompute"]


def batch_of(samples: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden, targets (a fifth of them ignored) and the sample of each token, counted from 0 in this batch."""
    problem = random_problem(sum(LENGTHS), HIDDEN, CLASSES, ignored=0.2)
    sample_N = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    rows_n = torch.cat([torch.zeros(0, dtype=torch.int64), *((sample_N == s).nonzero()[:, 0] for s in samples)])
    segment_n = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([LENGTHS[s] for s in samples]).long())
    return problem.hidden_ND[rows_n], problem.targets_N[rows_n], segment_n


def whole_weight() -> Tensor:
    return random_problem(sum(LENGTHS), HIDDEN, CLASSES).weight_VD


def losses_of_all_ranks(own_S: Tensor) -> Tensor:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own_S)
    return torch.cat(everyone)


def reweighted_step(micro_batches: list[list[int]], engine: Any, gather: Any) -> list[Tensor]:
    """[sum of the loss, dweight] of this rank: softmax weights over the losses of all samples of the step."""
    weight_VD = whole_weight().requires_grad_()
    kept, means = [], []
    for samples in micro_batches:
        hidden_ND, targets_N, segment_N = batch_of(samples)
        losses = linear_nll(hidden_ND, weight_VD, targets_N, engine=engine)
        counted_N = targets_N != -100
        mean_S, count_S = segment_means(losses.nll_N.detach(), segment_N, len(samples), counted_N)
        kept.append((losses, segment_N, count_S, counted_N))
        means.append(mean_S)
    own_S = torch.cat(means)
    total = torch.logsumexp(gather(own_S) / 0.4, 0)
    loss_sum = torch.zeros((), dtype=torch.float64)
    for mean_S, (losses, segment_N, count_S, counted_N) in zip(means, kept, strict=True):
        weight_N = spread_over_tokens(torch.exp(mean_S / 0.4 - total), segment_N, count_S, counted_N)
        loss = weighted_sum(losses.nll_N, weight_N) + palm_z_loss(losses.lse_N, weight_N, alpha=1e-2)
        loss.backward()
        loss_sum += loss.detach()
    assert weight_VD.grad is not None
    return [loss_sum, weight_VD.grad]


def reference_step() -> list[Tensor]:
    """The same objective in one process, one batch, float64 logits."""
    hidden_ND, targets_N, segment_N = batch_of(list(range(len(LENGTHS))))
    weight_VD = whole_weight().requires_grad_()
    losses = linear_nll_reference(hidden_ND, weight_VD, targets_N)
    counted_N = targets_N != -100
    mean_S = torch.stack([losses.nll_N[(segment_N == s) & counted_N].mean() for s in range(len(LENGTHS))])
    weight_S = torch.softmax(mean_S.detach() / 0.4, 0)
    squared_S = torch.stack([losses.lse_N[(segment_N == s) & counted_N].square().mean() for s in range(len(LENGTHS))])
    loss = (weight_S * (mean_S + 1e-2 * squared_S)).sum()
    loss.backward()
    assert weight_VD.grad is not None
    return [loss.detach(), weight_VD.grad]


class TiedModel(nn.Module):
    """Embedding, one layer, and a head on the embedding's own weight."""

    def __init__(self, tied: bool, engine: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, HIDDEN, dtype=torch.float64)
        self.layer = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)
        self.head = self.embedding if tied else nn.Linear(HIDDEN, CLASSES, bias=False, dtype=torch.float64)
        self.engine = engine

    def forward(self, tokens_N: Tensor, targets_N: Tensor) -> Tensor:
        hidden_ND = torch.tanh(self.layer(self.embedding(tokens_N)))
        if self.engine is None:
            return linear_nll_reference(hidden_ND, self.head.weight, targets_N).nll_N
        return linear_nll(hidden_ND, self.head.weight, targets_N, engine=self.engine).nll_N


def tokens_of(rank: int, silent: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a rank; the one of rank 1 is empty or entirely ignored."""
    generator = torch.Generator().manual_seed(rank)
    num_tokens = 0 if rank == 1 and silent == "empty" else 4 + 3 * rank
    tokens_N, targets_N = torch.randint(0, CLASSES, (2, num_tokens), generator=generator)
    return tokens_N, torch.full_like(targets_N, -100) if rank == 1 else targets_N


def run_ddp(silent: str, tied: bool, engine: Any) -> list[Tensor]:
    """Gradients after one step under torch's DDP, which averages over ranks."""
    model = DistributedDataParallel(TiedModel(tied, engine))
    tokens_N, targets_N = tokens_of(dist.get_rank(), silent)
    model(tokens_N, targets_N).sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def ddp_reference(silent: str, tied: bool) -> list[Tensor]:
    model = TiedModel(tied, None)
    batches = [tokens_of(rank, silent) for rank in range(WORLD)]
    (model(*(torch.cat(parts) for parts in zip(*batches, strict=True))).sum() / WORLD).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


class Head(nn.Module):
    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole_weight())
        self.engine = engine

    def forward(self, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        return linear_nll(hidden_ND, self.weight, targets_N, engine=self.engine)[:2]


def run_fsdp(engine: Any) -> list[Tensor]:
    """The head module under FSDP2: its weight is whole only while the module runs."""
    head = fully_shard(Head(engine), mesh=init_device_mesh("cpu", (WORLD,)), reshard_after_forward=True)
    hidden_ND, targets_N, _ = batch_of([dist.get_rank()])
    hidden_ND.requires_grad_()
    nll_N, lse_N = head(hidden_ND, targets_N)
    (nll_N.sum() + 0.1 * lse_N.sum()).backward()
    return [hidden_ND.grad, head.weight.grad.full_tensor()]


def fsdp_reference() -> list[Tensor]:
    hidden_ND, targets_N, segment_N = batch_of(list(range(WORLD)))
    leaves = hidden_ND.requires_grad_(), whole_weight().requires_grad_()
    losses = linear_nll_reference(*leaves, targets_N)
    dhidden_ND, dweight_VD = torch.autograd.grad(losses.nll_N.sum() + 0.1 * losses.lse_N.sum(), leaves)
    return [*(dhidden_ND[segment_N == rank] for rank in range(WORLD)), dweight_VD / WORLD]


DDP_CASES = [(silent, tied, engine) for silent in ("ignored", "empty") for tied in (False, True) for engine in ENGINES]


def run_all() -> dict[Any, list[Tensor]]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[Any, list[Tensor]] = {}
    for name, shares in SHARES.items():
        for engine in ENGINES:
            found = reweighted_step(shares[dist.get_rank()], engine, losses_of_all_ranks)
            for tensor in found:
                dist.all_reduce(tensor)
            results[name, engine] = found
    for case in DDP_CASES:
        results[case] = run_ddp(*case)
    for engine in ENGINES:
        results["fsdp", engine] = run_fsdp(engine)
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, list[Tensor]]]:
    return run_ranks(run_all, WORLD)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SHARES)
def test_weights_from_all_ranks_losses_equal_one_process_with_the_whole_batch(
    ranks: list[dict[Any, list[Tensor]]], name: str, engine: str
) -> None:
    for rank in ranks:
        assert_all_close(rank[name, engine], reference_step(), 1e-12)


@pytest.mark.parametrize(("silent", "tied", "engine"), DDP_CASES)
def test_ddp_does_not_wait_for_a_rank_without_targets_and_averages_the_right_gradients(
    ranks: list[dict[Any, list[Tensor]]], silent: str, tied: bool, engine: str
) -> None:
    for rank in ranks:
        assert_all_close(rank[silent, tied, engine], ddp_reference(silent, tied), 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_head_works_as_a_module_of_fsdp(ranks: list[dict[Any, list[Tensor]]], engine: str) -> None:
    *dhidden, dweight_VD = fsdp_reference()
    for rank, dhidden_ND in zip(ranks, dhidden, strict=True):
        assert_all_close(rank["fsdp", engine], [dhidden_ND, dweight_VD], 1e-12)
