"""Runs to test plans and journals on: catalogues, policies, commits."""

import numpy as np

from mixwright.data_mixing.apportion import integer_proportions
from mixwright.data_mixing.domain import Cap, Domain
from mixwright.data_mixing.entries import Genesis, PolicyEntry, Segment
from mixwright.data_mixing.plan import CommittedPolicy, Plan, RowRefs


def genesis(
    sizes: list[int],
    *,
    rows_per_step: int = 32,
    num_steps: int = 1000,
    seed: int = 1,
    caps: dict[int, Cap] | None = None,
) -> Genesis:
    """A run on domains d0, d1, ... with these numbers of rows."""
    domains = tuple(
        Domain(name=f"d{i}", num_rows=size, fingerprint=f"f{i}", cap=(caps or {}).get(i, Cap()))
        for i, size in enumerate(sizes)
    )
    return Genesis(
        run="test", seed=seed, sequence_length=8, rows_per_step=rows_per_step, num_steps=num_steps,
        store_fingerprint="store", domains=domains,
    )  # fmt: skip


def segment(start_step: int, weights: list[float] | np.ndarray) -> Segment:
    """A mixture in proportion to `weights` from `start_step` on."""
    return Segment(start_step=start_step, proportions=tuple(integer_proportions(weights).tolist()))


def policy(*mixtures: list[float] | np.ndarray | Segment, caps: dict[str, Cap] | None = None) -> PolicyEntry:
    """A policy of one mixture given by weights, or of segments."""
    program = tuple(m if isinstance(m, Segment) else segment(0, m) for m in mixtures)
    return PolicyEntry(document={}, program=program, caps=caps or {})


def plan(run: Genesis, *commits: tuple[int, PolicyEntry]) -> Plan:
    """The plan of policies with their effective steps, in order of commit."""
    return Plan(run, [CommittedPolicy(step, lsn, entry) for lsn, (step, entry) in enumerate(commits, start=1)])


def ordered(refs: RowRefs) -> list[tuple[int, int, int, int]]:
    """Rows as (position, domain, epoch, row), in their order."""
    columns = (refs.position_n, refs.domain_n, refs.epoch_n, refs.row_n)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def changing_plan(num_changes: int = 40, steps_each: int = 4, seed: int = 5) -> Plan:
    """Twelve domains, 64 rows a step, and a new random mixture every few steps in which the odd domain rests."""
    rng = np.random.default_rng(seed)
    run = genesis([97, 128, 129, 1009, 64, 65, 63, 256, 31, 500, 77, 4096], rows_per_step=64, seed=seed)
    commits = []
    for change in range(num_changes):
        weights = rng.random(12) * (rng.random(12) > 0.2) + np.eye(12)[change % 12] * 0.1
        commits.append((change * steps_each, policy(weights)))
    return plan(run, *commits)
