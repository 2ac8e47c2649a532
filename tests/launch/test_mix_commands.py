"""`mixwright mix` as a user types it, with Ray down: what it prints, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.entries import Cancel
from mixwright.data_mixing.journal import Journal
from mixwright.data_mixing.store import TokenStore
from mixwright.launch import cli
from tests.data_mixing.live_run import ControllerThread, LiveRun
from tests.data_mixing.run_cases import TrainerSide
from tests.data_mixing.test_rounds import history_of

Output = tuple[int, str, str]
Command = Callable[..., Output]

CODE = "kind: static\nmixture: {code: 3, wiki: 1}\nwhy: more code\n"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to type commands in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "code.yaml").write_text(CODE)
    return tmp_path


@pytest.fixture
def trainer(workplace: Path) -> TrainerSide:
    """The trainer's side of runs/exp, which has trained 30 steps and changed its mixture at step 20."""
    trainer = TrainerSide(Path("runs/exp"))
    document = {"kind": "static", "mixture": {"code": 1}, "author": "ann", "why": "[bold]anneal[/bold]"}
    trainer.commit(trainer.journal.append(accept(document, trainer.genesis)).lsn, 20)
    trainer.report(last_step=29)
    return trainer


@pytest.fixture
def mix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`mixwright mix ...` through the command's own main function: exit code, standard output, standard error."""

    def run(*arguments: str) -> Output:
        monkeypatch.setattr(sys, "argv", ["mixwright", "mix", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return run


def test_the_installed_command_has_the_documented_exit_codes(trainer: TrainerSide) -> None:
    def code(*arguments: str) -> tuple[int, str]:
        command = [str(Path(sys.executable).parent / "mixwright"), "mix", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    assert code("status") == (0, "")
    assert code("status", "--run", "runs/exq") == (2, "error: runs/exq: no such run folder; did you mean 'runs/exp'?\n")
    unavailable = "error: run 'exp' has no mixing service; start it with `mixwright mix up --run runs/exp`\n"
    assert code("submit", "code.yaml") == (3, unavailable)


def test_without_runs_every_command_says_so(workplace: Path, mix: Command) -> None:
    for arguments in (["status"], ["log"], ["forecast"], ["down"], ["up"], ["submit", "code.yaml"], ["cancel", "3"]):
        assert mix(*arguments) == (2, "", "error: there is no run under ./runs; name one with --run RUN_DIR\n")


def test_the_only_live_run_is_meant_and_several_are_listed(trainer: TrainerSide, mix: Command) -> None:
    ended = TrainerSide(Path("runs/done"))
    ended.end()
    assert "run exp: running" in mix("status")[1]
    TrainerSide(Path("runs/other"))
    assert mix("status") == (
        2, "", "error: 2 runs under ./runs are live; choose one with --run: runs/exp, runs/other\n"
    )  # fmt: skip
    assert "run done: complete" in mix("status", "--run", "runs/done")[1]


def test_a_run_that_is_the_only_one_is_meant_even_when_it_is_over(trainer: TrainerSide, mix: Command) -> None:
    trainer.end()
    assert "run exp: complete, step 1000 of 1000" in mix("status")[1]


def test_a_folder_without_a_journal_is_no_run(workplace: Path, mix: Command) -> None:
    (workplace / "runs").mkdir()
    assert mix("log", "--run", "runs") == (
        2,
        "",
        "error: runs: holds no run (it has no journal/); training starts one\n",
    )


def test_status_shows_step_policy_mixture_and_losses(trainer: TrainerSide, mix: Command) -> None:
    code, out, _ = mix("status")
    assert code == 0
    assert "run exp: running, step 30 of 1000, journal entry 6" in out
    assert "policy in force: entry 4: static, from step 20 by ann ([bold]anneal[/bold])" in out
    assert next(line.split("│")[1:6] for line in out.splitlines() if "code" in line and "│" in line) == [
        " code   ", " 100.00 % ", "       7,424 ", "   0.12 ", " 2.500 ",
    ]  # fmt: skip


def test_status_as_json_is_complete(trainer: TrainerSide, mix: Command) -> None:
    tree = json.loads(mix("status", "--json")[1])
    assert (tree["state"], tree["next_step"], tree["policy"]["lsn"], len(tree["domains"])) == ("running", 30, 4, 4)
    assert tree["service"]["state"] == "stopped"


def test_log_shows_who_did_what_and_why(trainer: TrainerSide, mix: Command) -> None:
    code, out, _ = mix("log")
    lines = [[cell.strip() for cell in line.split("│")[1:6]] for line in out.splitlines() if line.startswith("│")]
    assert code == 0
    assert [(line[0], line[2], line[4]) for line in lines] == [
        ("0", "GENESIS", "run exp: 1000 steps of 8 rows of 64 tokens, 4 domains, seed 7"),
        ("1", "LEASE", "trainer is leader (lease 0)"),
        ("2", "POLICY", "temperature, 1 segment(s)"),
        ("3", "COMMIT", "policy 2 from step 0 on"),
        ("4", "POLICY", "static, 1 segment(s) by ann ([bold]anneal[/bold])"),
        ("5", "COMMIT", "policy 4 from step 20 on"),
        ("6", "REPORT", "train steps 20 to 29: 2.5000 nats/token over 100 tokens"),
    ]
    entries = json.loads(mix("log", "--json", "--since", "5")[1])
    assert [(entry["lsn"], entry["type"]) for entry in entries] == [(5, "COMMIT"), (6, "REPORT")]


def test_log_verify_finds_a_changed_entry(trainer: TrainerSide, mix: Command) -> None:
    assert mix("log", "--verify")[:2] == (0, "runs/exp/journal: 7 entries are sound, 2 commits derive the same\n")
    path = Path("runs/exp/journal/00000004.json")
    path.write_bytes(path.read_bytes().replace(b'"ann"', b'"bob"'))
    code, out, err = mix("log", "--verify")
    assert (code, out) == (2, "")
    assert "00000004.json: content has hash" in err


def test_forecast_of_the_run_and_of_a_policy(trainer: TrainerSide, mix: Command) -> None:
    plain = json.loads(mix("forecast", "--json")[1])
    assert (plain["from_step"], plain["until_step"]) == (30, 1000)
    assert {d["name"]: d["proportion"] for d in plain["domains"]}["code"] == 1.0
    changed = json.loads(mix("forecast", "code.yaml", "--json")[1])
    # 8 steps of the old policy, then a quarter of the 962 others.
    assert {d["name"]: d["num_tokens"] for d in changed["domains"]}["wiki"] == 962 * 8 // 4 * 64
    assert "steps 30 to 99" in mix("forecast", "--until", "100")[1]
    assert mix("forecast", "--until", "30")[2] == "error: --until: expected a step from 31 to 1000, found 30\n"


def test_a_dry_run_shows_percentages_difference_and_exhaustion_and_submits_nothing(
    trainer: TrainerSide, mix: Command
) -> None:
    Path("capped.yaml").write_text(CODE + "caps: {code: {max_epochs: 2}}")
    code, out, err = mix("submit", "capped.yaml", "--dry-run")
    assert (code, err) == (0, "")
    cells = [[cell.strip() for cell in line.split("│")[1:5]] for line in out.splitlines() if line.startswith("│")]
    assert ["code", "100.00 %", "75.00 %", "-25.00"] in cells
    assert ["wiki", "0.00 %", "25.00 %", "+25.00"] in cells
    assert "mixture at step 38" in out
    assert "code reaches 2 epochs at step " in out
    assert "these domains get 0: web-a, web-b" in out
    assert trainer.types().count("POLICY") == 2
    tree = json.loads(mix("submit", "code.yaml", "--dry-run", "--json", "--at-step", "500")[1])
    assert (tree["step"], tree["mixture"][0]) == (500, {"name": "code", "before": 1.0, "after": 0.75})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: static\nmixture: {cod: 1}", "error: mixture.cod: no such domain; did you mean 'code'?\n"),
        ("kind: static\nmixture: {code: .nan}", "error: mixture.code: input should be a finite number (found nan)\n"),
        ("kind: [", "error: bad.yaml: not valid YAML: "),
        ("- 1", "error: bad.yaml: expected a mapping of keys at the top level, found list\n"),
    ],
)
def test_a_bad_policy_file_is_exit_2_and_one_line(trainer: TrainerSide, mix: Command, text: str, message: str) -> None:
    Path("bad.yaml").write_text(text)
    code, out, err = mix("submit", "bad.yaml", "--dry-run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(message)


def test_a_missing_policy_file_names_the_nearest(trainer: TrainerSide, mix: Command) -> None:
    assert mix("submit", "cod.yaml")[2] == "error: cod.yaml: no such file; did you mean 'code.yaml'?\n"


def test_options_override_the_document(trainer: TrainerSide, mix: Command) -> None:
    assert "at_step: step 5 has passed, the first open step is 30" in mix(
        "submit", "code.yaml", "--dry-run", "--at-step", "5"
    )[2]  # fmt: skip
    assert mix("submit", "code.yaml", "--shadow", "--wait")[2] == "error: --wait: a shadow policy is never committed\n"


def test_verbs_of_the_service_are_exit_3_without_one(trainer: TrainerSide, mix: Command) -> None:
    for arguments in (["submit", "code.yaml"], ["cancel", "4"], ["hold"], ["resume"], ["rollback", "1"]):
        code, out, err = mix(*arguments)
        assert (code, out) == (3, "")
        assert err.startswith("error: run 'exp' has no mixing service; start it with `mixwright mix up --run runs/exp`")
    assert mix("down") == (0, "run 'exp' has no mixing service\n", "")


def test_decisions_are_shown_recomputed_and_a_forged_one_is_exit_1(
    tiny_store: Path, workplace: Path, mix: Command
) -> None:
    assert mix("replay-policy", "--run", "runs/none")[0] == 2
    run = LiveRun(Path("runs/live/journal"), TokenStore.open(tiny_store), 40, {"kind": "odm", "round_steps": 10})
    with ControllerThread(run.folder) as thread:
        run.run()
        thread.call("pause", True, author="ann", why="look")
    decisions = run.entries("DECISION")
    code, out, _ = mix("replay-policy")
    assert (code, out) == (0, "".join(f"decision {entry.lsn}: the same\n" for entry in decisions))
    shown = mix("log")[1]
    assert f"policy {decisions[0].body.policy_lsn} at step 10: propose letters 33.33 %" in shown
    assert "decisions are held by ann (look)" in shown
    assert "entry 1 is no decision of run 'live'" in mix("replay-policy", "1")[2]
    forged = decisions[-1].body.model_copy(update={"shares": (0.5, 0.25, 0.25)})
    Journal(run.folder, "forger", after=history_of(run.folder)).append(forged)
    code, out, _ = mix("replay-policy")
    assert (code, out.count("differs")) == (1, 1)
    assert "shares: journaled (0.5, 0.25, 0.25), recomputed (" in out


def test_the_price_of_perturbing_is_told_before_it_is_paid(trainer: TrainerSide, mix: Command) -> None:
    Path("dear.yaml").write_text("kind: aioli\nvariant: paper\nsweeps: 2\nsweep_steps: 10\nround_steps: 100\n")
    assert "80% of the steps perturb the mixture in order to learn" in mix("submit", "dear.yaml", "--dry-run")[1]
    Path("fair.yaml").write_text("kind: aioli\nvariant: paper\nsweeps: 1\nsweep_steps: 4\nround_steps: 100\n")
    assert "perturb" not in mix("submit", "fair.yaml", "--dry-run")[1]


def test_a_service_that_cannot_attach_is_exit_3(trainer: TrainerSide, mix: Command) -> None:
    code, _, err = mix("up", "--address", "127.0.0.1:1")
    assert (code, err.count("\n")) == (3, 1)
    assert "no Ray at 127.0.0.1:1" in err
    code, _, err = mix("up", "--address", "ray://head:10001")
    assert "Ray address 'ray://head:10001': expected HOST:PORT" in err


def test_a_finished_run_needs_no_service(trainer: TrainerSide, mix: Command) -> None:
    trainer.end()
    assert mix("up")[2] == "error: runs/exp: the run is complete after step 1000; it takes no more policies\n"


def test_plan_show_prints_the_rows_of_a_step_in_order_for_any_rank(trainer: TrainerSide, mix: Command) -> None:
    whole = json.loads(mix("plan", "show", "--step", "25", "--json")[1])
    refs = trainer.history.plan().rows(25)
    names = [domain.name for domain in trainer.genesis.domains]
    assert whole["rows"] == [
        {"position": int(p), "domain": names[d], "epoch": int(e), "row": int(r)}
        for p, d, e, r in zip(refs.position_n, refs.domain_n, refs.epoch_n, refs.row_n, strict=True)
    ]
    halves = [json.loads(mix("plan", "show", "--step", "25", "--rank", rank, "--json")[1]) for rank in ("0/2", "1/2")]
    assert halves[0]["rows"] + halves[1]["rows"] == whole["rows"]
    assert {half["digest"] for half in halves} == {whole["digest"]} == {f"{trainer.history.plan().digest(25):016x}"}
    assert "6 more rows; see --limit" in mix("plan", "show", "--step", "25", "--limit", "2")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "--step", "1000"], "step 1000 is not in the run, which has steps 0 to 999"),
        (["show", "--step", "-1"], "step -1 is not in the run, which has steps 0 to 999"),
        (["show", "--step", "1", "--rank", "2/2"], "--rank: expected R/N with 0 <= R < N, e.g. 3/8, found '2/2'"),
        (["trace", "cod:1"], "cod:1: expected DOMAIN:ROW, found domain 'cod'; did you mean 'code'?"),
        (["trace", "code:1000"], "code:1000: domain 'code' has rows 0 to 999, found row '1000'"),
        (["trace", "code:x"], "code:x: domain 'code' has rows 0 to 999, found row 'x'"),
    ],
)
def test_wrong_plan_arguments_are_exit_2(
    trainer: TrainerSide, mix: Command, arguments: list[str], message: str
) -> None:
    assert mix("plan", *arguments) == (2, "", f"error: {message}\n")


def test_plan_trace_finds_the_step_that_plan_show_shows(trainer: TrainerSide, mix: Command) -> None:
    shown = json.loads(mix("plan", "show", "--step", "25", "--json")[1])["rows"][3]
    uses = json.loads(mix("plan", "trace", f"{shown['domain']}:{shown['row']}", "--until", "100", "--json")[1])
    assert {"step": 25, "position": 3, "epoch": shown["epoch"]} in uses


def test_waiting_for_a_commit_returns_its_effective_step(trainer: TrainerSide) -> None:
    from mixwright.launch.mix_submit import wait_for_commit

    lsn = trainer.journal.append(accept({"kind": "static", "mixture": {"wiki": 1}}, trainer.genesis)).lsn
    committing = threading.Timer(0.5, trainer.commit, (lsn, 44))
    committing.start()
    assert wait_for_commit(trainer.run_dir, lsn, timeout_s=20) == 44
    committing.join()


def test_waiting_ends_when_the_policy_is_withdrawn_the_run_ends_or_time_is_up(trainer: TrainerSide) -> None:
    from mixwright.data_mixing.errors import PolicyRejected, ServiceUnavailable
    from mixwright.launch.mix_submit import wait_for_commit

    lsn = trainer.journal.append(accept({"kind": "static", "mixture": {"wiki": 1}}, trainer.genesis)).lsn
    started = time.monotonic()
    with pytest.raises(ServiceUnavailable, match=r"not|no trainer committed it within 0\.3 s .*it stays pending"):
        wait_for_commit(trainer.run_dir, lsn, timeout_s=0.3)
    assert time.monotonic() - started < 3
    trainer.end()
    with pytest.raises(PolicyRejected, match="was not committed: the run is complete"):
        wait_for_commit(trainer.run_dir, lsn, timeout_s=5)
    trainer.journal.append(Cancel(policy_lsn=lsn))
    with pytest.raises(PolicyRejected, match=f"policy {lsn} was cancelled"):
        wait_for_commit(trainer.run_dir, lsn, timeout_s=5)
