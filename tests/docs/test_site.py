"""The documentation site: it builds without a warning, holds every page, and loads nothing from another host."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.docs.commands import ROOT

LOADS = {
    "script": "src", "img": "src", "iframe": "src", "video": "src", "audio": "src", "source": "src", "embed": "src",
    "object": "data", "link": "href", "use": "href", "image": "href",
}  # fmt: skip
"""Elements and attributes that make a browser fetch something."""

OUTSIDE = re.compile(r"^\s*(?:https?:)?//")
NEVER_CALLED = {"https://unpkg.com", "https://api.github.com", "https://gitlab.com"}
"""In Material's script: Mermaid and a repository's stars, for pages with a diagram or a repository. Ours have none."""


class Resources(HTMLParser):
    """What a page loads, and whether it has what would make Material's script fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.fetching: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("canonical", "prev", "next"):
            return
        if tag in LOADS and (address := values.get(LOADS[tag])):
            self.loaded.append(address)
        self.loaded += [part.split()[0] for part in (values.get("srcset") or "").split(",") if part.strip()]
        if "mermaid" in (values.get("class") or "") or values.get("data-md-component") == "source":
            self.fetching.append(tag)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it, without a proxy to get anywhere."""
    subprocess.run(["make", ".typecheck/mixwright"], cwd=ROOT, check=True, capture_output=True)
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    assert "WARNING" not in built.stderr, built.stderr[-3000:]
    return folder


def test_every_page_of_the_docs_is_in_it(site: Path) -> None:
    """Strict already refuses pages that the navigation lacks, dead links and dead anchors."""
    sources = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    for source in sources:
        page = source.parent if source.name == "index.md" else source.with_suffix("")
        assert (site / page / "index.html").is_file(), source
    assert len(sources) > 40


def test_it_loads_nothing_from_another_host(site: Path) -> None:
    pages = [path for path in site.rglob("*.html")]
    assert pages
    for path in pages:
        resources = Resources()
        resources.feed(path.read_text(encoding="utf-8"))
        assert resources.loaded, path
        assert not [address for address in resources.loaded if OUTSIDE.match(address)], path
        assert not resources.fetching, path
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path


def test_its_scripts_name_no_other_host_that_they_would_call(site: Path) -> None:
    for path in site.rglob("*.js"):
        called = set(re.findall(r"[\"'`](https?://[\w.-]+)", path.read_text(encoding="utf-8", errors="replace")))
        licences = {address for address in called if address.endswith(("w3.org", "www.w3.org"))}
        assert called - licences <= NEVER_CALLED, path


def test_the_api_pages_have_signatures_and_words(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api/pretrain/index.html").read_text(encoding="utf-8"))
    assert "rows_per_step: Positive" in text
    assert "lead_steps: int = 8" in text, "defaults of fields are shown"
    kernels = re.sub(r"<[^>]+>", "", (site / "api/kernels/index.html").read_text(encoding="utf-8"))
    assert "Losses of every token under a linear head" in kernels


def test_a_dead_link_or_a_forgotten_page_is_refused(tmp_path: Path) -> None:
    """The strictness that the tests above rest on."""
    for name in ("docs", "mkdocs.yml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / ".typecheck").symlink_to(ROOT / ".typecheck")
    (tmp_path / "docs/forgotten.md").write_text("# Forgotten\n\n[nowhere](nowhere.md), [no part](data.md#no-part)\n")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 1
    for text in ("forgotten.md", "nowhere.md", "#no-part"):
        assert text in built.stderr
