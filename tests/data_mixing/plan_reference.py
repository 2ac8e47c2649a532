"""The plan once more, slowly: plain Python integers and fractions, one row at a time, no closed form, no NumPy.

Written from the definitions in docs/plan_and_journal.md, not from the code. It keeps the whole state and walks every
step; caps are found by drawing a step on trial. `python -m tests.data_mixing.plan_reference` writes the golden vectors.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent.parent / "golden" / "plan_v1.json"
WORD = 1 << 64
TOTAL = 1 << 31


def splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) % WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def mix_key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = splitmix64(key ^ (part % WORD))
    return key


def permute(index: int, size: int, key: int) -> int:
    bits = (size - 1).bit_length()
    low_bits = bits // 2
    while True:
        high, low = divmod(index, 1 << low_bits)
        for turn in range(24 if bits <= 5 else 8):
            round_key = (key + turn * 0x9E3779B97F4A7C15) % WORD
            if turn % 2 == 0:
                high ^= splitmix64(low ^ round_key) % (1 << (bits - low_bits))
            else:
                low ^= splitmix64(high ^ round_key) % (1 << low_bits)
        index = (high << low_bits) + low
        if index < size:
            return index


def domain_id(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16)


@dataclass
class Domain:
    name: str
    num_rows: int
    max_epochs: str | None = None
    on_exhaust: str = "renormalise"


@dataclass
class Commit:
    """`segments`: [(start step, {name: integer proportion})]; `caps`: {name: (max_epochs, on_exhaust)}."""

    effective_step: int
    segments: list[tuple[int, dict[str, int]]]
    caps: dict[str, tuple[str | None, str]] = field(default_factory=dict)


class Ended(Exception):
    pass


class ReferencePlan:
    """Walks a run from step 0: `next_step()` is the ordered batch, a list of (name, epoch, row)."""

    def __init__(self, seed: int, rows_per_step: int, domains: list[Domain], commits: list[Commit]) -> None:
        self.seed, self.rows_per_step, self.commits = seed, rows_per_step, commits
        self.domains = sorted(domains, key=lambda domain: domain_id(domain.name))
        self.num_leaves = 1
        while self.num_leaves < len(domains):
            self.num_leaves *= 2
        self.step = 0
        self.got = [0] * len(domains)
        self.credit = [Fraction(0)] * len(domains)
        self.spent = [False] * len(domains)
        self.mixture: list[int] = []
        self.node_rows: dict[tuple[int, int], list[int]] = {}
        self.commit: Commit | None = None

    def next_step(self) -> list[tuple[str, int, int]]:
        self._begin_step()
        while True:
            trial = copy.deepcopy((self.got, self.credit, self.node_rows))
            before = list(self.got)
            for _ in range(self.rows_per_step):
                self._draw()
            over = [i for i in range(len(self.domains)) if self.mixture[i] > 0 and self.got[i] > self._limit(i)]
            if not over:
                break
            self.got, self.credit, self.node_rows = trial
            if any(self._cap(i)[1] == "stop" for i in over):
                raise Ended
            for i in over:
                self.spent[i] = True
            self._set_mixture()
        batch = [self._row(position, before) for position in range(self.rows_per_step)]
        self.step += 1
        return batch

    def _begin_step(self) -> None:
        current = [commit for commit in self.commits if commit.effective_step <= self.step][-1]
        if current is not self.commit:
            self.commit, self.spent = current, [False] * len(self.domains)
        self._set_mixture()

    def _set_mixture(self) -> None:
        assert self.commit is not None
        _, wanted = [segment for segment in self.commit.segments if segment[0] <= self.step][-1]
        weights = [0 if self.spent[i] else wanted[d.name] for i, d in enumerate(self.domains)]
        total = sum(weights)
        if total == 0:
            raise Ended
        quotas = [Fraction(weight * TOTAL, total) for weight in weights]
        mixture = [int(quota) for quota in quotas]
        by_remainder = sorted(range(len(quotas)), key=lambda i: (mixture[i] - quotas[i], i))
        for i in by_remainder[: TOTAL - sum(mixture)]:
            mixture[i] += 1
        if mixture != self.mixture:
            self.mixture, self.node_rows = mixture, {}
            self.credit_at_change = list(self.credit)

    def _draw(self) -> None:
        """The next row goes down the tree: to the left half when that makes it due, else to the right one."""
        first, size = 0, self.num_leaves
        while size > 1:
            half = size // 2
            rows, left_rows = self.node_rows.setdefault((first, size), [0, 0])
            go_left = self._left_target(first, half, rows + 1) > left_rows
            self.node_rows[first, size] = [rows + 1, left_rows + go_left]
            first, size = (first if go_left else first + half), half
        self.got[first] += 1
        for i, share in enumerate(self.mixture):
            self.credit[i] += Fraction(share, TOTAL)
        self.credit[first] -= 1

    def _left_target(self, first: int, half: int, rows: int) -> int:
        def over(values: list[Any], start: int) -> Any:
            return sum(v for v, share in list(zip(values, self.mixture, strict=True))[start : start + half] if share)

        left, right = over(self.mixture, first), over(self.mixture, first + half)
        left_credit, right_credit = over(self.credit_at_change, first), over(self.credit_at_change, first + half)
        p = Fraction(left, left + right)
        c = left_credit - p * (left_credit + right_credit)
        return min(max((rows * p + c + Fraction(1, 2)).__floor__(), 0), rows)

    def _cap(self, i: int) -> tuple[str | None, str]:
        assert self.commit is not None
        domain = self.domains[i]
        return self.commit.caps.get(domain.name, (domain.max_epochs, domain.on_exhaust))

    def _limit(self, i: int) -> float | Fraction:
        max_epochs, action = self._cap(i)
        if max_epochs is None or action == "allow":
            return float("inf")
        return Fraction(max_epochs) * self.domains[i].num_rows

    def _row(self, position: int, before: list[int]) -> tuple[str, int, int]:
        slot = permute(position, self.rows_per_step, mix_key(1, self.seed, self.step))
        for i, domain in enumerate(self.domains):
            drawn = self.got[i] - before[i]
            if slot < drawn:
                epoch, place = divmod(before[i] + slot, domain.num_rows)
                key = mix_key(2, self.seed, domain_id(domain.name), epoch)
                return domain.name, epoch, permute(place, domain.num_rows, key)
            slot -= drawn
        raise AssertionError("a slot beyond the batch")


def batch_digest(step: int, batch: list[tuple[str, int, int]]) -> int:
    hashes = (
        splitmix64(mix_key_from(mix_key(3, step), position, domain_id(name), epoch, row))
        for position, (name, epoch, row) in enumerate(batch)
    )
    return sum(hashes) % WORD


def mix_key_from(key: int, *parts: int) -> int:
    for part in parts:
        key = splitmix64(key ^ part)
    return key


def chain_digest(previous: int, step_digest: int) -> int:
    return mix_key(4, previous, step_digest)


def state_digest(plan: ReferencePlan) -> str:
    """Fingerprint of the state before the step that comes next."""
    head = f"plan 1 seed {plan.seed} step {plan.step} domains {len(plan.domains)};"
    ids = [domain_id(domain.name) for domain in plan.domains]
    credits = [int(credit * TOTAL) for credit in plan.credit]
    words = b"".join(value.to_bytes(8, "little") for value in ids)
    words += b"".join(value.to_bytes(8, "little", signed=True) for value in [*plan.got, *credits])
    return hashlib.sha256(head.encode() + words).hexdigest()


def spread(weights: dict[str, int]) -> dict[str, int]:
    """Integers in proportion to `weights` with sum 2**31; the first takes what rounding leaves."""
    total = sum(weights.values())
    shares = {name: weight * TOTAL // total for name, weight in weights.items()}
    shares[next(iter(weights))] += TOTAL - sum(shares.values())
    return shares


def drawn_weights(names: list[str], salt: int, zeros_in_16: int) -> dict[str, int]:
    """Weights from 1 to 1,000 by a hash, the odd one zero; never all."""
    weights = {}
    for index, name in enumerate(names):
        word = mix_key(99, salt, index)
        weights[name] = 0 if index and (word >> 40) % 16 < zeros_in_16 else 1 + word % 1000
    return weights


def case_specs() -> list[dict[str, Any]]:
    """What the golden vectors cover: sizes about powers of two, policy changes, rests, programs, every kind of cap."""

    def names(n: int) -> list[str]:
        return [f"domain-{i}" for i in range(n)]

    def commits(n: int, steps: list[int], zeros: int) -> list[dict[str, Any]]:
        return [
            {"effective_step": step, "segments": [[0, spread(drawn_weights(names(n), step, zeros))]], "caps": {}}
            for step in steps
        ]

    def domains(sizes: list[int], caps: dict[int, tuple[str, str]] | None = None) -> list[list[Any]]:
        return [[name, size, *(caps or {}).get(i, (None, "renormalise"))]
                for i, (name, size) in enumerate(zip(names(len(sizes)), sizes, strict=True))]  # fmt: skip

    program = [[start, spread(drawn_weights(names(5), 70 + start, 3))] for start in (0, 4, 5, 9, 17)]
    overriding = commits(6, [0, 8, 14], 0)
    overriding[1]["caps"] = {"domain-0": ["1.5", "renormalise"], "domain-1": ["2", "allow"]}
    overriding[2]["caps"] = {"domain-0": ["4", "renormalise"], "domain-3": ["4.1", "stop"]}
    table = [
        ("one domain of one row", 0, 3, 3, domains([1]), commits(1, [0], 0)),
        ("tiny domains, many epochs", 7, 5, 12, domains([2, 3, 4, 5]), commits(4, [0, 6], 0)),
        ("twelve domains, ten changes, rests", 2**62 + 11, 32, 40,
         domains([31, 32, 33, 127, 128, 129, 97, 1009, 64, 65, 63, 256]), commits(12, list(range(0, 40, 4)), 4)),
        ("program of segments, clipped by a commit", 12345, 16, 24, domains([50, 60, 70, 80, 90]),
         [{"effective_step": 0, "segments": program, "caps": {}}, *commits(5, [14], 2)]),
        ("caps give their share away", 5, 24, 30,
         domains([20, 30, 40, 400, 500], {0: ("1.5", "renormalise"), 1: ("0.3", "renormalise"), 2: ("2", "allow")}),
         commits(5, [0, 11], 0)),
        ("caps overridden by policies, then a stop", 5, 24, 60, domains([20, 30, 40, 50, 60, 70]), overriding),
        ("every domain spent", 9, 10, 30, domains([12, 16], {0: ("1", "renormalise"), 1: ("2", "renormalise")}),
         commits(2, [0], 0)),
        ("forty domains", 3, 64, 20, domains([100 + 7 * i for i in range(40)]), commits(40, [0, 3, 10], 8)),
    ]  # fmt: skip
    keys = ("name", "seed", "rows_per_step", "num_steps", "domains", "commits")
    return [dict(zip(keys, row, strict=True)) for row in table]


def run_case(spec: dict[str, Any]) -> dict[str, Any]:
    """The vectors of one case: every step's digest and state, the first and the last batch in full."""
    commits = [
        Commit(c["effective_step"], [(start, mixture) for start, mixture in c["segments"]],
               {name: (cap[0], cap[1]) for name, cap in c["caps"].items()})
        for c in spec["commits"]
    ]  # fmt: skip
    plan = ReferencePlan(spec["seed"], spec["rows_per_step"], [Domain(*row) for row in spec["domains"]], commits)
    digests, states, batches, run_digest = [], [], [], 0
    for step in range(spec["num_steps"]):
        states.append(state_digest(plan))
        try:
            batches.append(plan.next_step())
        except Ended:
            break
        digests.append(batch_digest(step, batches[-1]))
        run_digest = chain_digest(run_digest, digests[-1])
    return {
        "stop_step": plan.step if plan.step < spec["num_steps"] else None,
        "step_digests": [f"{digest:016x}" for digest in digests],
        "state_digests": states,
        "run_digest": f"{run_digest:016x}",
        "first_batch": batches[0] if batches else None,
        "last_batch": batches[-1] if batches else None,
        "cursors": {domain.name: rows for domain, rows in zip(plan.domains, plan.got, strict=True)},
    }


def write_golden() -> None:
    cases = [{"spec": spec, "expected": run_case(spec)} for spec in case_specs()]
    GOLDEN.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    write_golden()
