"""The dashboard's server, asked as a page asks it: what it tells is what the journal says, and what it refuses."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import pytest

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.entries import Report
from mixwright.data_mixing.journal import Journal, read_entries
from mixwright.data_mixing.service import start_service, stop_service
from mixwright.data_mixing.store import TokenStore
from mixwright.data_mixing.tokenizer import load_tokenizer
from mixwright.launch import cli
from mixwright.launch.dashboard.app import follow
from mixwright.launch.dashboard.guard import MAX_BODY_BYTES
from mixwright.launch.dashboard.inspector import Inspector
from mixwright.launch.dashboard.panels import PANELS
from mixwright.launch.dashboard.run_view import RunView, shown
from mixwright.launch.dashboard.series import Buckets, plain
from mixwright.launch.dashboard.submission import Submission, preview
from mixwright.launch.dashboard.tails import LineTail
from mixwright.pretrain.row_log import read_row_log, row_log_folder
from mixwright.pretrain.rundir import read_history
from tests.data_mixing.live_run import ROWS, LiveRun
from tests.data_mixing.run_cases import TrainerSide
from tests.launch.dashboard_runs import (
    AIOLI,
    HOSTILE,
    NUM_STEPS,
    PWN,
    hostile_store,
    write_metrics,
    write_preference_run,
    write_run,
)
from tests.launch.dashboards import Dashboard, dashboard, wait_for

DOCUMENT = "kind: static\nmixture: {code: 3, wiki: 1}\n"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_store(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs"), store)


@pytest.fixture(scope="module")
def server(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """One server for all tests that only ask, with a preference run beside the run."""
    preference = write_preference_run(tmp_path_factory.mktemp("rpo") / "aligned")
    with dashboard(run_dir, preference, "--allow-submit") as started:
        started.wait_until_read()
        yield started


def view_of(run_dir: Path) -> RunView:
    """The run's files read to their end, without a server."""
    view = RunView(run_dir)
    while view.advance():
        pass
    return view


def built(view: RunView, name: str) -> Any:
    return json.loads(view.panel(name, PANELS[name])[1])


# --- what the panels tell --------------------------------------------------------------------------------------


def test_the_summary_is_that_of_mix_status(server: Dashboard, run_dir: Path) -> None:
    history, summary = read_history(run_dir), server.panel("summary")
    plan, step = history.plan(), history.last_step + 1
    assert (summary["next_step"], summary["num_steps"], summary["state"]) == (NUM_STEPS, NUM_STEPS, "running")
    assert summary["policy"]["author"] == "ann"
    assert [domain["num_tokens"] for domain in summary["domains"]] == (plan.cursors(step) * 16).tolist()
    code = summary["domains"][0]
    assert (code["name"], code["max_epochs"], code["on_exhaust"], code["exhausted"]) == (
        "code",
        1000,
        "renormalise",
        None,
    )
    assert code["proportion"] == 0.75


def test_the_mixture_is_what_the_plan_asks_for_and_what_the_reports_counted(server: Dashboard, run_dir: Path) -> None:
    mixture, history = server.panel("mixture"), read_history(run_dir)
    reports = [
        e.body for e in read_entries(run_dir / "journal") if isinstance(e.body, Report) and e.body.kind == "train"
    ]
    assert mixture["steps"] == mixture["requested_steps"] == [report.last_step + 1 for report in reports]
    plan, names = history.plan(), [domain.name for domain in history.genesis.domains]
    for index, report in enumerate(reports):
        rows_G = np.array([report.domains[name].num_rows for name in names])
        asked_G = np.mean([plan.proportions(s) for s in range(report.first_step, report.last_step + 1)], axis=0)
        assert np.allclose([shares[index] for shares in mixture["realised"]], rows_G / rows_G.sum(), atol=1e-4)
        assert np.allclose([shares[index] for shares in mixture["requested"]], asked_G, atol=1e-4)
    assert [step for step, *_ in mixture["commits"]] == [commit.effective_step for commit in history.commits]


def test_the_gap_is_the_largest_difference_of_rows_read_and_asked_for(store: Path, tmp_path: Path) -> None:
    live = LiveRun(tmp_path / "run" / "journal", TokenStore.open(store), 30, {"kind": "static", "mixture": {"code": 1}})
    live.run()
    # LiveRun reports four rows of each of three domains, whatever was read.
    assert built(view_of(tmp_path / "run"), "mixture")["largest_gap_rows"] == pytest.approx(3 * 12 * 2 / 3)


def test_losses_are_pooled_over_tokens_with_the_interval_of_their_mean(server: Dashboard, run_dir: Path) -> None:
    losses = server.panel("losses")
    reports = [
        e.body for e in read_entries(run_dir / "journal") if isinstance(e.body, Report) and e.body.kind == "validation"
    ]
    curve = losses["validation"]
    assert curve["steps"] == [report.last_step + 1 for report in reports]
    for index, report in enumerate(reports):
        for name, mean, half in zip(losses["names"], curve["mean"], curve["half"], strict=True):
            loss = report.domains[name]
            value = loss.loss_sum / loss.num_tokens
            spread = max(loss.loss_square_sum / loss.num_tokens - value**2, 0) / loss.num_tokens
            assert mean[index] == pytest.approx(value, rel=1e-4)
            assert half[index] == pytest.approx(1.96 * spread**0.5, rel=1e-2, abs=1e-6)


def test_the_timeline_has_every_kind_of_event_in_order(server: Dashboard, run_dir: Path) -> None:
    timeline = server.panel("timeline")
    assert timeline["counts"]["reject"] == 2
    assert timeline["counts"]["commit"] == read_history(run_dir).num_commits
    assert timeline["counts"]["shadow"] >= 2
    status, page, _ = server.ask("/api/runs/0/events?lanes=reject&count=1")
    assert status == 200
    assert page["more"]
    older = server.ask(f"/api/runs/0/events?lanes=reject&before={page['events'][0]['lsn']}")[1]
    assert len(older["events"]) == 1
    assert older["events"][0]["lsn"] < page["events"][0]["lsn"]
    assert "matches no domain; valid names: code, web, wiki" in older["events"][0]["text"]


def test_a_policy_that_asks_for_what_an_earlier_one_asked_for_is_a_rollback(store: Path, tmp_path: Path) -> None:
    from tests.data_mixing.run_cases import TrainerSide

    trainer = TrainerSide(tmp_path / "exp")
    for document in (
        {"kind": "static", "mixture": {"code": 1}},
        {"kind": "temperature", "temperature": 1, "why": "as before"},
    ):
        trainer.journal.append(accept(document, trainer.genesis))
    trainer.read()
    lanes = [(event.lane, event.lsn) for event in view_of(tmp_path / "exp").journal.events if event.lane != "run"]
    assert [lane for lane, _ in lanes] == ["proposal", "commit", "proposal", "rollback"]


def test_decisions_come_with_their_matrices_and_shares(server: Dashboard, run_dir: Path) -> None:
    aioli, odm = server.panel("policy")["policies"]
    assert (aioli["kind"], aioli["shadow"], odm["kind"], odm["shadow"]) == ("aioli", False, "odm", True)
    history = read_history(run_dir)
    decision = history.decisions[aioli["lsn"]][1]
    assert aioli["arms"] == ["code", "web", "wiki"]
    assert aioli["shares"][-1] == list(decision.shares)
    gains = decision.proposal["diagnostics"].get("gains")
    assert np.allclose(aioli["matrices"]["gains"][-1], gains, rtol=1e-3)


def test_weights_speed_and_figures(server: Dashboard) -> None:
    weighting, speed, figures = server.panel("weighting"), server.panel("throughput"), server.panel("figures", 1)
    assert weighting["in_force"].startswith("strategy linupper, r 0.4 (from step ")
    assert weighting["effective"]["mean"] == [0.8] * (NUM_STEPS // 5)
    assert weighting["histogram"][0] == [1, 2, 5, 3, 1]
    assert set(speed["tokens_per_second"]["mean"]) == {ROWS * 16 / 0.5}
    assert speed["waiting"][0] == 0.002
    assert figures["curves"]["train/rewards/margin"]["mean"][-1] == 1.2
    assert figures["curves"]["evaluation/divergence/kl"]["steps"] == [10, 20, 30]
    assert server.panel("summary", 1)["state"] == "complete"
    assert server.panel("throughput", 1)["peak_memory_bytes"] == 1 << 30


def test_a_commit_is_told_with_its_difference(server: Dashboard, run_dir: Path) -> None:
    history = read_history(run_dir)
    commit = history.commits[-1]
    detail = server.ask(f"/api/runs/0/commits/{commit.lsn}")[1]
    before_G, after_G = (
        history.plan().proportions(step) for step in (commit.effective_step - 1, commit.effective_step)
    )
    names = [domain.name for domain in history.genesis.domains]
    expected = {name: (before, after) for name, before, after in zip(names, before_G, after_G, strict=True)}
    assert (detail["author"], detail["step"], detail["weighting"]) == (
        "ann",
        commit.effective_step,
        "strategy linupper, r 0.4",
    )
    for name, before, after in detail["changes"]:
        assert (before, after) == pytest.approx(expected[name], abs=1e-4)
    assert server.ask("/api/runs/0/commits/1")[0] == 400


def test_runs_are_compared(server: Dashboard) -> None:
    tree = server.ask("/api/compare")[1]
    assert [run["name"] for run in tree["runs"]] == ["live", "aligned"]
    assert tree["domains"] == ["code", "web", "wiki"]
    assert tree["runs"][1]["train"]["mean"][-1] == pytest.approx(0.4)
    assert "seed" in tree["different"]


def test_a_poll_costs_nothing_when_nothing_is_new(server: Dashboard) -> None:
    status, tree, headers = server.ask("/api/poll")
    assert status == 200
    assert server.ask("/api/poll", headers={"If-None-Match": headers["etag"]})[0] == 304
    tag = tree["runs"][0]["panels"]["losses"]
    assert server.ask("/api/runs/0/panels/losses", headers={"If-None-Match": tag})[0] == 304


# --- growing, torn and damaged files ---------------------------------------------------------------------------


def test_a_growing_run_is_followed_and_equals_one_that_is_read_at_once(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    live = LiveRun(
        run / "journal", TokenStore.open(store), 60, {"kind": "temperature", "temperature": 2.0}, report_every=5
    )
    live.run(end_step=10)
    view, stopping = RunView(run), threading.Event()
    thread = threading.Thread(target=follow, args=([view], stopping))
    thread.start()
    try:
        wait_for(lambda: built(view, "losses")["train"]["steps"] == [5, 10])
        write_metrics(run, 10)
        live.run(10, 60)
        write_metrics(run, 60, first_step=10)
        wait_for(lambda: built(view, "throughput")["steps"][-1:] == [60] and not view.is_reading)
        wait_for(lambda: built(view, "mixture")["requested_steps"] == list(range(5, 61, 5)))
    finally:
        stopping.set()
        thread.join()
    whole = view_of(run)
    for name in ("mixture", "losses", "timeline", "throughput", "weighting"):
        assert built(view, name) == built(whole, name), name


def test_what_a_resumed_run_does_again_counts_as_done_last(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    policy = {"kind": "temperature", "temperature": 2.0}
    opened = TokenStore.open(store)
    LiveRun(run / "journal", opened, 60, policy, report_every=5).run(end_step=40)
    LiveRun(run / "journal", opened, 60, policy, report_every=5, attempt=1).run(20, 60)
    (run / "metrics.jsonl").write_text("".join(_step_line(s, 1.0) for s in range(1, 41)) + '{"kind": "step", "st')
    view = view_of(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + "".join(_step_line(s, 2.0) for s in range(21, 61)))
    while view.advance():
        pass
    assert built(view, "losses")["train"]["steps"] == list(range(5, 61, 5))
    speed = built(view, "throughput")
    assert speed["steps"] == list(range(1, 61))
    assert speed["seconds"]["mean"] == [1.0] * 20 + [2.0] * 40


def _step_line(step: int, seconds: float) -> str:
    return json.dumps({"kind": "step", "step": step, "step_seconds": seconds, "wait_seconds": 0.0}) + "\n"


def test_half_a_line_waits_until_it_is_whole_and_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = LineTail(path)
    assert tail.read() == []
    path.write_bytes(b"one\ntw")
    assert tail.read() == [b"one"]
    with path.open("ab") as file:
        file.write(b"o\n")
    assert tail.read() == [b"two"]
    path.write_bytes(b"new\n")
    assert tail.read() == [b"new"]
    assert tail.restarts == 1


def test_a_damaged_journal_is_named_and_what_came_before_stays(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "journal").mkdir(parents=True)
    for path in sorted((run_dir / "journal").glob("*.json")):
        (copy / "journal" / path.name).write_bytes(path.read_bytes())
    broken = copy / "journal" / "00000020.json"
    broken.write_bytes(broken.read_bytes().replace(b'"time":', b'"time":1'))
    summary = built(view_of(copy), "summary")
    assert "00000020.json" in summary["problem"]
    assert summary["name"] == "copy"


def test_looking_at_a_run_changes_no_file_of_it(run_dir: Path) -> None:
    (run_dir / "journal" / ".1.abc@elsewhere.tmp").write_bytes(b"of a writer that may live")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run_dir.rglob("*")}
    view = view_of(run_dir)
    for name in PANELS:
        built(view, name)
    Inspector(view).rows(3, "0/1", 0, 50)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run_dir.rglob("*")} == before
    (run_dir / "journal" / ".1.abc@elsewhere.tmp").unlink()


# --- curves of fixed size --------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [7, 64, 10_000])
def test_merged_buckets_are_exact_sums_over_their_steps(points: int) -> None:
    chance = np.random.default_rng(0)
    buckets, step_n = Buckets(2, max_buckets=64), np.arange(1, 1000)
    value_nC, weight_nC = chance.normal(size=(999, 2)), chance.integers(0, 3, (999, 2)).astype(float)
    for part in np.array_split(np.arange(999), 37):
        buckets.add_many(
            step_n[part], value_nC[part] * weight_nC[part], weight_nC[part], value_nC[part] ** 2 * weight_nC[part]
        )
    curve = buckets.curve(points)
    starts = np.concatenate([[0], np.searchsorted(step_n, curve.step_P, side="right")])
    for point, (first, last) in enumerate(itertools.pairwise(starts)):
        values, weights = value_nC[first:last], weight_nC[first:last]
        assert np.allclose(curve.mean_PC[point], (values * weights).sum(axis=0) / weights.sum(axis=0))
        seen = np.where(weights > 0, values, np.nan)
        assert np.allclose(curve.low_PC[point], np.nanmin(seen, axis=0))
        assert np.allclose(curve.high_PC[point], np.nanmax(seen, axis=0))
    assert len(curve.step_P) <= min(points, 64)
    assert curve.weight_PC.sum() == weight_nC.sum()


def test_a_rewind_forgets_everything_from_its_step_on() -> None:
    buckets = Buckets(1, max_buckets=64)
    for step in range(60):
        buckets.add(step, [1.0])
    buckets.add(30, [5.0])
    curve = buckets.curve(100)
    assert curve.step_P.tolist() == list(range(31))
    assert curve.mean_PC[:, 0].tolist() == [1.0] * 30 + [5.0]


def test_numbers_are_json_with_significant_digits_and_no_nan() -> None:
    assert plain([1234567.0, 0.000123456, np.nan, -np.inf, 0.0], 3) == [1230000.0, 0.000123, None, None, 0.0]
    json.dumps(plain(np.full((2, 2), np.nan)), allow_nan=False)


def test_texts_are_spelt_out_but_for_line_breaks_and_tabs() -> None:
    assert shown({"a\x00": ["x\u202ey\n\tz", 3, [1.5]]}) == {"a\\x00": ["x\\u202ey\n\tz", 3, [1.5]]}


# --- the inspector ---------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_plan_with_their_text_loss_and_weight(
    server: Dashboard, run_dir: Path, store: Path
) -> None:
    status, found, _ = server.ask("/api/runs/0/rows?step=37&rank=1/2&characters=20000")
    assert status == 200, found
    refs = read_history(run_dir).plan().rows(37, range(6, 12))
    opened = TokenStore.open(store)
    decode = load_tokenizer(opened.tokenizer_folder).decode
    names = [domain.name for domain in read_history(run_dir).genesis.domains]
    log = read_row_log(row_log_folder(run_dir))
    logged = {
        int(p): (float(x), float(w))
        for s, p, x, w in zip(log.step_n, log.position_n, log.loss_n, log.weight_n, strict=True)
        if s == 37
    }
    for row, position, d, epoch, number in zip(
        found["rows"], refs.position_n, refs.domain_n, refs.epoch_n, refs.row_n, strict=True
    ):
        assert (row["position"], row["domain"], row["epoch"], row["row"]) == (position, names[d], epoch, number)
        assert (row["loss"], row["weight"]) == pytest.approx(logged[int(position)])
        assert row["text"] == shown(decode(opened.rows(names[d], "train", int(number), 1)[0].tolist()))
    assert "\\u202e" in "".join(row["text"] for row in server.ask("/api/runs/0/rows?step=1&characters=9999")[1]["rows"])


def test_the_steps_of_a_row_are_all_steps_that_read_it(server: Dashboard, run_dir: Path) -> None:
    history = read_history(run_dir)
    plan, names = history.plan(), [domain.name for domain in history.genesis.domains]
    wanted = plan.rows(50)
    domain, row = int(wanted.domain_n[3]), int(wanted.row_n[3])
    expected = []
    for step in range(NUM_STEPS):
        refs = plan.rows(step)
        hits = np.flatnonzero((refs.domain_n == domain) & (refs.row_n == row))
        expected += [
            {"step": step, "position": int(refs.position_n[at]), "epoch": int(refs.epoch_n[at])} for at in hits
        ]
    found = server.ask(f"/api/runs/0/uses?row={names[domain]}:{row}")[1]
    assert found["uses"] == expected
    assert len(expected) > 1


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("rows?step=-1", "step -1 is not in the run, which has steps 0 to 119"),
        ("rows?step=120", "step 120 is not in the run"),
        ("rows?step=1e3", "step: "),
        ("rows?step=3&rank=../../etc/passwd", "expected R/N"),
        ("rows?step=3&rank=5/2", "expected R/N"),
        ("rows?step=3&rank=" + "1" * 50 + "/2", "rank: "),
        ("rows", "step: Field required"),
        ("uses?row=../../../etc/passwd:0", "expected DOMAIN:ROW"),
        ("uses?row=code/../web:0", "expected DOMAIN:ROW"),
        ("uses?row=coed:0", "did you mean 'code'?"),
        ("uses?row=code:999999", "has rows 0 to"),
        ("uses?row=code:-1", "has rows 0 to"),
        ("uses?row=" + quote(PWN) + ":0", "expected DOMAIN:ROW"),
        ("entries/999999", "does not exist"),
        ("entries/-1", "does not exist"),
        ("entries/..%2f..%2fconfig", ""),
        ("panels/..%2f..%2fconfig.yaml", ""),
        ("panels/__class__", "there is no panel"),
    ],
)  # fmt: skip
def test_the_inspector_takes_numbers_and_names_of_the_run_and_nothing_else(
    server: Dashboard, query: str, says: str
) -> None:
    status, tree, _ = server.ask(f"/api/runs/0/{query}")
    assert status in (400, 404), tree
    assert says in tree["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static/app.py",
        "//etc/passwd",
        "/static/",
        "/docs",
        "/openapi.json",
        "/api/runs/7/panels/summary",
        "/api/runs/-1/panels/summary",
    ],
)
def test_only_the_pages_own_files_are_served(server: Dashboard, path: str) -> None:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    connection.request("GET", path)  # urllib would tidy the path
    answer = connection.getresponse()
    assert answer.status == 404
    assert b"import" not in answer.read()


def test_a_store_that_is_gone_costs_the_texts_and_nothing_else(run_dir: Path, tmp_path: Path) -> None:
    view = view_of(run_dir)
    inspector = Inspector(view)
    text = (run_dir / "config.yaml").read_text()
    try:
        (run_dir / "config.yaml").write_text(text.replace("/store", "/elsewhere"))
        found = inspector.rows(3, "0/1", 0, 50)
    finally:
        (run_dir / "config.yaml").write_text(text)
    assert "elsewhere" in found["text_problem"]
    assert [row["text"] for row in found["rows"]] == [None] * ROWS
    assert found["rows"][0]["weight"] == 0.0


# --- who may ask -----------------------------------------------------------------------------------------------


def test_every_answer_fences_the_page_in(server: Dashboard) -> None:
    for path in ("/", "/static/main.js", "/api/poll", "/nothing"):
        headers = {name.lower(): value for name, value in server.ask(path)[2].items()}
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    page = server.ask("/")[1].decode()
    assert "<script>" not in page
    assert " on" + "load=" not in page
    assert "style=" not in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 421),
        ("evil.example:8642", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
        ("[", 421),
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:9", 200),
    ],
)
def test_a_host_name_that_is_not_this_machines_is_refused(server: Dashboard, host: str, status: int) -> None:
    assert server.ask("/api/poll", headers={"Host": host})[0] == status


def guarded(server: Dashboard, **changes: str | None) -> dict[str, str]:
    """Headers of a request that is let in, with changes (None: left out)."""
    headers: dict[str, str | None] = {
        "Content-Type": "application/json", "Authorization": f"Bearer {server.token}", "Origin": server.url.rstrip("/"),
        "Sec-Fetch-Site": "same-origin", **{name.replace("_", "-"): value for name, value in changes.items()},
    }  # fmt: skip
    return {name: value for name, value in headers.items() if value is not None}


REFUSED: list[tuple[dict[str, str | None], int, str]] = [
    ({"Authorization": None}, 401, "Authorization"),
    ({"Authorization": "Bearer wrong"}, 401, "token"),
    ({"Authorization": "Bearer "}, 401, "token"),
    ({"Authorization": "Bearer \xe9"}, 401, "token"),
    ({"Origin": "http://evil.example"}, 403, "evil.example"),
    ({"Origin": "null"}, 403, "null"),
    ({"Origin": "http://127.0.0.1:1"}, 403, "Origin"),
    ({"Sec_Fetch_Site": "cross-site"}, 403, "cross-site"),
    ({"Sec_Fetch_Site": "same-site"}, 403, "same-site"),
    ({"Content_Type": "text/plain"}, 415, "application/json"),
    ({"Content_Type": "application/x-www-form-urlencoded"}, 415, "application/json"),
]


@pytest.mark.parametrize("verb", ["preview", "submit"])
@pytest.mark.parametrize(("changes", "status", "says"), REFUSED)
def test_a_submission_without_its_papers_is_refused(
    server: Dashboard, verb: str, changes: dict[str, str | None], status: int, says: str
) -> None:
    found, tree, _ = server.ask(f"/api/runs/0/{verb}", {"document": DOCUMENT}, guarded(server, **changes))
    assert (found, says in tree["error"]) == (status, True), tree


def test_a_token_in_the_url_counts_for_nothing(server: Dashboard) -> None:
    path = f"/api/runs/0/preview?token={server.token}&authorization=Bearer%20{server.token}"
    assert server.ask(path, {"document": DOCUMENT}, guarded(server, Authorization=None))[0] == 401


def test_an_oversized_request_is_refused_announced_or_not(server: Dashboard) -> None:
    large = json.dumps({"document": "x" * MAX_BODY_BYTES}).encode()
    assert server.ask("/api/runs/0/submit", headers=guarded(server), raw=large)[0] == 413
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=30) as raw:
        head = "".join(f"{name}: {value}\r\n" for name, value in guarded(server).items())
        raw.sendall(
            f"POST /api/runs/0/submit HTTP/1.1\r\nHost: localhost\r\n{head}".replace(
                server.url.rstrip("/"), "http://localhost"
            ).encode()
        )
        raw.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(MAX_BODY_BYTES // 65536 + 1):
            raw.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        raw.sendall(b"0\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


SENSELESS = [
    (b"{", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b"[]", "expected an object"),
    (b"{}", "document: required key is missing"),
    (b'{"document": "kind: static", "token": "x"}', "token: unknown key"),
    (b'{"document": "kind: [}"}', "not valid YAML"),
    (b'{"document": "kind: static\\nmixture: {coed: 1}"}', "did you mean 'code'?"),
    (b'{"document": "!!python/object/apply:os.system [id]"}', "not valid YAML"),
    (b'{"document": "kind: ../../x"}', "there is no policy of kind"),
]


@pytest.mark.parametrize(("body", "says"), SENSELESS)
def test_a_document_that_makes_no_sense_is_refused_with_one_line(server: Dashboard, body: bytes, says: str) -> None:
    status, tree, _ = server.ask("/api/runs/0/preview", headers=guarded(server), raw=body)
    assert (status, says in tree["error"]) == (400, True), tree


def test_a_preview_is_that_of_the_command_line_and_writes_nothing(
    server: Dashboard, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    LiveRun(run / "journal", TokenStore.open(store), 60, {"kind": "temperature", "temperature": 2.0}).run(end_step=30)
    before = [path.name for path in sorted((run / "journal").iterdir())]
    found = preview(view_of(run), Submission(document=DOCUMENT, why="try", at_step=50))
    (tmp_path / "policy.yaml").write_text(DOCUMENT)
    monkeypatch.setattr("sys.argv", ["mixwright", "mix", "submit", str(tmp_path / "policy.yaml"), "--run", str(run),
                                     "--at-step", "50", "--dry-run", "--json"])  # fmt: skip
    with pytest.raises(SystemExit):
        cli.main()
    told = json.loads(capsys.readouterr().out)
    assert (found["step"], found["changes"], found["remarks"]) == (50, told["mixture"], told["remarks"])
    assert json.loads(json.dumps(found["forecast"])) == told["forecast"]
    assert [path.name for path in sorted((run / "journal").iterdir())] == before
    late = {"document": DOCUMENT, "at_step": NUM_STEPS - 1}  # the other run is at its last step
    status, tree, _ = server.ask("/api/runs/0/preview", late, guarded(server))
    assert (status, "has passed" in tree["error"]) == (400, True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_policy_from_the_page_is_journaled_once_by_the_runs_own_controller(tmp_path: Path) -> None:
    trainer = TrainerSide(tmp_path / "exp")
    service = start_service(trainer.run_dir, address="local", watch_pid=None)
    try:
        assert service.wait(180).state == "ready"
        with dashboard(trainer.run_dir, "--allow-submit") as started:
            asked = {"document": "kind: static\nmixture: {code: 1}\n", "author": "ann", "why": PWN, "request_id": "one"}
            answers = [started.ask("/api/runs/0/submit", asked, guarded(started)) for _ in range(2)]
            assert [status for status, _, _ in answers] == [200, 200], answers
            assert answers[0][1]["lsn"] == answers[1][1]["lsn"]
            asked["document"] = "kind: static\nmixture: {coed: 1}\n"
            status, tree, _ = started.ask("/api/runs/0/submit", {**asked, "request_id": "two"}, guarded(started))
            assert (status, "did you mean 'code'?" in tree["error"]) == (400, True)
    finally:
        stop_service(trainer.run_dir, 60)
    policy = trainer.read().policies[answers[0][1]["lsn"]]
    assert (policy.document["mixture"], policy.author, policy.why) == ({"code": 1}, "ann", PWN)
    assert trainer.types().count("POLICY") == 2
    assert trainer.types().count("REJECT") == 1


def test_submitting_needs_the_runs_own_service(server: Dashboard) -> None:
    status, tree, _ = server.ask("/api/runs/0/submit", {"document": DOCUMENT}, guarded(server))
    assert status == 503
    assert "has no mixing service; start it with `mixwright mix up" in tree["error"]


def test_without_allow_submit_nobody_may_submit(store: Path, tmp_path: Path) -> None:
    live = LiveRun(tmp_path / "run" / "journal", TokenStore.open(store), 60, AIOLI)
    journal = Journal(live.folder, writer="leader")
    journal.append(live.genesis)
    with dashboard(tmp_path / "run") as quiet:
        assert quiet.token is None
        assert not quiet.ask("/api/poll")[1]["submit"]
        headers = {"Content-Type": "application/json", "Authorization": "Bearer "}
        assert quiet.ask("/api/runs/0/submit", {"document": DOCUMENT}, headers)[0] == 403
        assert quiet.url.startswith("http://127.0.0.1:")
        # A run that has not begun says so everywhere and breaks nothing.
        quiet.wait_until_read()
        assert quiet.panel("summary")["state"] == "waiting"
        for name in PANELS:
            quiet.panel(name)
        assert quiet.ask("/api/runs/0/rows?step=0")[0] == 400
        assert quiet.ask("/api/compare")[0] == 200


# --- the command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["runs/none"], "runs/none: no such run folder"), (["."], "holds no run"), ([], "there is no run under ./runs")],
)
def test_a_folder_without_a_run_is_refused(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["mixwright", "dashboard", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr("sys.argv", ["mixwright", "dashboard", str(run_dir), "--port", port])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 2
    assert f"--port: 127.0.0.1:{port} cannot be listened on" in capsys.readouterr().err


def test_a_hostile_reason_is_in_the_answers_as_text_alone(server: Dashboard) -> None:
    page = server.ask("/api/runs/0/events?lanes=reject,proposal,shadow,commit")[1]
    texts = [event["text"] for event in page["events"]]
    assert any(PWN in text for text in texts)
    assert not any(character in text for text in texts for character in "\x1b\u202e\u200f")
    assert HOSTILE.split(" ", 1)[0] in json.dumps(page, ensure_ascii=False).replace('\\"', '"')
