"""What the dashboard costs on a large run: `python -m tests.benchmarks.bench_dashboard [--steps N] [--polls N]`.

A run of 100,000 steps, 50 domains and 2,000 commits is made first (a few minutes). Then, with a real server process and
a real Chromium: the time until everything is read, the first paint, each panel from its request until it is drawn, the
inspector and the preview; and the memory of server and page over an hour's polls of a growing run, done quickly.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from selenium import webdriver

from mixwright.launch.dashboard.panels import PANELS
from mixwright.launch.dashboard.run_view import RunView, encode
from mixwright.launch.dashboard.submission import Submission, preview
from tests.benchmarks.dashboard_run import LargeRun, Size
from tests.launch.dashboards import Dashboard, chromium, dashboard, set_look, wait_for

SHOWN = ("mixture", "losses", "domains", "timeline", "policy", "weights", "speed")
POLLS_AN_HOUR = 1800
GROWING = Size(num_steps=100_000, num_domains=50, num_commits=400, decide_every=100)
STEPS_BEFORE, STEPS_PER_POLL = 4_000, 2
"""A step a second: 3,600 in an hour, with 360 reports and 14 commits. Decisions are frequent because a history keeps
the reports that the next one needs, which would look like a slope."""

PAINT = """
const entry = performance.getEntriesByName('first-contentful-paint')[0];
return entry ? entry.startTime : null;
"""
BRING = """
const [id, done] = arguments;
(async () => {
  const page = window.mixwright.page;
  const [run, panel] = [page.runs[page.shown], page.panels.find((other) => other.id === id)];
  panel.section.scrollIntoView();
  await new Promise((resolve) => setTimeout(resolve, 50));
  run.known = {}; panel.drawn = null; page.timings[id] = null;
  const began = performance.now();
  await window.mixwright.bring(panel);
  await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
  done(performance.now() - began);
})();
"""
HEAP = "gc(); return performance.memory.usedJSHeapSize"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Size.num_steps)
    parser.add_argument("--commits", type=int, default=Size.num_commits)
    parser.add_argument("--domains", type=int, default=Size.num_domains)
    parser.add_argument("--rounds", type=int, default=9, help="0: only the memory over polls")
    parser.add_argument("--polls", type=int, default=POLLS_AN_HOUR)
    parser.add_argument("--interval", type=float, default=0.0, help="seconds between polls; 2 is what a page does")
    parser.add_argument("--run", type=Path, help="a run folder made before by this command, to measure again")
    arguments = parser.parse_args()
    size = Size(arguments.steps, arguments.domains, arguments.commits)
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="bench-dashboard-") as folder:
        if arguments.rounds:
            run_dir = arguments.run or Path(folder) / "large"
            make(console, run_dir, size)
            measure(console, run_dir, size, arguments.rounds)
        watch(console, Path(folder) / "growing", arguments.polls, arguments.interval)


def make(console: Console, run_dir: Path, size: Size) -> None:
    """The run, unless it is there."""
    if not run_dir.exists():
        console.print(
            f"making a run of {size.num_steps:,} steps, {size.num_domains} domains, {size.num_commits:,} commits"
        )
        LargeRun(run_dir, size).write(size.num_steps)


def measure(console: Console, run_dir: Path, size: Size, rounds: int) -> None:
    """Print the table of times."""
    title = f"{size.num_steps:,} steps, {size.num_domains} domains, {size.num_commits:,} commits"
    table = Table(title=title, title_justify="left")
    for column in ("what", "median ms", "worst ms", "limit ms", "of it building", "answer kB"):
        table.add_column(column, justify="left" if column == "what" else "right")
    view, cpu_s = read_here(run_dir)
    with chromium() as browser:
        began = time.perf_counter()
        with dashboard(run_dir) as started:
            serving_s = time.perf_counter() - began
            set_look(browser, "light", 1400, 1000)
            row(table, "first paint while the run is still being read", [first_paint(browser, started)], 1000)
            started.wait_until_read(timeout_s=600)
            reading_s = time.perf_counter() - began
            row(table, "first paint", [first_paint(browser, started) for _ in range(rounds)], 1000)
            browser.set_script_timeout(60)
            for panel in SHOWN:
                source = SOURCES.get(panel, panel)
                body = encode(PANELS[source](view))
                built = timed(lambda source=source: encode(PANELS[source](view)), rounds)  # type: ignore[misc]
                # The server keeps what it built until something is new: both are added, as after every report.
                whole = [asked + build for asked, build in zip(brought(browser, panel, rounds), built, strict=True)]
                row(table, f"panel {panel}: built, sent, drawn", whole, 300, statistics.median(built), len(body) / 1000)
            ask(table, started, rounds)
            told = memory_bytes(started.process.pid) / 2**20
    row(
        table, "preview of a policy (an action, no panel)", timed(lambda: preview(view, Submission(document=POLICY)), 1)
    )
    console.print(table)
    console.print(
        f"server answers after {serving_s:.1f} s, everything is read after {reading_s:.1f} s ({cpu_s:.1f} s of CPU); "
        f"server's memory {told:.0f} MiB"
    )


def read_here(run_dir: Path) -> tuple[RunView, float]:
    """The run read in this process, and the CPU seconds that this took."""
    began, view = time.process_time(), RunView(run_dir)
    while view.advance():
        pass
    return view, time.process_time() - began


SOURCES = {"domains": "summary", "weights": "weighting", "speed": "throughput"}
"""What the server calls a panel, where the page has another word."""
POLICY = "kind: static\nmixture: {'web-*': 2, 'code-*': 1}\n"


def row(
    table: Table,
    what: str,
    milliseconds: Sequence[float],
    limit: int | None = None,
    build: float | None = None,
    kilobytes: float | None = None,
) -> None:
    numbers = (statistics.median(milliseconds), max(milliseconds), limit, build, kilobytes)
    table.add_row(what, *("" if number is None else f"{number:.0f}" for number in numbers))


def first_paint(browser: webdriver.Chrome, started: Dashboard) -> float:
    """Milliseconds from the request of the page to its first content."""
    browser.get("about:blank")
    browser.get(started.url)
    return float(wait_for(lambda: browser.execute_script(PAINT)))


def brought(browser: webdriver.Chrome, panel: str, rounds: int) -> list[float]:
    wait_for(lambda: browser.execute_script("return window.mixwright?.page.panels.length > 0"))
    return [float(browser.execute_async_script(BRING, panel)) for _ in range(rounds)]


def ask(table: Table, started: Dashboard, rounds: int) -> None:
    """Requests that a person makes."""
    last = started.panel("summary")["next_step"] - 1
    names = [domain["name"] for domain in started.panel("summary")["domains"]]
    requests = {
        "rows of a step": lambda i: f"/api/runs/0/rows?step={last * (i + 1) // (rounds + 1)}&rank={i}/64",
        "steps of a row": lambda i: f"/api/runs/0/uses?row={names[i % len(names)]}:{1000 + i}",
        "a commit's difference": lambda i: f"/api/runs/0/commits/{started.panel('mixture')['commits'][-1 - 7 * i][1]}",
        "a page of events": lambda i: f"/api/runs/0/events?count=60&before={10_000 - i}",
        "poll, nothing new": lambda i: "/api/poll",
    }
    for what, path in requests.items():
        paths = [path(i) for i in range(rounds)]
        row(table, what, [timed(lambda path=path: expect(started, path), 1)[0] for path in paths], 300)  # type: ignore[misc]


def expect(started: Dashboard, path: str) -> None:
    status, tree, _ = started.ask(path)
    assert status == 200, tree


def timed(act: Callable[[], object], rounds: int) -> list[float]:
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        act()
        found.append(1000 * (time.perf_counter() - began))
    return found


def watch(console: Console, run_dir: Path, polls: int, interval_s: float) -> None:
    """An hour's polls of a run that grows all the time, with a page that draws what is new. Prints the slopes."""
    run = LargeRun(run_dir, GROWING)
    run.write(STEPS_BEFORE)
    server, heap = [], []
    with dashboard(run_dir) as started, chromium() as browser:
        set_look(browser, "light", 1400, 3000)
        browser.set_script_timeout(60)
        browser.get(started.url)
        wait_for(lambda: browser.execute_script("return window.mixwright?.page.polls > 1"))
        for poll in range(-polls // 2, polls):  # half an hour to warm up: caches, pools of memory
            run.write(run.step + STEPS_PER_POLL)
            browser.execute_async_script("window.mixwright.poll().then(arguments[0])")
            time.sleep(interval_s)
            if poll >= 0 and poll % max(polls // 60, 1) == 0:
                server.append(memory_bytes(started.process.pid) / 2**20)
                heap.append(browser.execute_script(HEAP) / 2**20)
    grown = f"a run that grew from {STEPS_BEFORE:,} to {run.step:,} steps"
    console.print(f"{polls:,} polls (an hour has {POLLS_AN_HOUR:,}) of {grown}:")
    for what, samples in (("server", server), ("page", heap)):
        trend = f"slope {slope(samples, polls):+.2f} MiB an hour"
        console.print(f"  {what}: {samples[0]:.1f} to {samples[-1]:.1f} MiB, {trend}")


def slope(samples: Sequence[float], polls: int) -> float:
    """MiB an hour, by least squares."""
    hours = np.arange(len(samples)) * (polls / len(samples)) / POLLS_AN_HOUR
    return float(np.polyfit(hours, np.array(samples), 1)[0])


def memory_bytes(pid: int) -> int:
    """Resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
