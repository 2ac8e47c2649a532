"""Pictures of the dashboard for the documentation: `python -m tests.benchmarks.dashboard_screenshots [RUN_DIR]`.

RUN_DIR is a real run (default: runs/dashboard-demo, which `python -m tests.benchmarks.dashboard_real_run` makes).
Writes docs/images/dashboard-{light,dark,narrow}.png, below 400 kB each.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image
from selenium import webdriver

from tests.launch.dashboards import Dashboard, chromium, dashboard, set_look, wait_for

IMAGES = Path(__file__).parents[2] / "docs" / "images"
MAX_BYTES = 400_000
PICTURES = {"light": ("light", 1400, 1330), "dark": ("dark", 1400, 1330), "narrow": ("light", 400, 1500)}
"""Colour scheme, width, height."""

ALL_DRAWN = "return [...document.querySelectorAll('section[data-drawn]')].length"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/dashboard-demo"))
    run_dir = parser.parse_args().run
    IMAGES.mkdir(parents=True, exist_ok=True)
    with dashboard(run_dir) as started, chromium() as browser:
        started.wait_until_read()
        for name in PICTURES:
            path = IMAGES / f"dashboard-{name}.png"
            path.write_bytes(picture(browser, started, name))
            print(f"{path}: {path.stat().st_size:,} bytes")


def picture(browser: webdriver.Chrome, started: Dashboard, name: str) -> bytes:
    """A picture as PNG with 256 colours, of which charts have fewer."""
    scheme, width, height = PICTURES[name]
    set_look(browser, scheme, width, height)
    browser.get(started.url)
    wait_for(lambda: browser.execute_script(ALL_DRAWN) >= 4)
    wait_for(lambda: browser.execute_script("return window.mixwright.page.polls > 1"))
    image = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    file = io.BytesIO()
    image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    assert len(file.getvalue()) <= MAX_BYTES, f"{name}: {len(file.getvalue()):,} bytes"
    return file.getvalue()


if __name__ == "__main__":
    main()
