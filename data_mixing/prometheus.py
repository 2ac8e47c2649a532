"""The figures of a run in Prometheus' text format 0.0.4 (spec/mixing.md 5.4).

What the specification lists and nobody measures is left out: reports are never dropped and there is no cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mixwright.data_mixing.run_figures import DomainFigures, Refusals, RunFigures

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "mixwright_"
MOST_DOMAINS = 100
"""Domains with series of their own, those with the largest proportions; the others are summed up as OTHER."""
OTHER = "(other)"
"""No domain has such a name."""

Sample = tuple[Mapping[str, str], float]


@dataclass(frozen=True)
class HostFigures:
    """What the journal does not tell. None is not known.

    is_up: the controller answers; append_seconds: what its newest journal entry took to be on disk; trained_step: the
    newest step in the run's metrics, with the seconds that it took and that rank 0 waited for its rows.
    """

    is_up: bool
    append_seconds: float | None = None
    trained_step: int | None = None
    step_seconds: float | None = None
    wait_seconds: float | None = None
    digest_mismatches: int = 0


@dataclass(frozen=True)
class Family:
    """One metric: its samples differ in their labels."""

    name: str
    help: str
    samples: tuple[Sample, ...]
    type: Literal["gauge", "counter"] = "gauge"


def exposition(figures: RunFigures, refusals: Refusals, host: HostFigures, leases: Mapping[str, int]) -> str:
    """All metrics of a run; `leases` are the epochs of the roles."""
    families = [
        *_run(figures, leases),
        *_steps(figures, host),
        *_faults(refusals, host),
        *_domains(figures.domains),
    ]
    return "".join(render(family) for family in families if family.samples)


def render(family: Family) -> str:
    """A family as lines, with its HELP and TYPE."""
    name = PREFIX + family.name
    lines = [f"# HELP {name} {_escaped_help(family.help)}", f"# TYPE {name} {family.type}"]
    return (
        "\n".join([*lines, *(f"{name}{_labels(labels)} {_number(value)}" for labels, value in family.samples)]) + "\n"
    )


def _run(figures: RunFigures, leases: Mapping[str, int]) -> Iterator[Family]:
    status = figures.status
    yield Family("run_info", "The run and what state it is in.", (({"run": status.run, "state": status.state}, 1.0),))
    yield _gauge("step", "First step that is not reported as trained.", status.next_step)
    yield _gauge("num_steps", "Steps of the whole run.", status.num_steps)
    yield _gauge("lsn", "Newest journal entry.", status.last_lsn)
    yield _gauge("policy_lsn", "Journal entry of the policy in force.", status.policy.lsn if status.policy else None)
    yield _gauge("pending_policies", "Policies that wait for their effect.", len(status.pending))
    yield Family(
        "lease_epoch", "How often a role has changed hands.", tuple(({"role": r}, float(e)) for r, e in leases.items())
    )
    yield _gauge("loss", "Mean loss of the newest report, nats per token.", figures.loss)
    yield _gauge("tokens_per_second", "Tokens per second over the newest reports.", figures.tokens_per_s)
    lead = figures.commits[-1].lead_steps if figures.commits else None
    yield _gauge("commit_lead_steps", "Steps from the last reported one to the newest commit's effect.", lead)


def _steps(figures: RunFigures, host: HostFigures) -> Iterator[Family]:
    trained, reported = host.trained_step, figures.status.next_step
    lag = None if trained is None else max(trained - reported, 0)
    yield _gauge("controller_up", "Whether the controller answers.", float(host.is_up))
    yield _gauge("report_lag_steps", "Trained steps that are not reported yet.", lag)
    yield _gauge("step_seconds", "Seconds of the newest step.", host.step_seconds)
    yield _gauge("wait_seconds", "Seconds of the newest step in which rank 0 waited for rows.", host.wait_seconds)
    yield _gauge(
        "journal_append_seconds", "Seconds until the controller's newest entry was on disk.", host.append_seconds
    )


def _faults(refusals: Refusals, host: HostFigures) -> Iterator[Family]:
    yield Family(
        "policy_errors_total",
        "Policies refused, decisions held or replaced by the guard, decisions that came too late.",
        tuple(({"kind": kind}, float(count)) for kind, count in refusals.by_kind().items()),
        "counter",
    )
    told = "Reports whose rows are not those of the plan. Alarm above 0."
    yield Family("digest_mismatch_total", told, (({}, float(host.digest_mismatches)),), "counter")


def _domains(domains: Iterable[DomainFigures]) -> Iterator[Family]:
    ranked = sorted(domains, key=lambda domain: -domain.requested)
    shown, rest = ranked[:MOST_DOMAINS], ranked[MOST_DOMAINS:]

    def each(values: Iterable[float | None]) -> tuple[Sample, ...]:
        pairs = zip(shown, values, strict=True)
        return tuple(({"domain": domain.name}, value) for domain, value in pairs if value is not None)

    def other(value: float) -> tuple[Sample, ...]:
        return (({"domain": OTHER}, value),) if rest else ()

    tokens = each(domain.num_tokens for domain in shown) + other(sum(domain.num_tokens for domain in rest))
    yield Family("domain_tokens_total", "Tokens read.", tokens, "counter")
    target = each(domain.requested for domain in shown) + other(sum(domain.requested for domain in rest))
    realised = each(domain.realised for domain in shown) + other(sum(domain.realised or 0.0 for domain in rest))
    yield Family(
        "domain_proportion",
        "Share of the tokens: asked for, and read since that mixture took effect.",
        _of_kind("target", target) + _of_kind("realised", realised),
    )
    yield Family("domain_epochs", "How often the domain has been read.", each(domain.epochs for domain in shown))
    yield Family("domain_loss", "Newest mean loss, nats per token.", each(domain.loss for domain in shown))
    yield Family("domain_loss_stderr", "Its standard error.", each(domain.loss_error for domain in shown))
    ends = (domain.exhaustion.step if domain.exhaustion else None for domain in shown)
    yield Family("domain_exhaust_step", "First step at which the domain's cap binds.", each(ends))
    off = each(domain.rows_off for domain in shown)
    yield Family("domain_quantisation_error_rows", "Rows read beyond those promised.", off)


def _of_kind(kind: str, samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    return tuple(({**labels, "kind": kind}, value) for labels, value in samples)


def _gauge(name: str, text: str, value: float | None) -> Family:
    return Family(name, text, () if value is None else (({}, float(value)),))


def _labels(labels: Mapping[str, str]) -> str:
    inner = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return "{" + inner + "}" if inner else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _escaped_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isfinite(value):
        return str(int(value)) if value == int(value) and abs(value) < 1 << 53 else repr(value)
    return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")
