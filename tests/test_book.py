"""The built book in a real browser: wide and narrow, light and dark, with no network.

The browser is Chromium, driven through its own debugging pipe; without one, these tests skip.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
from urllib.parse import unquote, urldefrag

import pytest
import yaml

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --disable-dev-shm-usage"
).split()
WIDTHS = {"desktop": 1280, "phone": 390}
FACTS = """(async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  await document.fonts.ready;
  const all = (css) => [...document.querySelectorAll(css)];
  return {
    theme: document.documentElement.dataset.theme,
    background: getComputedStyle(document.body).backgroundColor,
    wide: document.documentElement.scrollWidth,
    alts: all("article img").map((image) => [image.getAttribute("src"), image.getAttribute("alt")]),
    broken: all("img").filter((image) => image.complete && !image.naturalWidth).map((image) => image.src),
    formulas: all(".math").length,
    rendered: all("mjx-container").length,
    errors: all("mjx-merror").map((e) => e.textContent),
    raw: all("article .math").filter((e) => !e.querySelector("mjx-container")).map((e) => e.textContent),
    links: all("a[href]").map((a) => a.getAttribute("href")),
    ids: all("[id]").map((e) => e.id),
    headings: all("article h2").length,
  };
})()"""


class Browser:
    """One Chromium, spoken to in the Chrome DevTools Protocol over a pipe."""

    def __init__(self, executable, profile):
        # Chromium reads commands from its descriptor 3 and answers on 4; messages end in a zero byte.
        (read_here, write_there), (read_there, write_here) = os.pipe(), os.pipe()
        command = [executable, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        redirect = f'exec "$@" 3<&{read_there} 4>&{write_there} 2>/dev/null'
        self.process = subprocess.Popen(["bash", "-c", redirect, "bash", *command], pass_fds=(read_there, write_there))
        os.close(read_there)
        os.close(write_there)
        self.incoming, self.outgoing = os.fdopen(read_here, "rb"), os.fdopen(write_here, "wb")
        self.numbers, self.events, self.rest, self.session = itertools.count(1), [], b"", None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def receive(self):
        """Return the next message."""
        while b"\0" not in self.rest:
            piece = self.incoming.read1(1 << 20)
            assert piece, "the browser ended by itself"
            self.rest += piece
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def ask(self, method, **parameters):
        """Send a command and return its result; events that come meanwhile are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.outgoing.write(json.dumps(message).encode() + b"\0")
        self.outgoing.flush()
        while True:
            answer = self.receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def open(self, url, width, scheme):
        """Load a page and return what it says about itself, its complaints and its requests."""
        phone = width < 600
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        self.ask("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())
        answer = self.ask("Runtime.evaluate", expression=FACTS, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        seen = answer["result"]["value"]
        seen["wide"] -= width
        return seen | {"complaints": self.complaints(), "requests": self.requests()}

    def complaints(self):
        """Return console errors, warnings and uncaught exceptions since the page was opened."""
        found = []
        for event in self.events:
            details = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(details["exceptionDetails"])
            if event["method"] == "Runtime.consoleAPICalled" and details["type"] in ("error", "assert"):
                found.append(details["args"])
            if event["method"] == "Log.entryAdded" and details["entry"]["level"] == "error":
                found.append(details["entry"])
            if event["method"] == "Network.loadingFailed" and not details.get("canceled"):
                found.append(details)
        return found

    def requests(self):
        """Return the addresses asked for that are no local files."""
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("file:", "data:", "blob:"))]

    def close(self):
        """End the browser and wait for it."""
        self.session = None
        self.ask("Browser.close")
        self.process.wait(timeout=20)
        self.incoming.close()
        self.outgoing.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Start a browser with a fresh profile."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)})")
    browser = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(html, root):
    """Return every page that a reader can reach: those of the contents, and the search."""
    toc = yaml.safe_load((root / "book/_toc.yml").read_text())
    names = [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"]), "search"]
    return [html / f"{name}.html" for name in names]


@pytest.fixture(scope="module")
def facts(browser, pages):
    """Open every page at both widths, light and dark; return what was seen, by (page, width, scheme)."""
    views = itertools.product(pages, WIDTHS, ("light", "dark"))
    return {
        (page.stem, size, scheme): browser.open(page.as_uri(), WIDTHS[size], scheme) for page, size, scheme in views
    }


def test_no_page_complains_on_the_console(facts):
    assert {view: seen["complaints"] for view, seen in facts.items() if seen["complaints"]} == {}


def test_no_page_asks_the_network_for_anything(facts):
    assert {view: seen["requests"] for view, seen in facts.items() if seen["requests"]} == {}


def test_no_page_is_wider_than_the_screen(facts):
    assert {view: seen["wide"] for view, seen in facts.items() if seen["wide"] > 0} == {}


def test_the_dark_page_is_dark(facts):
    for (page, _, scheme), seen in facts.items():
        assert seen["theme"] == scheme, page
        shade = sum(map(int, re.findall(r"\d+", seen["background"])[:3])) / 3
        assert (shade < 60) == (scheme == "dark"), (page, seen["background"])


def test_every_image_loads_and_says_what_it_shows(facts):
    for view, seen in facts.items():
        assert not seen["broken"], view
        for source, alt in seen["alts"]:
            assert alt and "_images/" not in alt and len(alt) > 10, (view, source, alt)


def test_every_formula_is_set(facts):
    assert sum(seen["formulas"] for seen in facts.values()), "the book has no formula at all"
    for view, seen in facts.items():
        assert not seen["errors"] and not seen["raw"], view
        assert seen["rendered"] >= seen["formulas"], view


def test_every_page_has_sections(facts):
    for view, seen in facts.items():
        assert seen["headings"] or view[0] == "search", view


def test_every_internal_link_leads_somewhere(facts, pages, html):
    ids = {page.resolve(): set(facts[page.stem, "desktop", "light"]["ids"]) for page in pages}
    for page in pages:
        for link in facts[page.stem, "desktop", "light"]["links"]:
            if re.match(r"[a-z]+:", link):
                continue
            path, anchor = urldefrag(unquote(link.split("?")[0]))
            target = (page.parent / path).resolve() if path else page.resolve()
            assert target.is_file() or (target / "index.html").is_file(), (page.name, link)
            if anchor and target in ids:
                assert anchor in ids[target], (page.name, link)


def test_each_table_and_figure_of_the_paper_is_one_click_away(browser, html, root):
    """Each stands in a title of the contents and, with links to its place, on the first page."""
    browser.open((html / "book/intro.html").as_uri(), WIDTHS["desktop"], "light")
    count = """(what) => [...document.querySelectorAll("article tr")]
      .filter((line) => line.cells[0].textContent.trim() === what)
      .map((line) => line.querySelectorAll("a[href*='#']").length)"""
    titles = (root / "book/_toc.yml").read_text()
    for what in ("Figure 1", "Figure 2", "Figure 3", "Figure 4", "Table 1", "Table 2", "Table 3"):
        answer = browser.ask("Runtime.evaluate", expression=f"({count})('{what}')", returnByValue=True)
        (links,) = answer["result"]["value"]
        assert links and what in titles, what


def test_chapters_offer_colab_binder_and_download(facts, pages, build):
    url, ref = build.page_address()
    for page in (page for page in pages if page.parent.name == "notebooks"):
        links = facts[page.stem, "desktop", "light"]["links"]
        path = f"{build.slug(url)}/blob/{ref}/notebooks/{page.stem}.ipynb"
        assert f"https://colab.research.google.com/github/{path}" in links
        assert any(link.startswith(f"https://mybinder.org/v2/gh/{build.slug(url)}/{ref}") for link in links)
        assert any(link.endswith(f"_sources/notebooks/{page.stem}.ipynb") for link in links)


def test_the_search_finds_a_chapter(browser, html):
    browser.open((html / "search.html").as_uri() + "?q=network", WIDTHS["desktop"], "light")
    hits = """new Promise((done) => { const look = () => {
      const found = document.querySelectorAll("#search-results li").length;
      found ? done(found) : setTimeout(look, 50) }; look() })"""
    answer = browser.ask("Runtime.evaluate", expression=hits, awaitPromise=True, timeout=10_000)
    assert answer["result"]["value"] > 0


def test_the_downloaded_notebook_carries_no_trace_of_the_build(html, root):
    for path in (html / "_sources/notebooks").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert str(root) not in text and "papermill" not in json.loads(text)["metadata"], path.name
