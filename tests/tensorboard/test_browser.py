"""The program that looks at TensorBoard sees what is there, and says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Error
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.scalar import metadata
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from tests import browser
from tests.browser import Chart, Dashboard, Picture, Scalar, open_tensorboard, serve, start_chromium
from tests.tensorboard.texts import TEXTS
from xent_metrics.page import Piece
from xent_metrics.pictures.surprisal_html import write_html
from xent_metrics.summary import summarise

try:
    browser.find_chromium()
    MISSING = ""
except RuntimeError as error:
    MISSING = str(error)

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

BAND = ["val/cross_entropy", "val/cross_entropy_lower", "val/cross_entropy_upper"]
LAYOUT = {
    "cross entropy": {
        "train and val": ["Multiline", ["^train/cross_entropy$", "^val/cross_entropy$"]],
        "interval": ["Margin", BAND],
    }
}
DESCRIPTION = "Mean **negative log likelihood** of a token, in nats."
TABLE = [["reading", "value"], ["cross entropy", "2.0970"], ["perplexity", "8.1419"]]


def write_scalars(writer: SummaryWriter, *, left_out: tuple[str, int] | None = None) -> None:
    """Write curves of which each, but for a point left out, has the same eight steps."""
    for step in range(8):
        value = 2 + math.exp(-step / 3)
        points = dict(zip(BAND, (value, value - 0.2, value + 0.2), strict=True))
        for tag, point in {"train/cross_entropy": value - 0.1, **points}.items():
            if (tag, step) != left_out:
                writer.add_scalar(tag, point, step)


def write_run(folder: Path) -> None:
    """Write something for each tab."""
    with SummaryWriter(str(folder)) as writer:
        described = metadata.create_summary_metadata(display_name="", description=DESCRIPTION)
        described = Summary(value=[Summary.Value(tag="val/cross_entropy", metadata=described)])
        for summary in (described, *hparams({"width": 64, "optimizer": "adam"}, {"val/cross_entropy": 0})):
            writer._get_file_writer().add_summary(summary)
        writer.add_custom_scalars(LAYOUT)
        write_scalars(writer)
        for name, width in (("calibration", 360), ("surprise", 480)):
            writer.add_image(f"val/{name}", torch.linspace(0, 1, width).expand(3, 240, width), 7)
        markdown = ["|" + "|".join(row) + "|" for row in TABLE]
        writer.add_text("summary", "\n".join(["# Results\n", markdown[0], "|---|---|", *markdown[1:]]), 7)


@pytest.fixture(name="chromium", scope="module")
def _chromium() -> Iterator[Browser]:
    """Start one browser, for tests of this module alone: as long as it runs, asyncio counts as running."""
    with start_chromium() as chromium:
        yield chromium


@pytest.fixture(name="dashboard", scope="module")
def _dashboard(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """Look at two runs."""
    logdir = tmp_path_factory.mktemp("runs")
    for run in ("first", "second"):
        write_run(logdir / run)
    with serve(logdir) as url, open_tensorboard(chromium, url) as dashboard:
        yield dashboard


@pytest.fixture(autouse=True)
def _no_problems(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing that a test does on the runs above makes the browser complain."""
    yield
    if "dashboard" in request.fixturenames:
        assert not request.getfixturevalue("dashboard").problems


@pytest.mark.slow
def test_time_series(dashboard) -> None:
    """A group for each prefix; curves with their last values, and images that are loaded."""
    groups = dashboard.time_series()
    assert dashboard.tabs() == ["timeseries", "scalars", "custom_scalars", "images", "text", "hparams"]
    assert {name: [card.tag for card in cards if card.kind == "scalar"] for name, cards in groups.items()} == {
        "train": ["train/cross_entropy"],
        "val": BAND,
    }
    assert {card.lines for cards in groups.values() for card in cards if card.kind == "scalar"} == {2}
    for row in groups["train"][0].values:
        assert float(row["Value"]) == pytest.approx(1.9 + math.exp(-7 / 3), abs=1e-3)
        assert row["Step"] == "7"
    assert [row["Run"] for row in groups["train"][0].values] == ["first", "second"]
    images = {(card.tag, card.run, card.size) for card in groups["val"] if card.kind == "image"}
    assert images == {
        (f"val/{name}", run, (width, 240))
        for name, width in (("calibration", 360), ("surprise", 480))
        for run in ("first", "second")
    }


@pytest.mark.slow
def test_scalars(dashboard) -> None:
    """Cards with a line for each run, one of them with a description."""
    described = Scalar("val/cross_entropy", "val/cross_entropy", DESCRIPTION.replace("*", ""), 2)
    others = [Scalar(tag.partition("/")[2], tag, "", 2) for tag in ("train/cross_entropy", *BAND[1:])]
    assert dashboard.scalars() == {"train": others[:1], "val": [described, *others[1:]]}


@pytest.mark.slow
def test_custom_scalars(dashboard) -> None:
    """Both kinds of charts, drawn, with nothing to report."""
    charts = dashboard.custom_scalars()
    assert charts == {
        "cross entropy": [
            Chart(
                title="train and val",
                kind="Multiline",
                series=[f"{tag} ({run})" for tag in ("train/cross_entropy", BAND[0]) for run in ("first", "second")],
                errors=[],
                lines=4,
                bands=0,
            ),
            Chart("interval", "Margin", [f"{BAND[0]} (first)", f"{BAND[0]} (second)"], [], lines=2, bands=2),
        ]
    }
    assert not any(chart.problem for chart in charts["cross entropy"])


@pytest.mark.slow
def test_hparams(dashboard) -> None:
    """A row for each run, with the last value of the metric."""
    trials = dashboard.hparams()
    assert trials.columns == ["Trial ID", "Show Metrics", "optimizer", "width", "val/cross_entropy"]
    for row, run in zip(trials.rows, ("first", "second"), strict=True):
        assert row == {
            "Trial ID": run,
            "Show Metrics": "",
            "optimizer": "adam",
            "width": "64.000",
            "val/cross_entropy": "2.0970",
        }


@pytest.mark.slow
def test_images(dashboard) -> None:
    """Every image is there in its own size."""
    assert dashboard.images() == {
        "val": [
            Picture(f"val/{name}", run, "7", (width, 240))
            for name, width in (("calibration", 360), ("surprise", 480))
            for run in ("first", "second")
        ]
    }


@pytest.mark.slow
def test_text(dashboard) -> None:
    """Markdown is rendered, tables too."""
    texts = dashboard.text()
    assert [(text.tag, text.run, text.step) for text in texts["summary"]] == [
        ("summary/text_summary", "first", "7"),
        ("summary/text_summary", "second", "7"),
    ]
    for text in texts["summary"]:
        assert "<h1>Results</h1>" in text.html
        assert text.tables == [TABLE]


@pytest.mark.slow
def test_screenshots_show_everything_and_are_small(dashboard, tmp_path) -> None:
    """The whole window is as tall as what it holds; the contents alone are less."""
    dashboard.time_series()
    sizes = {}
    for name, full in (("full", True), ("content", False)):
        path = tmp_path / f"{name}.png"
        dashboard.screenshot(path, full=full)
        assert 10_000 < path.stat().st_size < 300_000
        with Image.open(path) as image:
            sizes[name] = image.size
            assert len(image.convert("RGB").getcolors(256)) > 50
    assert sizes["full"][0] == browser.WIDTH
    assert sizes["full"][1] > browser.HEIGHT
    assert all(content < full for content, full in zip(sizes["content"], sizes["full"], strict=True))


@pytest.mark.slow
def test_broken_layouts_are_reported(chromium, tmp_path) -> None:
    """A wrong tag, a wrong expression, and curves without common steps: each for its own reason."""
    layout = {
        "fine": ["Multiline", ["^train/cross_entropy$"]],
        "a tag is missing": ["Margin", [*BAND[:2], "val/nothing"]],
        "all tags are missing": ["Margin", ["val/a", "val/b", "val/c"]],
        "steps differ": ["Margin", BAND],
        "matches nothing": ["Multiline", ["^cross_entropy$"]],
        "not an expression": ["Multiline", ["(train"]],
        "matches more than was meant": ["Multiline", ["val/cross_entropy"]],
    }
    with SummaryWriter(str(tmp_path / "run")) as writer:
        writer.add_custom_scalars({"broken": layout})
        write_scalars(writer, left_out=(BAND[2], 3))
    with serve(tmp_path, load_fast=True) as url, open_tensorboard(chromium, url) as dashboard:
        charts = {chart.title: chart for chart in dashboard.custom_scalars()["broken"]}
        assert not dashboard.problems
    assert {title: chart.problem for title, chart in charts.items()} == {
        "fine": "",
        "a tag is missing": 'Missing Tags: Run "run" lacks data for tags val/nothing',
        "all tags are missing": "no series",
        "steps differ": (
            "The steps for value, lower, and upper tags do not match: "
            f"{BAND[0]}: 0, 1, 2, 3, 4, 5, 6, 7 {BAND[1]}: 0, 1, 2, 3, 4, 5, 6, 7 {BAND[2]}: 0, 1, 2, 4, 5, 6, 7"
        ),
        "matches nothing": "no series",
        "not an expression": "no series",
        "matches more than was meant": "",
    }
    assert charts["matches more than was meant"].series == [f"{tag} (run)" for tag in BAND]


@pytest.mark.slow
def test_what_is_closed_or_on_a_second_page_is_seen_and_what_is_not_there_is_not(chromium, tmp_path) -> None:
    """TensorBoard closes all groups but the first two, and shows twelve cards of a group; tabs may have nothing."""
    with SummaryWriter(str(tmp_path)) as writer:
        for group in "abc":
            for number in range(15 if group == "c" else 1):
                for step in range(2):
                    writer.add_scalar(f"{group}/{number:02}", number, step)
        broken = Summary.Image(encoded_image_string=b"no image", height=1, width=1, colorspace=3)
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag="c/image", image=broken)]), 0)
    with serve(tmp_path) as url, open_tensorboard(chromium, url) as dashboard:
        counts = {name: len(cards) for name, cards in dashboard.scalars().items()}
        assert counts == {"a": 1, "b": 1, "c": 15}
        series = dashboard.time_series()
        assert {name: sum(card.lines for card in cards) for name, cards in series.items()} == counts
        assert series["c"][-1].size == (0, 0)
        assert dashboard.images() == {"c": [Picture("c/image", ".", "0", (0, 0))]}
        assert dashboard.custom_scalars() == {}
        with pytest.raises(RuntimeError, match="shows nothing"):
            dashboard.screenshot(tmp_path / "empty.png", full=False)
        assert dashboard.hparams() == browser.Trials([], [])
        assert not dashboard.problems


def test_a_page_of_hyperparameters_calls_nobody(chromium, tmp_path) -> None:
    """Pictures and links in values stay text, which reads as it was, and no request leaves."""
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_text("summary", summarise(TEXTS, {}, {}), 0)
    hosts: set[str] = set()
    with serve(tmp_path) as url, open_tensorboard(chromium, url) as dashboard:
        dashboard.page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        [[text]] = dashboard.text().values()
        assert not dashboard.page.locator("#markdown a, #markdown img").count()
        assert not dashboard.problems
    assert hosts == {urlsplit(url).netloc}
    header, *rows = text.tables[-1]
    assert header == ["name", "value"]
    # The browser's own text of a cell, without the spaces at its ends.
    shown = {name.replace("\u00a0", " "): value.replace("\u00a0", " ") for name, value in rows}
    assert shown == {name: "\n".join(value.splitlines()).strip() for name, value in TEXTS.items()}


def test_the_surprisal_page_shows_what_it_says_and_calls_nobody(chromium, tmp_path) -> None:
    """Pointing at a piece shows its tokens, bits and ranks; what could run does not."""
    text = "<img src='https://example.com/x.png' onerror='document.title=1'>"
    page = [[Piece("שלום", 2.0, (1,))], [Piece(text, 1.0, (7,), (3,)), Piece("😀", 9.0, (8, 9), (1, 20))]]
    (tmp_path / "page.html").write_text(write_html(page, "A title", most=8.0))
    tab = chromium.new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((tmp_path / "page.html").as_uri())
    pieces = tab.locator(".text span")
    assert pieces.all_inner_texts() == ["שלום", text, "😀"]
    shown = "node => getComputedStyle(node, '::after').content"
    assert pieces.nth(2).evaluate(shown) == "none"
    pieces.nth(2).hover()
    assert pieces.nth(2).evaluate(shown).replace("\\a ", "\n").strip('"') == "tokens 8, 9: '😀'\n9.00 bits\nrank 1, 20"
    boxes = [tab.locator(".text").nth(i).bounding_box() for i in (0, 1)]
    letters = [pieces.nth(i).bounding_box() for i in (0, 1)]
    assert letters[0]["x"] > boxes[0]["x"] + boxes[0]["width"] / 2  # From the right,
    assert letters[1]["x"] < boxes[1]["x"] + 20  # and from the left.
    assert (tab.title(), len(asked)) == ("A title", 1)
    tab.close()


@pytest.mark.slow
def test_problems_are_recorded(chromium, dashboard) -> None:
    """Exceptions, errors in the console and failed requests are; that another host is out of reach is not."""
    with open_tensorboard(chromium, dashboard.url) as spoilt:
        spoilt.open("text")
        spoilt.page.evaluate(
            """async () => {
                await fetch("data/nothing");
                console.error("said");
                setTimeout(() => { throw new Error("thrown"); });
            }"""
        )
        spoilt.settle()
        with pytest.raises(Error, match="ERR_NAME_NOT_RESOLVED"):
            spoilt.page.goto("https://example.com")
        assert sorted(text.partition(" (")[0] for text in spoilt.problems) == [
            "Failed to load resource: the server responded with a status of 404",
            "exception: thrown",
            "said",
            "status 404",
        ]


def test_a_server_that_does_not_start_says_why(tmp_path, monkeypatch) -> None:
    """What TensorBoard wrote is in the error."""
    monkeypatch.setattr(browser.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="TensorBoard did not start"), serve(tmp_path):
        pass


def test_without_chromium_the_error_says_what_to_install(monkeypatch) -> None:
    """One sentence, for those who have none."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="`apt-get install chromium` on Debian"):
        browser.find_chromium()
