"""A dashboard as a user starts it, and a real headless Chromium to look at it with."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NO_BROWSER = "no chromium and chromedriver: apt-get install -y chromium chromium-driver"
PATIENCE_S = 60.0

QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--js-flags=--expose-gc", "--enable-precise-memory-info",
)  # fmt: skip
"""Without the flags against background traffic Chromium's look-ups of its maker's hosts are refused, many at a time."""


@dataclass(frozen=True)
class Dashboard:
    """A running `mixwright dashboard`."""

    url: str
    token: str | None
    process: subprocess.Popen[str]

    def ask(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, raw: bytes | None = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, JSON and headers of a GET, or of a POST when there is a body."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, data, dict(headers or {}))
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return answer.status, _tree(answer.read()), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, _tree(error.read()), dict(error.headers)

    def panel(self, name: str, run: int = 0) -> Any:
        status, tree, _ = self.ask(f"/api/runs/{run}/panels/{name}")
        assert status == 200, tree
        return tree

    def wait_until_read(self, timeout_s: float = PATIENCE_S) -> None:
        """Until everything that the runs' files hold is taken in."""
        runs = range(len(self.ask("/api/poll")[1]["runs"]))
        wait_for(lambda: not any(self.panel("summary", run)["reading"] for run in runs), timeout_s)


def _tree(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content


def wait_for(is_so: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """What `is_so` returns once it is true; a machine that is busy is given time."""
    deadline = time.monotonic() + timeout_s
    while not (found := is_so()):
        assert time.monotonic() < deadline, f"not so within {timeout_s:g} s"
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def dashboard(*arguments: str | Path) -> Iterator[Dashboard]:
    """`mixwright dashboard ARGUMENTS` on a free port, until the block ends."""
    command = [
        str(Path(sys.executable).parent / "mixwright"),
        "dashboard",
        *map(str, arguments),
        "--port",
        "0",
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    told = json.loads(line)
    try:
        yield Dashboard(told["url"], told["token"], process)
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)


@contextlib.contextmanager
def chromium(width: int = 1400, height: int = 1000) -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile."""
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for argument in (*QUIET, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(argument)
        browser = webdriver.Chrome(options, Service(str(CHROMEDRIVER)))
        try:
            yield browser
        finally:
            browser.quit()


def set_look(browser: webdriver.Chrome, scheme: str, width: int, height: int) -> None:
    """The system's colour scheme and the size of the window's inside."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
