"""What the dashboard's server lets nobody do: foreign pages, wrong tokens, paths, oversized and senseless requests."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pytest

from mixwright.data_mixing.journal import Journal
from mixwright.data_mixing.service import start_service, stop_service
from mixwright.data_mixing.store import TokenStore
from mixwright.data_mixing.tokenizer import load_tokenizer
from mixwright.launch import cli
from mixwright.launch.dashboard.guard import MAX_BODY_BYTES
from mixwright.launch.dashboard.inspector import Inspector
from mixwright.launch.dashboard.panels import PANELS
from mixwright.launch.dashboard.run_view import shown
from mixwright.launch.dashboard.submission import Submission, preview
from mixwright.pretrain.row_log import read_row_log, row_log_folder
from mixwright.pretrain.rundir import read_history
from tests.data_mixing.live_run import ROWS, LiveRun
from tests.data_mixing.run_cases import TrainerSide
from tests.launch.dashboard_runs import AIOLI, NUM_STEPS, PWN, view_of
from tests.launch.dashboards import Dashboard, dashboard

DOCUMENT = "kind: static\nmixture: {code: 3, wiki: 1}\n"


# --- the inspector ---------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_plan_with_their_text_loss_and_weight(
    site: Dashboard, shown_run: Path, marked_store: Path
) -> None:
    status, found, _ = site.ask("/api/runs/0/rows?step=37&rank=1/2&characters=20000")
    assert status == 200, found
    refs = read_history(shown_run).plan().rows(37, range(6, 12))
    opened = TokenStore.open(marked_store)
    decode = load_tokenizer(opened.tokenizer_folder).decode
    names = [domain.name for domain in read_history(shown_run).genesis.domains]
    log = read_row_log(row_log_folder(shown_run))
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
    assert "\\u202e" in "".join(row["text"] for row in site.ask("/api/runs/0/rows?step=1&characters=9999")[1]["rows"])


def test_the_steps_of_a_row_are_all_steps_that_read_it(site: Dashboard, shown_run: Path) -> None:
    history = read_history(shown_run)
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
    found = site.ask(f"/api/runs/0/uses?row={names[domain]}:{row}")[1]
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
    site: Dashboard, query: str, says: str
) -> None:
    status, tree, _ = site.ask(f"/api/runs/0/{query}")
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
def test_only_the_pages_own_files_are_served(site: Dashboard, path: str) -> None:
    address = urlsplit(site.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    connection.request("GET", path)  # urllib would tidy the path
    answer = connection.getresponse()
    assert answer.status == 404
    assert b"import" not in answer.read()


def test_a_store_that_is_gone_costs_the_texts_and_nothing_else(shown_run: Path, tmp_path: Path) -> None:
    view = view_of(shown_run)
    inspector = Inspector(view)
    text = (shown_run / "config.yaml").read_text()
    try:
        (shown_run / "config.yaml").write_text(text.replace("/store", "/elsewhere"))
        found = inspector.rows(3, "0/1", 0, 50)
    finally:
        (shown_run / "config.yaml").write_text(text)
    assert "elsewhere" in found["text_problem"]
    assert [row["text"] for row in found["rows"]] == [None] * ROWS
    assert found["rows"][0]["weight"] == 0.0


# --- who may ask -----------------------------------------------------------------------------------------------------


def test_every_answer_fences_the_page_in(site: Dashboard) -> None:
    for path in ("/", "/static/main.js", "/api/poll", "/nothing"):
        headers = {name.lower(): value for name, value in site.ask(path)[2].items()}
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    page = site.ask("/")[1].decode()
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
def test_a_host_name_that_is_not_this_machines_is_refused(site: Dashboard, host: str, status: int) -> None:
    assert site.ask("/api/poll", headers={"Host": host})[0] == status


def guarded(site: Dashboard, **changes: str | None) -> dict[str, str]:
    """Headers of a request that is let in, with changes (None: left out)."""
    headers: dict[str, str | None] = {
        "Content-Type": "application/json", "Authorization": f"Bearer {site.token}", "Origin": site.url.rstrip("/"),
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
    site: Dashboard, verb: str, changes: dict[str, str | None], status: int, says: str
) -> None:
    found, tree, _ = site.ask(f"/api/runs/0/{verb}", {"document": DOCUMENT}, guarded(site, **changes))
    assert (found, says in tree["error"]) == (status, True), tree


def test_a_token_in_the_url_counts_for_nothing(site: Dashboard) -> None:
    path = f"/api/runs/0/preview?token={site.token}&authorization=Bearer%20{site.token}"
    assert site.ask(path, {"document": DOCUMENT}, guarded(site, Authorization=None))[0] == 401


def test_an_oversized_request_is_refused_announced_or_not(site: Dashboard) -> None:
    large = json.dumps({"document": "x" * MAX_BODY_BYTES}).encode()
    assert site.ask("/api/runs/0/submit", headers=guarded(site), raw=large)[0] == 413
    address = urlsplit(site.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=30) as raw:
        head = "".join(f"{name}: {value}\r\n" for name, value in guarded(site).items())
        raw.sendall(
            f"POST /api/runs/0/submit HTTP/1.1\r\nHost: localhost\r\n{head}".replace(
                site.url.rstrip("/"), "http://localhost"
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
    (b'{"document": {"kind": "static", "mixture": {"code": NaN}}}', "NaN is no JSON"),
    (b'{"document": {"kind": "static", "mixture": {"code": 1, "code": 2}}}', "key 'code' occurs twice"),
    (b"[]", "expected an object"),
    (b"{}", "document: required key is missing"),
    (b'{"document": "kind: static", "token": "x"}', "token: unknown key"),
    (b'{"document": "kind: [}"}', "not valid YAML"),
    (b'{"document": "kind: static\\nmixture: {coed: 1}"}', "did you mean 'code'?"),
    (b'{"document": "!!python/object/apply:os.system [id]"}', "not valid YAML"),
    (b'{"document": "kind: ../../x"}', "there is no policy of kind"),
]


@pytest.mark.parametrize(("body", "says"), SENSELESS)
def test_a_document_that_makes_no_sense_is_refused_with_one_line(site: Dashboard, body: bytes, says: str) -> None:
    status, tree, _ = site.ask("/api/runs/0/preview", headers=guarded(site), raw=body)
    assert (status, says in tree["error"]) == (400, True), tree


def test_a_preview_is_that_of_the_command_line_and_writes_nothing(
    site: Dashboard,
    marked_store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    LiveRun(run / "journal", TokenStore.open(marked_store), 60, {"kind": "temperature", "temperature": 2.0}).run(
        end_step=30
    )
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
    status, tree, _ = site.ask("/api/runs/0/preview", late, guarded(site))
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


def test_submitting_needs_the_runs_own_service(site: Dashboard) -> None:
    status, tree, _ = site.ask("/api/runs/0/submit", {"document": DOCUMENT}, guarded(site))
    assert status == 503
    assert "has no mixing service; start it with `mixwright mix up" in tree["error"]


def test_without_allow_submit_nobody_may_submit(marked_store: Path, tmp_path: Path) -> None:
    live = LiveRun(tmp_path / "run" / "journal", TokenStore.open(marked_store), 60, AIOLI)
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
