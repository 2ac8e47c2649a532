"""The Prometheus endpoint: its text as Prometheus' own parser reads it, figures by brute force, a real service."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.entries import DomainLoss, Pass, Reject, Report
from mixwright.data_mixing.prometheus import MOST_DOMAINS, Family, render
from mixwright.data_mixing.service import listen_address, read_record, start_service, stop_service
from mixwright.launch.metrics_endpoint import MetricsPage, MetricsServer, newest_step
from tests.data_mixing.run_cases import TrainerSide, genesis

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(text: str) -> Samples:
    """Every sample by name and labels, as Prometheus reads them."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def at(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"mixwright_{name}", frozenset(labels.items())]


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return answer.read().decode()


@pytest.fixture
def trainer(tmp_path: Path) -> TrainerSide:
    """30 trained steps of a run with a cap, whose mixture changed at step 20."""
    caps = {"web-a": Cap(max_epochs=1.0)}
    trainer = TrainerSide(tmp_path / "exp", genesis("exp", caps=caps))
    document = {"kind": "static", "mixture": {"code": 2, "web-a": 1}}
    trainer.commit(trainer.journal.append(accept(document, trainer.genesis)).lsn, 20)
    trainer.report(last_step=29)
    return trainer


def test_labels_and_numbers_survive_the_text_format() -> None:
    hostile = 'a"b\\c\nd{e="f"} 7'
    family = Family("x", "two\nlines", (({"domain": hostile}, 0.1 + 0.2), ({"domain": "nan"}, float("nan"))))
    samples = samples_of(render(family))
    assert at(samples, "x", domain=hostile) == 0.1 + 0.2
    assert np.isnan(at(samples, "x", domain="nan"))


def test_domains_are_counted_like_the_rows_of_the_plan(trainer: TrainerSide) -> None:
    samples = samples_of(MetricsPage(trainer.run_dir).text())
    plan, names = trainer.history.plan(), [domain.name for domain in trainer.genesis.domains]
    drawn: Counter[str] = Counter()
    since: Counter[str] = Counter()
    promised = np.zeros(len(names))
    for step in range(30):
        step_names = [names[index] for index in plan.rows(step).domain_n]
        drawn.update(step_names)
        since.update(step_names if step >= 20 else [])
        promised += plan.proportions(step) * 8
    exhausted = next(event.step for event in plan.exhaustion() if event.domain == "web-a")
    for name, size, promise in zip(names, (1000, 3000, 100, 300), promised, strict=True):
        assert at(samples, "domain_tokens_total", domain=name) == drawn[name] * 64
        assert at(samples, "domain_epochs", domain=name) == drawn[name] / size
        assert at(samples, "domain_proportion", domain=name, kind="realised") == since[name] / 80
        assert at(samples, "domain_quantisation_error_rows", domain=name) == pytest.approx(
            drawn[name] - promise, abs=1e-6
        )
    assert at(samples, "domain_proportion", domain="code", kind="target") == pytest.approx(2 / 3)
    assert at(samples, "domain_exhaust_step", domain="web-a") == exhausted
    assert ("mixwright_domain_exhaust_step", frozenset({("domain", "code")})) not in samples
    assert at(samples, "domain_loss", domain="code") == 2.5
    assert at(samples, "domain_loss_stderr", domain="code") == pytest.approx((9 - 2.5**2) ** 0.5 / 10)


def test_the_page_follows_the_journal_and_counts_what_went_wrong(trainer: TrainerSide) -> None:
    trainer.journal.append(Reject(document={}, reason="no such domain"))
    page = MetricsPage(trainer.run_dir)
    before = samples_of(page.text())
    assert at(before, "policy_errors_total", kind="reject") == 1
    assert (at(before, "step"), at(before, "commit_lead_steps"), at(before, "controller_up")) == (30, 20, 0)
    trainer.journal.append(Pass(policy_lsn=2, step=30, reason="late"))
    trainer.report(last_step=39)
    page.is_up = True
    after = samples_of(page.text())
    assert at(after, "policy_errors_total", kind="pass") == 1
    assert (at(after, "step"), at(after, "controller_up")) == (40, 1)
    assert at(after, "tokens_per_second") > 0
    assert at(after, "run_info", run="exp", state="running") == 1


def test_a_report_of_other_rows_than_the_plans_is_an_alarm(trainer: TrainerSide) -> None:
    page = MetricsPage(trainer.run_dir)
    page.text()
    plan = trainer.history.plan()
    losses = {"code": DomainLoss(loss_sum=1.0, loss_square_sum=1.0, num_tokens=1, num_rows=1)}
    right = f"{sum(plan.digest(step) for step in (30, 31)) % 2**64:016x}"
    for first, digest in ((30, right), (32, right)):
        trainer.journal.append(
            Report(kind="train", first_step=first, last_step=first + 1, domains=losses, digest=digest, attempt=0)
        )
        assert at(samples_of(page.text()), "digest_mismatch_total") == (first == 32)


def test_many_domains_are_summed_up(tmp_path: Path) -> None:
    sizes = {f"d{index:03}": 100 + index for index in range(MOST_DOMAINS + 50)}
    trainer = TrainerSide(tmp_path / "wide", genesis("wide", sizes=sizes))
    trainer.report(last_step=99)
    samples = samples_of(MetricsPage(trainer.run_dir).text())
    tokens = [value for (name, _), value in samples.items() if name == "mixwright_domain_tokens_total"]
    assert (len(tokens), sum(tokens)) == (MOST_DOMAINS + 1, 100 * 8 * 64)
    targets = {labels: value for (name, labels), value in samples.items() if name == "mixwright_domain_proportion"}
    assert sum(value for labels, value in targets.items() if ("kind", "target") in labels) == pytest.approx(1)


def test_waiting_and_lag_come_from_the_newest_step_of_the_metrics(trainer: TrainerSide) -> None:
    lines = [
        json.dumps({"kind": "step", "step": step, "step_seconds": 0.5, "wait_seconds": step / 1000})
        for step in range(30, 34)
    ]
    (trainer.run_dir / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "validation", "step": 33}', '{"ki']))
    samples = samples_of(MetricsPage(trainer.run_dir).text())
    assert (at(samples, "wait_seconds"), at(samples, "report_lag_steps")) == (0.033, 3)
    assert newest_step(trainer.run_dir / "none.jsonl") == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("9464", ("127.0.0.1", 9464)), ("0.0.0.0:0", ("0.0.0.0", 0)), ("x", None), ("70000", None), ("h:-1", None)],
)
def test_without_a_host_only_this_machine_is_answered(text: str, expected: tuple[str, int] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"expected \[HOST:\]PORT"):
            listen_address(text)
    else:
        assert listen_address(text) == expected


def test_only_the_metrics_are_served_and_a_run_that_has_not_begun_says_so(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    with MetricsServer(MetricsPage(tmp_path), "127.0.0.1", 0) as server:
        for path, code, said in (("/metrics", 503, "no GENESIS"), ("/../service.json", 404, "at /metrics")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(server.url.removesuffix("/metrics") + path, timeout=10)
            assert (refused.value.code, said in refused.value.read().decode()) == (code, True)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    run_dir = TrainerSide(tmp_path / "exp").run_dir
    yield run_dir
    stop_service(run_dir)


@pytest.mark.ray
def test_a_real_service_answers_from_its_start_on_and_says_when_its_controller_does(served: Path) -> None:
    service = start_service(served, address="local", watch_pid=None, metrics="0")
    deadline = time.monotonic() + 120
    while (record := read_record(served)) is None or not record.metrics:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert record.metrics.startswith("http://127.0.0.1:")
    assert at(samples_of(fetch(record.metrics)), "controller_up") == 0
    assert service.wait(120).state == "ready"
    assert at(samples_of(fetch(record.metrics)), "controller_up") == 1
    while ("mixwright_journal_append_seconds", frozenset()) not in (samples := samples_of(fetch(record.metrics))):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert at(samples, "journal_append_seconds") > 0
    assert at(samples, "lease_epoch", role="controller") == 0
