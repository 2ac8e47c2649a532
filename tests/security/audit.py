"""`make security`: bandit over our code, which must find nothing, and pip-audit over the pinned versions.

A known vulnerability of a pinned version fails it. Where the advisory service cannot be reached, or knows a package by
no such name, it says so and passes: `python -m tests.security.audit --strict` does not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ROOMS = ("kernels", "data_mixing", "pretrain", "launch")
TIMEOUT_S = 300.0


def bandit() -> int:
    """Number of the exit code; 0 when there is no finding."""
    command = [str(BIN / "bandit"), "--quiet", "--configfile", "pyproject.toml", "--recursive", *ROOMS]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    # Of a `nosec` on a statement of several lines bandit says for each other line that it was not needed there.
    print("".join(line for line in done.stderr.splitlines(True) if "nosec encountered" not in line), end="")
    return done.returncode


def pip_audit(strict: bool) -> int:
    """1 for a known vulnerability, or, when `strict`, for a version that could not be looked up."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [str(BIN / "pip-audit"), "--requirement", "constraints.txt", "--no-deps", "--disable-pip"]
        command += ["--progress-spinner", "off", "--timeout", "10", "--format", "json", "--output", str(report)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            told = done.stderr.strip().splitlines()
        except subprocess.TimeoutExpired:
            told = [f"no answer within {TIMEOUT_S:g} s"]
        text = report.read_text() if report.is_file() else ""
    return judge(text, told[-1] if told else "", strict)


def judge(report: str, message: str, strict: bool) -> int:
    """What a report (JSON, or empty when there is none) comes to; prints it."""
    packages = json.loads(report)["dependencies"] if report else []
    known = [(package, finding) for package in packages for finding in package.get("vulns", ())]
    for package, finding in known:
        fixed = ", ".join(finding["fix_versions"]) or "none yet"
        print(f"{package['name']} {package['version']}: {finding['id']}; fixed in: {fixed}")
    unknown = sum("skip_reason" in package for package in packages)
    if not packages:
        print(f"pip-audit: notice: nothing was looked up: {message}")
    elif unknown:
        print(f"pip-audit: notice: {unknown} of {len(packages)} versions could not be looked up")
    if not known:
        print(f"pip-audit: no known vulnerability in {len(packages) - unknown} versions")
    return int(bool(known) or (strict and (not packages or unknown > 0)))


def main() -> int:
    found, vulnerable = bandit(), pip_audit("--strict" in sys.argv[1:])
    print(f"bandit: {'no finding' if found == 0 else 'see above'}")
    return found or vulnerable


if __name__ == "__main__":
    sys.exit(main())
