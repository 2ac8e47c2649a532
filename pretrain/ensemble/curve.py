"""Loss of an ensemble by its number of members, over subsets of them, with standard errors paired over rows.

Every subset is scored on the same rows of the test split, at temperature 1 and at the temperature that is best for it
on rows of the validation split: members that overfit are too sure of themselves, and single models get the same chance
as ensembles. S subsets, R rows of T tokens, K members.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mixwright.data_mixing.answers import one_line
from mixwright.data_mixing.entries import Genesis
from mixwright.data_mixing.errors import nearest
from mixwright.data_mixing.held_out import HeldOut
from mixwright.data_mixing.manifest import Split
from mixwright.data_mixing.plain_data import read_json_object
from mixwright.data_mixing.staging import atomic_file
from mixwright.data_mixing.store import TokenStore
from mixwright.kernels.ensemble_kl import Pooling
from mixwright.pretrain.ensemble.member import Member, check_together
from mixwright.pretrain.ensemble.spool import SpooledMember, spool
from mixwright.pretrain.ensemble.temperature import Subset, fit_inverse_temperatures, subset_scores
from mixwright.pretrain.errors import EnsembleError
from mixwright.pretrain.head import LanguageModel

EVALUATION_ROWS = 64
MAX_SUBSETS = 64
"""Of one size that are scored; of more, so many are drawn."""


@dataclass(frozen=True)
class CurvePoint:
    """k members: mean loss of the subsets of that size in nats per token, and its standard error over rows.

    `gain` is what it is below the single members, `step` below k - 1 members, each with a standard error of the paired
    differences over rows. `temperature` is the mean of the subsets'.
    """

    k: int
    num_subsets: int
    loss: float
    error: float
    gain: float
    gain_error: float
    step: float
    step_error: float
    temperature: float


@dataclass(frozen=True)
class EnsembleEvaluation:
    """Losses of every subset on every row: `plain_SR` at temperature 1, `fitted_SR` at `temperature_S`.

    `domain_R` are indices into `domains`. `members` are names, `fingerprints` of their parameters.
    """

    members: tuple[str, ...]
    fingerprints: tuple[str, ...]
    num_parameters: int
    pooling: Pooling
    store_fingerprint: str
    tokens_per_row: int
    domains: tuple[str, ...]
    domain_R: NDArray[np.int64]
    subsets: tuple[Subset, ...]
    temperature_S: NDArray[np.float64]
    plain_SR: NDArray[np.float64]
    fitted_SR: NDArray[np.float64]

    def losses(self, *, fitted: bool) -> NDArray[np.float64]:
        """[S, R], at the fitted temperatures or at 1."""
        return self.fitted_SR if fitted else self.plain_SR

    def sizes(self, among: Sequence[int] | None = None) -> dict[int, list[int]]:
        """Numbers of the subsets by their size; only those of the members `among`."""
        allowed = set(range(len(self.members)) if among is None else among)
        sizes: dict[int, list[int]] = {}
        for number, subset in enumerate(self.subsets):
            if allowed.issuperset(subset):
                sizes.setdefault(len(subset), []).append(number)
        return dict(sorted(sizes.items()))

    def curve(self, *, fitted: bool, domain: str | None = None) -> list[CurvePoint]:
        """One point per size; of one domain's rows alone when it is named."""
        rows = slice(None) if domain is None else self.domain_R == self.domains.index(domain)
        losses_SR = self.losses(fitted=fitted)[:, rows]
        mean_kR = {k: losses_SR[numbers].mean(axis=0) for k, numbers in self.sizes().items()}
        points = []
        for k, mean_R in mean_kR.items():
            gain, gain_error = paired(mean_kR[1], mean_R)
            step, step_error = paired(mean_kR[k - 1], mean_R) if k - 1 in mean_kR else (math.nan, math.nan)
            numbers = self.sizes()[k]
            temperature = float(self.temperature_S[numbers].mean()) if fitted else 1.0
            points.append(
                CurvePoint(
                    k,
                    len(numbers),
                    float(mean_R.mean()),
                    _error(mean_R),
                    gain,
                    gain_error,
                    step,
                    step_error,
                    temperature,
                )
            )
        return points


def paired(before_R: NDArray[np.float64], after_R: NDArray[np.float64]) -> tuple[float, float]:
    """Mean of before - after over rows, and its standard error; positive is better."""
    difference_R = before_R - after_R
    return float(difference_R.mean()), _error(difference_R)


def evaluate_ensemble(
    members: Sequence[Member],
    store: TokenStore,
    *,
    folder: Path,
    pooling: Pooling = "logits",
    rows_per_domain: int = 256,
    calibration_rows_per_domain: int = 256,
    max_subsets: int = MAX_SUBSETS,
    domains: Sequence[str] = (),
    seed: int = 0,
) -> EnsembleEvaluation:
    """Score all subsets of members (at most `max_subsets` of a size) on held-out rows of `store`.

    `folder` keeps what members make of the rows, so that an interrupted evaluation goes on. Raises EnsembleError for
    members that do not go together, of another tokenizer than the store's, and domains without held-out rows.
    """
    check_together(members)
    genesis = _genesis(members[0], store, domains)
    calibration = _held_out(store, genesis, "validation", calibration_rows_per_domain)
    rows = _held_out(store, genesis, "test", rows_per_domain)
    subsets = choose_subsets(len(members), max_subsets, seed)
    inverse_S = fit_inverse_temperatures(
        spool(members, calibration.tokens_nS, folder), _labels(calibration), subsets, pooling
    )
    scored = spool(members, rows.tokens_nS, folder)
    plain_SR, fitted_SR = _losses(scored, rows, subsets, pooling, inverse_S)
    return EnsembleEvaluation(
        members=tuple(member.name for member in members),
        fingerprints=tuple(member.fingerprint for member in members),
        num_parameters=members[0].num_parameters,
        pooling=pooling,
        store_fingerprint=store.fingerprint,
        tokens_per_row=rows.tokens_nS.shape[1] - 1,
        domains=tuple(domain.name for domain in genesis.domains),
        domain_R=rows.domain_n,
        subsets=tuple(subsets),
        temperature_S=1 / inverse_S,
        plain_SR=plain_SR,
        fitted_SR=fitted_SR,
    )


def fit_temperature(
    members: Sequence[Member], store: TokenStore, *, pooling: Pooling, rows_per_domain: int, folder: Path
) -> float:
    """The temperature of all members together that is best on rows of the validation split."""
    check_together(members)
    rows = _held_out(store, _genesis(members[0], store, ()), "validation", rows_per_domain)
    everyone = [tuple(range(len(members)))]
    inverse_S = fit_inverse_temperatures(spool(members, rows.tokens_nS, folder), _labels(rows), everyone, pooling)
    return float(1 / inverse_S[0])


def validation_loss(like: Member, store: TokenStore, rows_per_domain: int) -> Callable[[LanguageModel], float]:
    """Loss of a model with the tokenizer of `like` on rows of the validation split, nats per token."""
    rows = _held_out(store, _genesis(like, store, ()), "validation", rows_per_domain)

    @torch.no_grad()
    def score(model: LanguageModel) -> float:
        parts = torch.split(torch.from_numpy(rows.tokens_nS), EVALUATION_ROWS)
        return float(torch.cat([model(tokens_BS).nll_N for tokens_BS in parts]).double().mean())

    return score


def choose_subsets(num_members: int, most: int, seed: int) -> list[Subset]:
    """All subsets by size, or, where a size has more than `most`, that many distinct ones drawn with `seed`."""
    subsets: list[Subset] = []
    generator = np.random.default_rng(seed)
    for k in range(1, num_members + 1):
        if math.comb(num_members, k) <= most:
            subsets += itertools.combinations(range(num_members), k)
            continue
        drawn: dict[Subset, None] = {}
        while len(drawn) < most:
            chosen = generator.permutation(num_members)[:k]
            drawn[tuple(sorted(int(member) for member in chosen))] = None
        subsets += drawn
    return subsets


def save_evaluation(evaluation: EnsembleEvaluation, folder: Path) -> Path:
    """evaluation.json and, with the losses of every row, evaluation.npz; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "evaluation.npz") as file:
        np.savez(
            file,
            domain_R=evaluation.domain_R,
            temperature_S=evaluation.temperature_S,
            plain_SR=evaluation.plain_SR,
            fitted_SR=evaluation.fitted_SR,
        )
    tree = {name: value for name, value in evaluation.__dict__.items() if not isinstance(value, np.ndarray)}
    curves = {
        name: [asdict(point) for point in evaluation.curve(fitted=fitted)]
        for name, fitted in (("temperature_1", False), ("temperature_fitted", True))
    }
    path = folder / "evaluation.json"
    with atomic_file(path) as file:
        # NaN is no JSON: what does not exist is null.
        text = json.dumps({**tree, "curves": curves}, indent=1)
        file.write(text.replace("NaN", "null").encode())
    return path


def load_evaluation(folder: Path) -> EnsembleEvaluation:
    """What `save_evaluation` wrote. Raises EnsembleError."""
    try:
        tree = read_json_object(folder / "evaluation.json", strict=True)
        with np.load(folder / "evaluation.npz") as arrays:
            values = {name: arrays[name] for name in arrays.files}
        del tree["curves"]
        for name in ("members", "fingerprints", "domains"):
            tree[name] = tuple(tree[name])
        subsets = tuple(tuple(subset) for subset in tree.pop("subsets"))
        return EnsembleEvaluation(**tree, **values, subsets=subsets)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EnsembleError(f"{folder}: no evaluation of an ensemble ({one_line(error)})") from None


def _genesis(member: Member, store: TokenStore, names: Sequence[str]) -> Genesis:
    """The domains to score, as held-out rows are read by."""
    manifest = store.manifest
    if member.tokenizer_hash != manifest.tokenizer_hash:
        raise EnsembleError(
            f"member {member.folder} was trained with another tokenizer than the one of {store.folder}: it cannot be "
            "scored on these rows"
        )
    catalogue = {domain.name: domain for domain in store.domains()}
    for name in names:
        if name not in catalogue:
            raise EnsembleError(f"{store.folder} has no domain {name!r}{nearest(name, catalogue)}")
    return Genesis(
        run="evaluation",
        seed=0,
        sequence_length=manifest.sequence_length,
        rows_per_step=1,
        num_steps=1,
        store_fingerprint=store.fingerprint,
        domains=tuple(catalogue[name] for name in names) or tuple(catalogue.values()),
    )


def _held_out(store: TokenStore, genesis: Genesis, split: Split, rows_per_domain: int) -> HeldOut:
    rows = HeldOut.read(store, genesis, split, rows_per_domain)
    if not len(rows.tokens_nS):
        names = ", ".join(domain.name for domain in genesis.domains)
        raise EnsembleError(f"{store.folder}: no rows in the {split} split of {names}")
    return rows


def _losses(
    spooled: Sequence[SpooledMember],
    rows: HeldOut,
    subsets: Sequence[Subset],
    pooling: Pooling,
    inverse_S: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean loss of each row, [S, R], at temperature 1 and at 1 / inverse_S."""
    labels_N = _labels(rows)
    plain_SN = np.empty((len(subsets), len(labels_N)))
    fitted_SN = np.empty_like(plain_SN)
    for number, span, scores_mV in subset_scores(spooled, len(labels_N), subsets, pooling):
        labels_m = labels_N[span]
        plain_SN[number, span] = torch.nn.functional.cross_entropy(scores_mV, labels_m, reduction="none").numpy()
        scores_mV.mul_(float(inverse_S[number]))
        fitted_SN[number, span] = torch.nn.functional.cross_entropy(scores_mV, labels_m, reduction="none").numpy()
    num_rows = len(rows.tokens_nS)
    plain_SR, fitted_SR = (nll_SN.reshape(len(subsets), num_rows, -1).mean(axis=2) for nll_SN in (plain_SN, fitted_SN))
    return plain_SR, fitted_SR


def _labels(rows: HeldOut) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows.tokens_nS[:, 1:])).reshape(-1)


def _error(values_R: NDArray[np.float64]) -> float:
    """Standard error of the mean over rows; NaN with one row."""
    return float(values_R.std(ddof=1) / math.sqrt(len(values_R))) if len(values_R) > 1 else math.nan
