"""Policies that users write: their own code in a process of its own, that may do anything wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from mixwright.data_mixing.acceptance import accept
from mixwright.data_mixing.errors import PolicyRejected
from mixwright.data_mixing.online import Window
from mixwright.data_mixing.policy import parse
from mixwright.data_mixing.rounds import Round
from mixwright.data_mixing.sandbox import ALLOW_LIST, UserCodeError, ask, is_allowed
from mixwright.data_mixing.store import TokenStore
from tests.data_mixing.live_run import ControllerThread, LiveRun
from tests.data_mixing.run_cases import genesis

CODE = """
import time

def favour(params, window, state):
    print("chatter")
    shares = [1.0] * len(window["arms"])
    shares[window["arms"].index(params["arm"])] = params["times"]
    return {"shares": shares, "state": {"calls": state.get("calls", 0) + 1}}

def raises(params, window, state):
    raise KeyError("no such thing\\nhere")

def hangs(params, window, state):
    time.sleep(60)

def hoards(params, window, state):
    return {"shares": [0.0] * (1 << 28)}

def answers_nan(params, window, state):
    return {"shares": [float("nan")] * len(window["arms"])}

def answers_text(params, window, state):
    return {"shares": "all"}

def dies(params, window, state):
    import os
    os._exit(3)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The code above as a module that this host allows."""
    (tmp_path / "lab_policies.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(ALLOW_LIST, "other:thing, lab_policies:*")
    return "lab_policies"


def document(module: str, function: str, **more: Any) -> dict[str, Any]:
    return {"kind": "user", "path": f"{module}:{function}", "round_steps": 10, **more}


def test_its_shares_are_read_and_its_state_comes_back(module: str, tiny_store: Path, tmp_path: Path) -> None:
    store = TokenStore.open(tiny_store)
    policy = document(module, "favour", params={"arm": "letters", "times": 4}, guard={"max_l1_change": 2})
    run = LiveRun(tmp_path / "run", store, 40, policy)
    with ControllerThread(tmp_path / "run"):
        run.run()
    made = [entry.body for entry in run.entries("DECISION")]
    assert [decision.proposal["state"] for decision in made] == [{"calls": 1}, {"calls": 2}, {"calls": 3}]
    arms = made[0].window["arms"]
    expected = [4 / 6 if arm == "letters" else 1 / 6 for arm in arms]
    assert made[-1].shares == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("raises", "lab_policies:raises: KeyError: 'no such thing\\nhere'"),
        ("hangs", "lab_policies:hangs gave no answer within 1 s"),
        ("hoards", "lab_policies:hoards: needs more than 256 MiB"),
        ("answers_nan", "lab_policies:answers_nan: ValueError: Out of range float values are not JSON compliant"),
        ("answers_text", "lab_policies:answers_text: shares: input should be a valid tuple"),
        ("dies", "lab_policies:dies ended with code 3: it said nothing"),
        ("is_missing", "lab_policies:is_missing: AttributeError: module 'lab_policies' has no attribute 'is_missing'"),
    ],
)
def test_whatever_goes_wrong_the_mixture_is_held_and_the_reason_kept(
    module: str, function: str, reason: str, tmp_path: Path
) -> None:
    run = genesis()
    policy, kind = parse(
        document(module, function, memory_mib=256, guard={"timeout_s": 1 if function == "hangs" else 20})
    )
    round_ = Round.of(kind, policy, run)  # type: ignore[arg-type]
    arms = round_.arms
    window = {
        "step": 10, "decision": 0, "arms": arms.names, "shares": arms.initial_K, "rows_available": arms.rows_K,
        "num_steps": 100, "tokens_per_row": 8,
        "intervals": [{
            "first_step": 0, "last_step": 9, "rows": [1] * 4, "before": [3.0] * 4, "after": [2.0] * 4,
            "train_loss": [2.5] * 4, "train_tokens": [8] * 4,
        }],
    }  # fmt: skip
    began = time.monotonic()
    decided = round_.decide(Window.model_validate(window), {"kept": 1})
    assert time.monotonic() - began < 15
    assert decided.action == "hold"
    assert reason in decided.reason
    assert decided.shares == pytest.approx(arms.initial_K)
    assert decided.proposal.state == {"kept": 1}


def test_code_that_the_host_does_not_allow_is_refused(module: str) -> None:
    with pytest.raises(PolicyRejected, match="path: 'os:system' is not on this host's allow-list"):
        accept(document("os", "system"), genesis())
    with pytest.raises(PolicyRejected, match="path"):
        accept({"kind": "user", "path": "lab_policies.favour; import os"}, genesis())
    assert is_allowed("lab_policies:favour")
    assert not is_allowed("lab_policies2:favour")


def test_without_an_allow_list_nothing_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOW_LIST, raising=False)
    assert not is_allowed("lab_policies:favour")
    monkeypatch.setenv(ALLOW_LIST, "")
    assert not is_allowed("")


def test_a_child_of_the_users_code_does_not_survive_it(module: str, tmp_path: Path) -> None:
    (tmp_path / "lab_children.py").write_text(
        "import subprocess\n\ndef spawn():\n    return subprocess.Popen(['sleep', '600']).pid\n"
    )
    pid = ask("lab_children:spawn", {}, 20, 512)
    time.sleep(0.2)
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    with pytest.raises(UserCodeError):
        ask("lab_children:missing", {}, 20, 512)
