"""A user's policy in a process of its own: JSON in, JSON out, with limits on time and memory.

`ask` is the parent's side. The child is this file run as a module; it imports nothing of ours. The limits keep a
mistake from harming the controller; they are no protection against malice, which the allow-list is for.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

ALLOW_LIST = "MIXWRIGHT_USER_POLICIES"
"""Environment variable of the controller's host: comma-separated `module:function`, with * and ? as wildcards."""

MAX_ANSWER_CHARACTERS = 4 << 20
_MIB = 1 << 20


class UserCodeError(Exception):
    """What went wrong in a user's policy, in one line."""


def is_allowed(path: str) -> bool:
    """Whether this host runs the code that `path` names."""
    patterns = (pattern.strip() for pattern in os.environ.get(ALLOW_LIST, "").split(","))
    return any(pattern and fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def ask(path: str, arguments: Mapping[str, Any], timeout_s: float, memory_mib: int) -> Any:
    """What the function at `path` (`module:function`) returns for keyword `arguments`; plain data both ways.

    Raises UserCodeError when it raises, hangs longer than `timeout_s`, needs more memory or answers no JSON.
    """
    request = {"path": path, "arguments": arguments, "memory_mib": memory_mib, "timeout_s": timeout_s}
    single = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    child = subprocess.Popen(
        [sys.executable, "-m", "mixwright.data_mixing.sandbox"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **single, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        output, log = child.communicate(json.dumps(request), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise UserCodeError(f"{path} gave no answer within {timeout_s:g} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return _answer(path, child.returncode, output, log)


def _answer(path: str, code: int, output: str, log: str) -> Any:
    try:
        answer = json.loads(output[:MAX_ANSWER_CHARACTERS])
    except (ValueError, RecursionError):
        last = next((line for line in reversed(log.splitlines()) if line.strip()), "it said nothing")
        raise UserCodeError(f"{path} ended with code {code}: {last[:300]}") from None
    if not isinstance(answer, dict) or not answer.keys() & {"ok", "error"}:
        raise UserCodeError(f"{path} wrote something else where its answer belongs: {output[:300]!r}")
    if "error" in answer:
        raise UserCodeError(f"{path}: {answer['error']}")
    return answer["ok"]


def main() -> None:
    """Child: limit this process, call the function, print the answer."""
    # What the user's code prints must not mix with the answer.
    answer_to = os.dup(1)
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    _limit(request["memory_mib"], request["timeout_s"])
    try:
        module, _, name = request["path"].partition(":")
        result = getattr(importlib.import_module(module), name)(**request["arguments"])
        text = json.dumps({"ok": result}, allow_nan=False)
    except MemoryError:
        text = json.dumps({"error": f"needs more than {request['memory_mib']} MiB"})
    except Exception as error:  # whatever users' code raises becomes one line
        text = json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]})
    with os.fdopen(answer_to, "w") as output:
        output.write(text)
    os.killpg(0, signal.SIGKILL)  # this process and all that the code has started; they hold the parent's pipes


def _limit(memory_mib: int, timeout_s: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib * _MIB, memory_mib * _MIB))
    seconds = int(timeout_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
