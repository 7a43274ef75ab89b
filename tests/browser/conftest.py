"""A real browser without a network: what leaves the page, and what it complains of, fails the test."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The system's chromium. Where there is none, tests that asked for it fail: `apt-get install chromium`."""
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, NAMES)), None)
    assert executable, f"none of {', '.join(NAMES)} on the PATH: apt-get install chromium, or leave out -m browser"
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        found = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Open a page file, with settings of a browser context; at the end nothing was requested and nothing went wrong."""
    contexts, requests, complaints = [], [], []

    def opened(path: Path, width: int = 1000, height: int = 800, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.route(lambda url: not url.startswith(("file:", "data:")), lambda route: route.abort())
        page.goto(path.as_uri())
        page.expected = complaints
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not complaints
    assert {url.partition(":")[0] for url in requests} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in requests) == len(contexts)  # the pages themselves
