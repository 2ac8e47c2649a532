"""The dashboard's page in a real Chromium: every panel draws, hover and inspector work, no foreign script runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium")

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from mixwright.data_mixing.store import TokenStore
from tests.data_mixing.live_run import LiveRun
from tests.launch.dashboard_runs import PWN, write_metrics, write_preference_run, write_run
from tests.launch.dashboards import (
    CHROMEDRIVER,
    CHROMIUM,
    NO_BROWSER,
    Dashboard,
    chromium,
    dashboard,
    set_look,
    wait_for,
)

pytestmark = [pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason=NO_BROWSER), pytest.mark.slow]

PANELS = ["mixture", "losses", "domains", "timeline", "policy", "weights", "speed"]
WITH_CANVAS = ["mixture", "losses", "timeline", "policy", "weights", "speed"]

COLOURS_DRAWN = """
const counts = [...document.querySelectorAll(arguments[0] + ' canvas')].map((canvas) => {
  if (!canvas.width || !canvas.height) return 0;
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const seen = new Set();
  for (let i = 0; i < pixels.length; i += 4) {
    if (pixels[i + 3]) seen.add((pixels[i] << 16) | (pixels[i + 1] << 8) | pixels[i + 2]);
  }
  return seen.size;
});
return counts;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, marked_store: Path) -> Iterator[Dashboard]:
    """A run with everything, a shorter one and a preference run."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(folder, marked_store),
        write_run(folder, marked_store, "other", 60),
        write_preference_run(folder / "aligned"),
    ]
    with dashboard(*runs, "--allow-submit") as started:
        started.wait_until_read()
        yield started


@pytest.fixture
def page(browser: webdriver.Chrome, server: Dashboard) -> webdriver.Chrome:
    """The first run, wide and light, all panels drawn."""
    set_look(browser, "light", 1400, 3200)
    return opened(browser, server.url, PANELS)


def opened(browser: webdriver.Chrome, url: str, panels: list[str]) -> webdriver.Chrome:
    browser.get_log("browser")
    browser.get(url)
    browser.execute_script("localStorage.clear(); delete document.documentElement.dataset.theme")
    wait_for(lambda: drawn(browser) >= set(panels))
    return browser


def drawn(browser: webdriver.Chrome) -> set[str]:
    return set(browser.execute_script("return [...document.querySelectorAll('section[data-drawn]')].map((s) => s.id)"))


def find(browser: webdriver.Chrome, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def text_of(browser: webdriver.Chrome, selector: str) -> str:
    text: str = browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)
    return text


def complaints(browser: webdriver.Chrome) -> list[str]:
    """What the browser logged: errors, and what the content policy blocked."""
    return [entry["message"] for entry in browser.get_log("browser") if "favicon" not in entry["message"]]


def was_fooled(browser: webdriver.Chrome) -> Any:
    return browser.execute_script("return window.pwned ?? null")


def hover(browser: webdriver.Chrome, selector: str, x: float, y: float) -> str:
    """What the tip says with the pointer at a part of the element's width and height."""
    element = find(browser, selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    size = element.size
    offset = (int((x - 0.5) * size["width"]), int((y - 0.5) * size["height"]))
    ActionChains(browser).move_to_element_with_offset(element, *offset).perform()
    return str(wait_for(lambda: not find(browser, "#tip").get_property("hidden") and text_of(browser, "#tip")))


# --- panels ----------------------------------------------------------------------------------------------------


def test_every_panel_draws_and_the_browser_has_no_complaint(page: webdriver.Chrome) -> None:
    for panel in WITH_CANVAS:
        colours = page.execute_script(COLOURS_DRAWN, f"#{panel}")
        assert colours, panel
        assert min(colours) > 3, (panel, colours)
    assert text_of(page, "#state") == "running"
    assert "static" in text_of(page, "#glance")
    assert [row.split()[0] for row in text_rows(page, "#domains tbody tr")] == ["code", "web", "wiki"]
    assert complaints(page) == []


def text_rows(browser: webdriver.Chrome, selector: str) -> list[str]:
    """All rows at one moment: the page replaces them while it is looked at."""
    texts = (
        "return Array.from(document.querySelectorAll(arguments[0]), row => row.innerText.replace(/\\s+/g, ' ').trim())"
    )
    return list(browser.execute_script(texts, selector))


def test_a_canvas_that_nothing_was_drawn_on_would_be_found_out(page: webdriver.Chrome) -> None:
    page.execute_script(
        "const c = document.createElement('canvas'); c.id = 'blank'; document.querySelector('#mixture').append(c)"
    )
    assert min(page.execute_script(COLOURS_DRAWN, "#mixture")) == 0


def test_hovering_tells_shares_losses_commits_and_cells(page: webdriver.Chrome) -> None:
    shares = hover(page, "#mixture .u-over", 0.31, 0.5)
    assert "up to step" in shares
    assert "asked" in shares
    assert "nats" in hover(page, "#losses .u-over", 0.5, 0.5)
    assert "tokens per second" in hover(page, "#speed .u-over", 0.5, 0.5)
    assert "loss of" in hover(page, "#policy .chart canvas", 0.6, 0.3)
    assert "of samples weigh" in hover(page, "#weights .two > div:last-child canvas", 0.6, 0.3)
    last = page.execute_script(
        "const {plot, marks} = window.mixwright.page.panels[0].view.chart;"
        "return plot.valToPos(marks.at(-1).step, 'x') / plot.over.clientWidth"
    )
    assert hover(page, "#mixture .u-over", last, 0.4).startswith("policy ")
    tip = wait_for(lambda: "before" in text_of(page, "#tip") and text_of(page, "#tip"))
    assert "by ann" in tip
    assert PWN in tip
    assert "code" in tip
    assert was_fooled(page) is None


def test_everything_is_reachable_by_keyboard(page: webdriver.Chrome) -> None:
    page.execute_script("document.querySelector('#losses .chart').focus()")
    ActionChains(page).send_keys(Keys.HOME).perform()
    first = wait_for(lambda: text_of(page, "#tip"))
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    wait_for(lambda: text_of(page, "#tip") not in ("", first))
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert find(page, "#tip").get_property("hidden")
    page.execute_script("document.querySelector('#policy .chart').focus()")
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    wait_for(lambda: "loss of" in text_of(page, "#tip"))
    unreachable = page.execute_script(
        "const all = [...document.querySelectorAll('.scroll, .chart, button, input, select, textarea')];"
        "return all.filter((element) => element.tabIndex < 0).length"
    )
    assert unreachable == 0
    nameless = page.execute_script(
        "return [...document.querySelectorAll('.scroll, .chart')].filter((e) => !e.getAttribute('aria-label')).length"
    )
    assert nameless == 0


def test_domains_are_switched_and_sorted(page: webdriver.Chrome) -> None:
    chips = page.find_elements(By.CSS_SELECTOR, "#losses .chips button")
    before = page.execute_script("return window.mixwright.page.panels[1].view.visible")
    chips[0].click()
    after = page.execute_script("return window.mixwright.page.panels[1].view.visible")
    assert after == before[1:]
    find(page, "#domains th button").click()
    assert find(page, "#domains th").get_attribute("aria-sort") == "ascending"
    find(page, "#losses .tools button:nth-child(2)").click()
    assert page.execute_script("return window.mixwright.page.panels[1].view.chart.spec.x.length") > 3


def test_the_timeline_lists_filters_and_opens_entries(page: webdriver.Chrome) -> None:
    wait_for(lambda: text_rows(page, "#timeline tbody tr"))
    buttons = [text.split()[0] for text in text_rows(page, "#timeline .chips button")]
    assert {"proposal", "shadow", "decision", "reject", "cancel", "commit", "rollback", "hold", "run"} == set(buttons)
    for name in ("proposal", "shadow", "decision", "commit"):
        find(page, f"#timeline .chips button:nth-child({buttons.index(name) + 1})").click()
    rows = wait_for(
        lambda: (rows := text_rows(page, "#timeline tbody tr")) and all("reject" in row for row in rows) and rows
    )
    assert len(rows) == 2
    find(page, "#timeline tbody tr").send_keys(Keys.ENTER)
    wait_for(lambda: '"reason"' in text_of(page, "#timeline pre"))
    assert PWN in text_of(page, "#timeline tbody").replace('\\"', '"')
    assert was_fooled(page) is None


# --- the inspector and the form --------------------------------------------------------------------------------


def test_the_inspector_shows_documents_as_text_and_follows_a_row(page: webdriver.Chrome) -> None:
    find(page, "#data input[type=number]").send_keys(Keys.CONTROL, "a")
    find(page, "#data input[type=number]").send_keys("37", Keys.ENTER)
    rows = wait_for(lambda: text_rows(page, "#data tbody tr"))
    assert len(rows) == 12
    texts = text_of(page, "#data tbody")
    assert "<script>" in texts
    assert "\u202e" not in texts
    assert page.execute_script("return document.querySelectorAll('#data script, #data img, #data svg').length") == 0
    name = page.find_element(By.CSS_SELECTOR, "#data tbody button").text
    find(page, "#data tbody button").click()
    wait_for(lambda: text_of(page, "#data p.soft").startswith(f"{name}: "))
    assert "read" in text_of(page, "#data tbody")
    page.execute_script("document.querySelector('#data input[placeholder]').value = '../../etc/passwd:0'")
    find(page, "#data input[placeholder]").send_keys(Keys.ENTER)
    wait_for(lambda: "expected DOMAIN:ROW" in text_of(page, "#data .bad"))
    assert was_fooled(page) is None
    refused = "the server responded with a status of 400"  # the path above; Chromium logs each answer of this kind
    assert [line for line in complaints(page) if refused not in line] == []


def test_a_policy_is_previewed_before_it_can_be_submitted(page: webdriver.Chrome, server: Dashboard) -> None:
    page.find_element(By.XPATH, "//nav[@id='runs']/button[text()='other']").click()
    wait_for(lambda: "other" in page.title and drawn(page) >= {"submit", "domains"})
    document, token = find(page, "#submit textarea"), find(page, "#submit input[type=password]")
    submit = page.find_element(By.XPATH, "//section[@id='submit']//button[text()='submit']")
    look = page.find_element(By.XPATH, "//section[@id='submit']//button[text()='preview']")
    document.clear()
    document.send_keys("kind: static\nmixture: {code: 1}\n")
    token.send_keys("wrong")
    look.click()
    wait_for(lambda: "expected `Bearer TOKEN`" in text_of(page, "#submit .bad"))
    assert not submit.is_enabled()
    token.clear()
    token.send_keys(server.token or "")
    look.click()
    wait_for(lambda: "Nothing was submitted" in text_of(page, "#submit .outcome"))
    assert "100.00 %" in text_of(page, "#submit tbody")
    assert submit.is_enabled()
    document.send_keys("why: something else\n")
    assert not submit.is_enabled()
    look.click()
    wait_for(submit.is_enabled)
    submit.click()
    wait_for(lambda: "has no mixing service" in text_of(page, "#submit .bad"))


# --- several runs, live runs, looks ----------------------------------------------------------------------------


def test_runs_are_compared_and_a_preference_run_shows_its_figures(page: webdriver.Chrome) -> None:
    page.execute_script("document.querySelector('#compare').scrollIntoView()")
    wait_for(lambda: "compare" in drawn(page))
    assert "live: loss" in text_of(page, "#compare")
    assert min(page.execute_script(COLOURS_DRAWN, "#compare")) > 3
    page.find_element(By.XPATH, "//nav[@id='runs']/button[text()='aligned']").click()
    wait_for(lambda: drawn(page) >= {"figures", "speed"})
    assert {"rewards/margin", "rewards/accuracy", "divergence/kl", "logp/chosen"} <= {
        h3.text for h3 in page.find_elements(By.CSS_SELECTOR, "#figures h3")
    }
    assert min(page.execute_script(COLOURS_DRAWN, "#figures")) > 3
    assert PWN in text_of(page, "#figures")
    assert was_fooled(page) is None
    assert text_of(page, "#state") == "complete"


def test_a_live_run_grows_on_the_page_and_outlives_its_server(
    browser: webdriver.Chrome, marked_store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "growing"
    policy = {"kind": "temperature", "temperature": 2.0}
    live = LiveRun(run / "journal", TokenStore.open(marked_store), 60, policy, report_every=5)
    live.run(end_step=20)
    write_metrics(run, 20)
    set_look(browser, "light", 1200, 2400)
    with dashboard(run) as started:
        opened(browser, started.url, ["mixture", "losses", "domains", "speed"])
        last_step = "return window.mixwright.page.panels[1].view.chart.spec.x.at(-1)"
        assert browser.execute_script(last_step) == 20
        wait_for(lambda: "No online policy has decided" in text_of(browser, "#policy"))
        assert browser.find_elements(By.CSS_SELECTOR, "#submit, #compare") == []
        live.run(20, 40)
        write_metrics(run, 40, first_step=20)
        wait_for(lambda: browser.execute_script(last_step) == 40)
        wait_for(lambda: "40" in text_of(browser, "#glance dd"))
        wait_for(
            lambda: browser.execute_script("return window.mixwright.page.panels[0].view.chart.spec.x.at(-1)") == 40
        )
    wait_for(lambda: text_of(browser, "#state") == "no answer")
    assert browser.execute_script(last_step) == 40


@pytest.mark.parametrize(("scheme", "background"), [("light", "rgb(246, 247, 248)"), ("dark", "rgb(14, 17, 22)")])
@pytest.mark.parametrize("width", [400, 1400])
def test_it_fits_and_follows_the_systems_colours(
    browser: webdriver.Chrome, server: Dashboard, scheme: str, background: str, width: int
) -> None:
    set_look(browser, scheme, width, 3200)
    opened(browser, server.url, ["mixture", "losses", "domains"])
    colour = "return getComputedStyle(document.body).backgroundColor"
    assert browser.execute_script(colour) == background
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    columns = browser.execute_script("return document.querySelectorAll('#panels > .column').length")
    assert columns == (2 if width > 1000 else 0)
    before = browser.execute_script(COLOURS_DRAWN, "#mixture")
    find(browser, "#theme").click()
    assert browser.execute_script(colour) != background
    wait_for(lambda: min(browser.execute_script(COLOURS_DRAWN, "#mixture")) > 3)
    assert before


def test_a_page_that_stays_open_does_not_grow(page: webdriver.Chrome) -> None:
    """Polls that each find every panel new, again and again: the last ones leave no more behind than those before."""
    ask_all = """
    const done = arguments[0];
    (async () => {
      const page = window.mixwright.page;
      for (let i = 0; i < 12; i += 1) {
        page.pollTag = null;
        for (const run of page.runs) run.known = {};
        for (const panel of page.panels) panel.drawn = null;
        await window.mixwright.poll();
      }
      gc();
      done([performance.memory.usedJSHeapSize, document.querySelectorAll('*').length]);
    })();
    """
    page.set_script_timeout(60)
    _, (heap_before, nodes_before), (heap, nodes) = (page.execute_async_script(ask_all) for _ in range(3))
    assert nodes <= nodes_before + 5
    assert heap - heap_before < 1 << 20
