"""Looks at TensorBoard as a person does: a real server, a real browser, and what each tab shows as plain data."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Request, sync_playwright

WIDTH, HEIGHT = 1600, 1000
TALLEST = 16_000  # Chromium paints no picture taller than 16384 pixels.
PATIENCE = 60.0  # Seconds for anything: a loaded machine is slow, and nobody waits for a page that is ready.
QUIET = 0.4  # Seconds without any change, after which a page is taken to be ready: TensorBoard debounces by less.

# Each tab's fragment in the URL, and the element that holds its dashboard.
DASHBOARDS = {
    "timeseries": "metrics-dashboard",
    "scalars": "tf-scalar-dashboard",
    "custom_scalars": "tf-custom-scalar-dashboard",
    "hparams": "tf-hparams-main",
    "images": "tf-image-dashboard",
    "text": "tf-text-dashboard",
}
CUSTOM_CHARTS = "tf-custom-scalar-multi-line-chart-card, tf-custom-scalar-margin-chart-card"
# Groups of cards, lists of matches and of missing tags: what is closed, and leads to what would open it.
CLOSED = {
    ".group-toolbar:has(mat-icon[svgicon=expand_more_24px])": "node => node",
    "tf-category-paginated-view button.heading:not([open-button])": "node => node",
    f":is({CUSTOM_CHARTS}) iron-collapse.iron-collapse-closed": (
        "node => node.previousElementSibling.querySelector('paper-icon-button')"
    ),
}
SCROLLED = "metrics-main-view .main, tf-dashboard-layout #center, vaadin-grid #table"
CONTENT = "metrics-card-groups .card-group, tf-category-paginated-view, vaadin-grid thead, vaadin-grid tbody tr"

# Says why what is in the window is not ready (or ""), as what lies below may be rendered only when it is scrolled to,
# and all that there is on the page: texts, and the paths of drawings.
STATE = """() => {
    let busy = "";
    const shown = [];
    const visible = node => [...node.getClientRects()].some(box => box.bottom >= 0 && box.top <= innerHeight);
    const visit = node => {
        if (node.nodeType === Node.TEXT_NODE) shown.push(node.data.trim());
        if (node.nodeType !== Node.ELEMENT_NODE || ["SCRIPT", "STYLE", "TEMPLATE"].includes(node.tagName)) return;
        shown.push(node.getAttribute("d") ?? "");
        if (node.matches("paper-spinner-lite[active], mat-spinner") && visible(node)) busy = "a spinner turns";
        if (node.matches("vz-line-chart2:not([data-loaded-once])") && visible(node)) busy = "a chart has no data yet";
        if (node.matches("card-view-component:not(:has(*))") && visible(node)) busy = "a card is not rendered yet";
        if (node.matches("img") && visible(node) && !node.complete) busy = "an image is not loaded yet";
        for (const child of node.shadowRoot?.childNodes ?? []) visit(child);
        for (const child of node.childNodes) visit(child);
    };
    visit(document.body);
    return [busy, shown.filter(Boolean).join("\\n")];
}"""
# The cells of a table that is itself in a shadow root while its contents are slotted into it, ordered as they are seen.
GRID = """grid => [...grid.shadowRoot.querySelectorAll("thead tr, tbody tr")]
    .filter(row => row.getClientRects().length && row.getBoundingClientRect().height)
    .map(row => [...row.children]
        .filter(cell => cell.getClientRects().length)
        .sort((one, other) => one.getBoundingClientRect().left - other.getBoundingClientRect().left)
        .map(cell => cell.querySelector("slot").assignedNodes().map(node => node.innerText.trim()).join(" ")))
    .filter(row => row.some(Boolean))"""
# Tables that Markdown has: each has a head, unlike the table of one cell in which TensorBoard puts a vector of strings.
TABLES = """node => [...node.querySelectorAll("table:has(> thead)")]
    .map(table => [...table.rows].map(row => [...row.cells].map(cell => cell.innerText.trim())))"""
CELLS = """rows => rows
    .map(row => [...row.querySelectorAll("tb-data-table-content-cell")].map(cell => cell.innerText.trim()))"""
# A red box, or a list that was opened and has a title of its own.
ERRORS = """nodes => nodes.map(node => {
    const title = node.closest("iron-collapse")?.previousElementSibling.innerText;
    return title ? `${title}: ${node.innerText}` : node.innerText;
})"""


@dataclass(frozen=True)
class TimeSeries:
    """A card of the Time Series tab."""

    tag: str
    kind: str  # "scalar", "image" or "histogram"
    values: list[dict[str, str]]  # The table below a scalar chart: a row for each run, by the columns' headings.
    lines: int  # Lines drawn, of a scalar chart.
    run: str  # Of an image or a histogram, which have a card for each run.
    size: tuple[int, int]  # Of an image, in pixels: (0, 0) if it could not be read.


@dataclass(frozen=True)
class Scalar:
    """A card of the Scalars tab."""

    title: str
    tag: str
    description: str  # What the (i) shows, "" if there is none.
    lines: int  # Lines drawn.


@dataclass(frozen=True)
class Chart:
    """A chart of the Custom Scalars tab."""

    title: str
    kind: str  # "Multiline" or "Margin"
    series: list[str]  # The list of matches, sorted: "tag (run)".
    errors: list[str]  # Texts of red boxes and lists of missing tags.
    lines: int  # Lines drawn.
    bands: int  # Areas drawn between a lower and an upper series.

    @property
    def problem(self) -> str:
        """Say what is wrong with the chart, or nothing."""
        if self.errors:
            return "; ".join(self.errors)
        if not self.series or not self.lines:
            return "no series"
        return "no band" if self.kind == "Margin" and not self.bands else ""


@dataclass(frozen=True)
class Trials:
    """The table of the HParams tab."""

    columns: list[str] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """A card of the Images tab."""

    tag: str
    run: str
    step: str
    size: tuple[int, int]  # In pixels: (0, 0) if the image could not be read.


@dataclass(frozen=True)
class Text:
    """A card of the Text tab."""

    tag: str
    run: str
    step: str
    html: str  # What Markdown was rendered to.
    tables: list[list[list[str]]]  # The cells of each table in it.


def find_chromium() -> Path:
    """Return where Chromium or Chrome is, or raise."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return Path(found)
    raise RuntimeError(
        "no `chromium` or `google-chrome` on the PATH: install it with `apt-get install chromium` on Debian, "
        "`snap install chromium` on Ubuntu, or from https://www.google.com/chrome elsewhere"
    )


@contextmanager
def serve(logdir: Path, *, load_fast: bool = False) -> Iterator[str]:
    """Serve event files with TensorBoard, on a free port of its choice, once it has read all of them.

    Args:
        logdir: The folder with event files.
        load_fast: Read them with the data server that TensorBoard uses by default, rather than in Python.
    """
    # Once it has read them, TensorBoard does not look again; 0 would mean no samples at all, and not all of them.
    options = ["--logdir", logdir, "--port=0", "--reload_interval=0"]
    options += ["--samples_per_plugin=scalars=1000000,images=100,text=100"]
    # Either the server begins with reading, or it reads beside and says so at this verbosity.
    options += ["--load_fast=true", "--verbosity=0"] if load_fast else ["--load_fast=false", "--reload_task=blocking"]
    command = [sys.executable, "-W", "ignore", "-m", "tensorboard.main", *map(str, options)]
    # A file, because a full pipe that nobody reads would stop the server. To read it, it is opened again: the server
    # shares this handle's position, and would write where reading stands.
    with tempfile.NamedTemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as server:

        def said(pattern: str) -> str:
            deadline = time.monotonic() + PATIENCE
            while True:
                text = Path(log.name).read_text()
                if match := re.search(pattern, text):
                    return match[0]
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"TensorBoard did not start: {text}")
                time.sleep(0.05)

        try:
            url = said(r"http://\S+:\d+/")
            if load_fast:
                said("Finished load cycle")
            yield url
        finally:
            server.terminate()


def fetch(url: str) -> Any:
    """Ask TensorBoard for JSON."""
    with urlopen(url) as answer:
        return json.load(answer)


class Dashboard:
    """TensorBoard in a browser. Each tab has a method that opens it and returns what is seen there, by group of cards.

    Attributes:
        page: Playwright's page, for whatever is missing here.
        url: Where TensorBoard is.
        problems: Errors in the console, exceptions, and requests to the server that failed.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.problems: list[str] = []
        self.url = url
        self._width = page.viewport_size["width"]
        self._pending: set[Request] = set()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        page.on("console", lambda said: said.type == "error" and self._note(said.text, said.location["url"]))
        page.on("response", lambda got: got.status >= 400 and self._note(f"status {got.status}", got.url))
        page.on("request", self._asked)
        page.on("requestfinished", self._answered)
        page.on("requestfailed", self._failed)

    def _note(self, text: str, url: str) -> None:
        """Record a problem, unless it is that another host was not reached."""
        if not urlsplit(url).netloc or url.startswith(self.url):
            self.problems.append(f"{text} ({url})")

    def _asked(self, request: Request) -> None:
        self._pending.add(request)

    def _answered(self, request: Request) -> None:
        self._pending.discard(request)

    def _failed(self, request: Request) -> None:
        self._pending.discard(request)
        self._note(f"request failed: {request.failure}", request.url)

    def tabs(self) -> list[str]:
        """Return the tabs that TensorBoard offers for what it has read, once one of them is open."""
        offered = self.page.locator("[role=tab] .plugin-name:visible")
        return offered.evaluate_all("names => names.map(name => name.dataset.pluginId)")

    def open(self, tab: str) -> None:
        """Load a tab afresh, open all that is closed in it, and make the window as tall as what it holds."""
        # A change of the fragment alone would load nothing, so another page comes in between.
        self.page.goto("about:blank")
        self._pending.clear()
        self.page.set_viewport_size({"width": self._width, "height": HEIGHT})
        # Chromium keeps sixteen WebGL contexts and blanks all charts before the last sixteen; with SVG it can also be
        # seen what is drawn.
        self.page.goto(f"{self.url}?forceSVG=true#{tab}")
        self.page.wait_for_selector(DASHBOARDS[tab], state="attached")
        self.settle()
        self._expand()
        self._fit()

    def settle(self) -> None:
        """Wait until everything asked for has arrived, nothing turns, and the page has stopped changing."""
        deadline = time.monotonic() + PATIENCE
        last, since = None, time.monotonic()
        while True:
            busy, shown = self.page.evaluate(STATE)
            now = time.monotonic()
            if busy or self._pending or shown != last:
                last, since = shown, now
            elif now - since > QUIET:
                return
            if now > deadline:
                reasons = [busy or "it keeps changing", *(request.url for request in self._pending)]
                raise TimeoutError(f"{self.page.url} is not ready after {PATIENCE:.0f} s: {', '.join(reasons)}")
            self.page.wait_for_timeout(50)

    def _expand(self) -> None:
        for _ in range(5):  # What has been opened may hold more that is closed.
            clicks = 0
            for selector, opener in CLOSED.items():
                # The page itself clicks, as what is to be clicked may lie below the window.
                click = f"nodes => nodes.map({opener}).map(node => node.click()).length"
                clicks += self.page.locator(selector).evaluate_all(click)
            if not clicks:
                return
            self.settle()
        raise RuntimeError(f"{self.page.url} has something that does not stay open")

    def _fit(self) -> None:
        """TensorBoard scrolls a part of the page, and fills it as it is scrolled: show all of it at once instead."""
        overflow = "nodes => Math.max(0, ...nodes.map(node => node.scrollHeight - node.clientHeight))"
        height = HEIGHT
        while hidden := self.page.locator(SCROLLED).evaluate_all(overflow):
            height += hidden
            if height > TALLEST:
                raise RuntimeError(f"{self.page.url} is more than {TALLEST} pixels tall")
            self.page.set_viewport_size({"width": self._width, "height": height})
            self.settle()

    def _categories(self, cards: str) -> Iterator[tuple[str, list[Locator]]]:
        """Yield the name of each category of an older tab, and its cards."""
        # The first category, of tags that a search finds, has nothing in it as long as nobody searches.
        for category in self.page.locator("tf-category-paginated-view:has(.category-name)").all():
            yield category.locator(".category-name").inner_text(), category.locator(cards).all()

    def time_series(self) -> dict[str, list[TimeSeries]]:
        """Open the Time Series tab."""
        self.open("timeseries")
        groups = self.page.locator("metrics-card-groups .card-group").all()
        return {
            group.locator(".group-title").inner_text(): list(map(_time_series, group.locator("card-view").all()))
            for group in groups
        }

    def scalars(self) -> dict[str, list[Scalar]]:
        """Open the Scalars tab."""
        self.open("scalars")
        return {
            category: [
                Scalar(_heading(card, "name"), _tag(card), _description(card), _count_drawn(card, "line"))
                for card in cards
            ]
            for category, cards in self._categories("tf-scalar-card")
        }

    def custom_scalars(self) -> dict[str, list[Chart]]:
        """Open the Custom Scalars tab."""
        self.open("custom_scalars")
        return {
            category: [_chart(card) for card in cards] for category, cards in self._categories(f":is({CUSTOM_CHARTS})")
        }

    def hparams(self) -> Trials:
        """Open the HParams tab."""
        self.open("hparams")
        grids = self.page.locator("tf-hparams-table-view vaadin-grid").all()  # One, or none without hyperparameters.
        cells = [[" ".join(cell.split()) for cell in row] for grid in grids for row in grid.evaluate(GRID)]
        columns, *rows = cells or [[]]
        return Trials(columns, [dict(zip(columns, row, strict=True)) for row in rows])

    def images(self) -> dict[str, list[Picture]]:
        """Open the Images tab."""
        self.open("images")
        step = ".heading-row > .heading-label:not([itemprop]) > span:not([itemprop])"
        return {
            category: [
                Picture(_tag(card), _heading(card, "run"), card.locator(step).first.inner_text(), _size(card))
                for card in cards
            ]
            for category, cards in self._categories("tf-image-loader")
        }

    def text(self) -> dict[str, list[Text]]:
        """Open the Text tab."""
        self.open("text")
        return {
            category: [text for card in cards for text in _texts(card)]
            for category, cards in self._categories("tf-text-loader")
        }

    def screenshot(self, path: Path, *, full: bool = True) -> None:
        """Write a small PNG of the open tab.

        Args:
            path: The file to write.
            full: Show the whole window, which is as tall as what it holds, rather than the cards or the table alone.
        """
        clip = None if full else self._content()
        with Image.open(io.BytesIO(self.page.screenshot(clip=clip))) as picture:
            # Charts have few colours; dithering would only add noise, which is what takes space.
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)

    def _content(self) -> dict[str, float]:
        boxes = [box for node in self.page.locator(CONTENT).all() if (box := node.bounding_box()) and box["height"]]
        if not boxes:
            raise RuntimeError(f"{self.page.url} shows nothing")
        left, top = (min(box[side] for box in boxes) for side in ("x", "y"))
        right, bottom = (
            max(box[side] + box[size] for box in boxes) for side, size in (("x", "width"), ("y", "height"))
        )
        return {"x": left, "y": top, "width": right - left, "height": bottom - top}


def _heading(card: Locator, part: str) -> str:
    return card.locator(f"[itemprop={part}]").inner_text().strip()


def _tag(card: Locator) -> str:
    """Return a card's tag, which its title stands for where they are the same."""
    return _heading(card, "tag" if card.locator("[itemprop=tag]").count() else "name")


def _description(card: Locator) -> str:
    """Return what a click on a card's (i) would show: it is in the page before."""
    if not card.locator("paper-icon-button[icon=info]:visible").count():
        return ""
    return " ".join((card.locator("#descriptionDialog #markdown").text_content() or "").split())


def _count_drawn(card: Locator, kind: str) -> int:
    """Return how many lines or areas a chart has, not counting the pale lines before smoothing and edges of areas."""
    plot = ".area-plot" if kind == "area" else ".line-plot:not(.ghost):not(.area-plot)"
    return card.locator(f"{plot} path.{kind}:not([d=''])").count()


def _size(card: Locator) -> tuple[int, int]:
    width, height = card.locator("img").evaluate("image => [image.naturalWidth, image.naturalHeight]")
    return width, height


def _texts(card: Locator) -> Iterator[Text]:
    steps, pages = card.locator(".step-value").all(), card.locator(".text #markdown").all()
    for step, page in zip(steps, pages, strict=True):
        html = page.inner_html().strip()
        yield Text(_tag(card), _heading(card, "run"), step.inner_text().strip(), html, page.evaluate(TABLES))


def _chart(card: Locator) -> Chart:
    return Chart(
        title=_heading(card, "name"),
        kind="Margin" if card.evaluate("node => node.matches('tf-custom-scalar-margin-chart-card')") else "Multiline",
        # After the symbol that marks its points. They are listed in the order in which they arrived.
        series=sorted(
            entry.split(maxsplit=1)[1].strip() for entry in card.locator(".match-list-entry").all_inner_texts()
        ),
        errors=[" ".join(error.split()) for error in card.locator(".error-content").evaluate_all(ERRORS)],
        lines=_count_drawn(card, "line"),
        bands=_count_drawn(card, "area"),
    )


def _time_series(card: Locator) -> TimeSeries:
    kind = next(kind for kind in ("scalar", "image", "histogram") if card.locator(f"{kind}-card").count())
    columns = [heading.strip() for heading in card.locator("tb-data-table-header-cell").all_inner_texts()]
    rows = card.locator("tb-data-table-content-row").evaluate_all(CELLS)
    return TimeSeries(
        tag=card.locator("tb-truncated-path").get_attribute("title") or "",
        kind=kind,
        # The first column, without a heading, is the run's colour.
        values=[{name: cell for name, cell in zip(columns, row, strict=True) if name} for row in rows],
        # Those before smoothing are pale.
        lines=card.locator(".series-view path[style*='opacity: 1;']:not([d=''])").count(),
        run="" if kind == "scalar" else card.locator("card-run-name").inner_text().strip(),
        size=_size(card) if kind == "image" else (0, 0),
    )


@contextmanager
def start_chromium() -> Iterator[Browser]:
    """Start a browser without a window and without a network; only one at a time, which may have several pages."""
    arguments = [
        "--no-sandbox",  # Chromium has none for root, which containers run as; it opens nothing but TensorBoard.
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        # Where there is no network, a request to another host could hang; like this it fails at once.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
    ]
    chromium = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_tensorboard(chromium: Browser, url: str, *, width: int = WIDTH) -> Iterator[Dashboard]:
    """Open a page, with settings and a memory of its own, for what is served at a URL."""
    size = {"width": width, "height": HEIGHT}
    with chromium.new_context(viewport=size, locale="en-US", timezone_id="UTC", reduced_motion="reduce") as context:
        # All cards of a group on one page. An empty page has no storage.
        settings = "localStorage.setItem('_tb_global_settings', JSON.stringify({paginationSize: 1000}))"
        context.add_init_script(f"if (location.protocol === 'http:') {settings}")
        yield Dashboard(context.new_page(), url)
