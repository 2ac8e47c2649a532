"""The dashboard's server, asked as a page asks it: what it tells is what journal, metrics and store say."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.entries import Report
from mixwright.data_mixing.journal import read_entries
from mixwright.data_mixing.store import TokenStore
from mixwright.launch import cli
from mixwright.launch.dashboard.app import NUM_THREADS, follow
from mixwright.launch.dashboard.inspector import Inspector
from mixwright.launch.dashboard.panels import PANELS
from mixwright.launch.dashboard.run_view import RunView
from mixwright.launch.dashboard.tails import LineTail
from mixwright.pretrain.rundir import read_history
from tests.data_mixing.live_run import ROWS, LiveRun
from tests.data_mixing.run_cases import TrainerSide
from tests.launch.dashboard_runs import HOSTILE, NUM_STEPS, PWN, built, view_of, write_metrics, write_preference_run
from tests.launch.dashboards import Dashboard, wait_for

# --- what the panels tell --------------------------------------------------------------------------------------------


def test_the_summary_is_that_of_mix_status(site: Dashboard, shown_run: Path) -> None:
    history, summary = read_history(shown_run), site.panel("summary")
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


def test_the_mixture_is_what_the_plan_asks_for_and_what_the_reports_counted(site: Dashboard, shown_run: Path) -> None:
    mixture, history = site.panel("mixture"), read_history(shown_run)
    reports = [
        e.body for e in read_entries(shown_run / "journal") if isinstance(e.body, Report) and e.body.kind == "train"
    ]
    assert mixture["steps"] == mixture["requested_steps"] == [report.last_step + 1 for report in reports]
    plan, names = history.plan(), [domain.name for domain in history.genesis.domains]
    for index, report in enumerate(reports):
        rows_G = np.array([report.domains[name].num_rows for name in names])
        asked_G = np.mean([plan.proportions(s) for s in range(report.first_step, report.last_step + 1)], axis=0)
        assert np.allclose([shares[index] for shares in mixture["realised"]], rows_G / rows_G.sum(), atol=1e-4)
        assert np.allclose([shares[index] for shares in mixture["requested"]], asked_G, atol=1e-4)
    assert [step for step, *_ in mixture["commits"]] == [commit.effective_step for commit in history.commits]


def test_the_gap_is_the_largest_difference_of_rows_read_and_asked_for(marked_store: Path, tmp_path: Path) -> None:
    live = LiveRun(
        tmp_path / "run" / "journal", TokenStore.open(marked_store), 30, {"kind": "static", "mixture": {"code": 1}}
    )
    live.run()
    # LiveRun reports four rows of each of three domains, whatever was read.
    assert built(view_of(tmp_path / "run"), "mixture")["largest_gap_rows"] == pytest.approx(3 * 12 * 2 / 3)


def test_the_countdown_is_the_plans_and_a_domain_stays_at_its_cap(tmp_path: Path) -> None:
    document = {"kind": "static", "mixture": {"web-a": 1, "web-b": 1, "code": 6},
                "caps": {"web-a": {"max_epochs": 2}, "web-b": {"max_epochs": 1}}}  # fmt: skip
    trainer = TrainerSide(tmp_path / "exp", document=document)
    first, second = trainer.history.plan().exhaustion()
    assert (first.domain, second.domain) == ("web-a", "web-b")
    for last_step in (49, first.step + 9, second.step + 99):
        trainer.report(last_step)
        found = {d["name"]: d["exhausted"] for d in built(view_of(tmp_path / "exp"), "summary")["domains"]}
        now = last_step + 1
        for event in (first, second):
            assert found[event.domain] == {"step": event.step, "in": max(event.step - now, 0), "action": "renormalise"}
        assert (found["code"], found["wiki"]) == (None, None)


def test_losses_are_pooled_over_tokens_with_the_interval_of_their_mean(site: Dashboard, shown_run: Path) -> None:
    losses = site.panel("losses")
    reports = [
        e.body
        for e in read_entries(shown_run / "journal")
        if isinstance(e.body, Report) and e.body.kind == "validation"
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


def test_the_timeline_has_every_kind_of_event_in_order(site: Dashboard, shown_run: Path) -> None:
    timeline = site.panel("timeline")
    assert timeline["counts"]["reject"] == 2
    assert timeline["counts"]["commit"] == read_history(shown_run).num_commits
    assert timeline["counts"]["shadow"] >= 2
    status, page, _ = site.ask("/api/runs/0/events?lanes=reject&count=1")
    assert status == 200
    assert page["more"]
    older = site.ask(f"/api/runs/0/events?lanes=reject&before={page['events'][0]['lsn']}")[1]
    assert len(older["events"]) == 1
    assert older["events"][0]["lsn"] < page["events"][0]["lsn"]
    assert "matches no domain; valid names: code, web, wiki" in older["events"][0]["text"]


def test_a_policy_that_asks_for_what_an_earlier_one_asked_for_is_a_rollback(marked_store: Path, tmp_path: Path) -> None:

    trainer = TrainerSide(tmp_path / "exp")
    for document in (
        {"kind": "static", "mixture": {"code": 1}},
        {"kind": "temperature", "temperature": 1, "why": "as before"},
    ):
        trainer.journal.append(accept(document, trainer.genesis))
    trainer.read()
    lanes = [(event.lane, event.lsn) for event in view_of(tmp_path / "exp").journal.events if event.lane != "run"]
    assert [lane for lane, _ in lanes] == ["proposal", "commit", "proposal", "rollback"]


def test_decisions_come_with_their_matrices_and_shares(site: Dashboard, shown_run: Path) -> None:
    aioli, odm = site.panel("policy")["policies"]
    assert (aioli["kind"], aioli["shadow"], odm["kind"], odm["shadow"]) == ("aioli", False, "odm", True)
    history = read_history(shown_run)
    decision = history.decisions[aioli["lsn"]][1]
    assert aioli["arms"] == ["code", "web", "wiki"]
    assert aioli["shares"][-1] == list(decision.shares)
    gains = decision.proposal["diagnostics"].get("gains")
    assert np.allclose(aioli["matrices"]["gains"][-1], gains, rtol=1e-3)


def test_weights_speed_and_figures(site: Dashboard) -> None:
    weighting, speed, figures = (
        site.panel("weighting"),
        site.panel("throughput"),
        site.panel("figures", 1),
    )
    assert weighting["in_force"].startswith("strategy linupper, r 0.4 (from step ")
    assert weighting["effective"]["mean"] == [0.8] * (NUM_STEPS // 5)
    assert weighting["histogram"][0] == [1, 2, 5, 3, 1]
    assert set(speed["tokens_per_second"]["mean"]) == {ROWS * 16 / 0.5}
    assert speed["waiting"][0] == 0.002
    assert figures["curves"]["train/rewards/margin"]["mean"][-1] == 1.2
    assert figures["curves"]["evaluation/divergence/kl"]["steps"] == [10, 20, 30]
    assert site.panel("summary", 1)["state"] == "complete"
    assert site.panel("throughput", 1)["peak_memory_bytes"] == 1 << 30


def test_a_commit_is_told_with_its_difference(site: Dashboard, shown_run: Path) -> None:
    history = read_history(shown_run)
    commit = history.commits[-1]
    detail = site.ask(f"/api/runs/0/commits/{commit.lsn}")[1]
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
    assert site.ask("/api/runs/0/commits/1")[0] == 400


def test_runs_are_compared(site: Dashboard) -> None:
    tree = site.ask("/api/compare")[1]
    assert [run["name"] for run in tree["runs"]] == ["live", "aligned"]
    assert tree["domains"] == ["code", "web", "wiki"]
    assert tree["runs"][1]["train"]["mean"][-1] == pytest.approx(0.4)
    assert "seed" in tree["different"]


def test_a_poll_costs_nothing_when_nothing_is_new(site: Dashboard) -> None:
    status, tree, headers = site.ask("/api/poll")
    assert status == 200
    assert site.ask("/api/poll", headers={"If-None-Match": headers["etag"]})[0] == 304
    tag = tree["runs"][0]["panels"]["losses"]
    assert site.ask("/api/runs/0/panels/losses", headers={"If-None-Match": tag})[0] == 304


# --- growing, torn and damaged files ---------------------------------------------------------------------------------


def test_a_growing_run_is_followed_and_equals_one_that_is_read_at_once(marked_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    live = LiveRun(
        run / "journal", TokenStore.open(marked_store), 60, {"kind": "temperature", "temperature": 2.0}, report_every=5
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


def test_a_run_that_cannot_be_followed_says_why_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is known that has this effect, so the fault is put in."""
    bad, good = (RunView(write_preference_run(tmp_path / name)) for name in ("bad", "good"))

    def fail() -> bool:
        raise OverflowError("Python int too large to convert to C long")

    monkeypatch.setattr(bad, "advance", fail)
    stopping = threading.Event()
    thread = threading.Thread(target=follow, args=([bad, good], stopping))
    thread.start()
    try:
        assert "too large" in wait_for(lambda: built(bad, "summary")["problem"])
        write_metrics(good.run_dir, 40, first_step=30)
        wait_for(lambda: built(good, "throughput")["steps"][-1:] == [40])
    finally:
        stopping.set()
        thread.join()


def test_what_a_resumed_run_does_again_counts_as_done_last(marked_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    policy = {"kind": "temperature", "temperature": 2.0}
    opened = TokenStore.open(marked_store)
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


def test_a_damaged_journal_is_named_and_what_came_before_stays(shown_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "journal").mkdir(parents=True)
    for path in sorted((shown_run / "journal").glob("*.json")):
        (copy / "journal" / path.name).write_bytes(path.read_bytes())
    broken = copy / "journal" / "00000020.json"
    broken.write_bytes(broken.read_bytes().replace(b'"time":', b'"time":1'))
    summary = built(view_of(copy), "summary")
    assert "00000020.json" in summary["problem"]
    assert summary["name"] == "copy"


def test_looking_at_a_run_changes_no_file_of_it(shown_run: Path) -> None:
    (shown_run / "journal" / ".1.abc@elsewhere.tmp").write_bytes(b"of a writer that may live")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in shown_run.rglob("*")}
    view = view_of(shown_run)
    for name in PANELS:
        built(view, name)
    Inspector(view).rows(3, "0/1", 0, 50)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in shown_run.rglob("*")} == before
    (shown_run / "journal" / ".1.abc@elsewhere.tmp").unlink()


# --- the command -----------------------------------------------------------------------------------------------------


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
    shown_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr("sys.argv", ["mixwright", "dashboard", str(shown_run), "--port", port])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 2
    assert f"--port: 127.0.0.1:{port} cannot be listened on" in capsys.readouterr().err


def test_a_hostile_reason_is_in_the_answers_as_text_alone(site: Dashboard) -> None:
    page = site.ask("/api/runs/0/events?lanes=reject,proposal,shadow,commit")[1]
    texts = [event["text"] for event in page["events"]]
    assert any(PWN in text for text in texts)
    assert not any(character in text for text in texts for character in "\x1b\u202e\u200f")
    assert HOSTILE.split(" ", 1)[0] in json.dumps(page, ensure_ascii=False).replace('\\"', '"')


def test_many_requests_at_once_are_answered_by_few_threads(site: Dashboard) -> None:
    server = psutil.Process(site.process.pid)
    before = server.num_threads()
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: site.ask("/api/compare")[0], range(200)))
    assert answers == [200] * 200
    assert server.num_threads() <= before + NUM_THREADS
