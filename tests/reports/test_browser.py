"""The report in a real browser: no errors, no requests, and what a reader does with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dyndiag.reports import report
from tests.reports import made

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    hostile = [
        (i, {"train/loss": 1.0 + i % 3, f"gradients/norm/{made.HOSTILE}": 1.0 + i})
        for i in range(60)
    ]
    spread = [(i, {"train/loss": 50 * 0.875**i}) for i in range(60)]  # to 0.019
    nan = [(i, {"train/loss": float("nan"), "gradients/norm": float("inf")}) for i in range(60)]
    return {
        "edge": report(made.write(base / "edge", made.edge())),
        "gap": report(made.write(base / "gap", made.switch(), {"tasks": ["A", "B"]})),
        "spike": report(made.write(base / "spike", made.spiked(logits=True))),
        "empty": report(made.write(base / "empty", [])),
        "one": report(made.write(base / "one", [(7, {"train/loss": 1.5})])),
        "nan": report(made.write(base / "nan", nan)),
        "hostile": report(made.write(base / "hostile", hostile)),
        "spread": report(made.write(base / "spread", spread)),
        "running": report(made.write(base / "running", made.spiked(401), {"finished": None})),
    }


@pytest.fixture
def opened(browser: Any, files: dict[str, Path]) -> Iterator[Open]:
    """Open one of the reports offline; errors and requests fail the test at its end."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def go(name: str, width: int = 1440, height: int = 1000, **options: Any) -> Any:
        context = browser.new_context(
            offline=True,
            viewport={"width": width, "height": height},
            reduced_motion="reduce",
            **options,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda r: None if r.url == uri else wrong.append(r.url))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        uri = files[name].as_uri()
        page.goto(uri)
        return page

    yield go
    for context in contexts:
        context.close()
    assert wrong == []


def through(page: Any) -> None:
    """Scroll so that every chart is drawn."""
    height = page.evaluate("document.documentElement.scrollHeight")
    for y in range(0, height, 1500):
        page.evaluate(f"window.scrollTo(0, {y})")
        page.wait_for_timeout(20)
    missing = "[...document.querySelectorAll('figure[data-chart]')].filter(f => f.chart.stale)"
    assert page.evaluate(f"{missing}.length") == 0


@pytest.mark.parametrize(
    "name", ["edge", "gap", "spike", "empty", "one", "nan", "hostile", "running"]
)
def test_draws_without_an_error(opened: Open, name: str) -> None:
    page = opened(name)
    through(page)
    figures = page.locator("figure[data-chart]").count()
    assert page.locator("figure[data-chart] svg").count() >= figures
    assert page.locator("[d*=NaN], [d*=Infinity], [x*=NaN], [cy*=NaN]").count() == 0


@pytest.mark.parametrize("name", ["edge", "gap", "hostile"])
def test_fits_a_phone(opened: Open, name: str) -> None:
    page = opened(name, 390, 844)
    through(page)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_a_logarithmic_axis_names_two_values_at_least(opened: Open) -> None:
    page = opened("spread")
    through(page)
    texts = page.locator("figure[data-chart=over-loss] svg text").all_text_contents()
    assert {"10", "0.1"} <= set(texts)


def test_drag_zooms_every_chart_and_escape_resets(opened: Open) -> None:
    page = opened("edge")
    page.locator("#stability").scroll_into_view_if_needed()
    page.wait_for_timeout(150)
    before = page.locator("#figure-ratio .plot svg").inner_html()
    box = page.locator("#figure-sharp .plot").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 500, box["y"] + 60, steps=3)
    page.mouse.up()
    assert page.locator("#pill").is_visible()
    assert page.locator("#pill span").inner_text().startswith("Steps ")
    page.mouse.move(5, 5)
    page.wait_for_timeout(100)
    assert page.locator("#figure-ratio .plot svg").inner_html() != before
    page.keyboard.press("Escape")
    assert page.locator("#pill").is_hidden()
    assert page.locator("#figure-ratio .plot svg").inner_html() == before
    assert page.locator("#figure-over-loss .dim").count() == 0


def test_the_timeline_never_zooms_but_dims(opened: Open) -> None:
    page = opened("edge")
    page.locator(".jump").first.click()
    page.wait_for_timeout(200)
    assert page.locator("#pill").is_visible()
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(200)
    assert page.locator("#figure-over-loss .dim").count() == 2


def test_hover_puts_the_value_into_the_caption(opened: Open) -> None:
    page = opened("edge")
    page.locator("#stability").scroll_into_view_if_needed()
    page.wait_for_timeout(150)
    caption = page.locator("#figure-sharp figcaption")
    height = caption.bounding_box()["height"]
    box = page.locator("#figure-sharp .plot").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 60)
    page.wait_for_timeout(100)
    text = caption.inner_text()
    assert "certified, at 1," in text and "5.00" in text and "step 1," in text
    assert caption.bounding_box()["height"] == height  # nothing jumps


def test_keyboard(opened: Open) -> None:
    page = opened("edge")
    page.locator("#figure-over-loss .plot").focus()
    for key in ("Home", "ArrowRight", "Shift+ArrowRight"):
        page.keyboard.press(key)
    page.wait_for_timeout(400)
    assert page.locator("#live").inner_text().startswith("Step 177: loss 0.6")
    page.keyboard.press("+")
    assert page.locator("#pill").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#pill").is_hidden()


def test_an_event_leads_to_its_finding(opened: Open) -> None:
    page = opened("edge")
    page.wait_for_timeout(100)
    event = page.locator("g.event").last
    assert "Go to the finding" in event.get_attribute("aria-label")
    event.focus()
    page.keyboard.press("Enter")
    page.wait_for_timeout(200)
    assert page.locator("#finding-1").bounding_box()["y"] < 300


def test_legend_and_table(opened: Open) -> None:
    page = opened("edge")
    page.locator("#stability").scroll_into_view_if_needed()
    page.wait_for_timeout(150)
    lines = page.locator("#figure-sharp svg path.c-limit")
    assert lines.count() >= 1
    page.locator("#figure-sharp .legend button").first.click()
    assert page.locator("#figure-sharp .plot svg path.c-limit").count() == 0
    page.locator("#figure-sharp .opens").click()
    rows = page.locator("#figure-sharp .values tbody tr")
    assert 15 <= rows.count() <= 30
    assert "provisional" in rows.first.inner_text()


def test_dark_and_light(opened: Open) -> None:
    page = opened("edge", color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(16, 18, 22)"
    page.locator("[data-mode=light]").click()
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.locator("[data-mode=auto]").click()
    assert page.evaluate(background) == "rgb(16, 18, 22)"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(background) == "rgb(255, 255, 255)"


def test_without_javascript_the_text_stands(opened: Open) -> None:
    page = opened("edge", java_script_enabled=False)
    assert page.locator("h1").inner_text().startswith("Training spent")
    assert "The loss went from" in page.locator("#figure-over-loss").inner_text()
    assert page.locator("#finding-1 dl").is_visible()
    assert not page.locator(".jump").first.is_visible()


def test_hostile_names_are_text(opened: Open) -> None:
    page = opened("hostile")
    through(page)
    assert page.locator("script").count() == 2
    titles = page.locator("#figure-layers svg text title")
    assert titles.first.text_content() == made.HOSTILE


def test_a_running_run_says_so(opened: Open) -> None:
    page = opened("running")
    assert "still running, step 400" in page.locator(".eyebrow").inner_text()
