"""The report in a real browser, at the width of a desktop and of a phone, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


@contextmanager
def opened(report: Path, chromium: str, size: dict[str, int]) -> Iterator[tuple[Page, list[str]]]:
    """The page after its charts are drawn, and what went wrong on it: errors, and requests for anything but the file."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport=size)  # type: ignore[arg-type]
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
        page.goto(report.as_uri())
        page.wait_for_function("document.querySelectorAll('.chart').length === document.querySelectorAll('.chart svg').length")
        yield page, wrong
        browser.close()
