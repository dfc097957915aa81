"""Pages in a real browser: headless Chromium without a network, and everything that a page asks for or complains of."""

import os
import shutil
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW = (
    "the tests of the page need Chromium and playwright: apt-get install chromium (or Google Chrome), and "
    "pip install playwright"
)
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


def executable():
    """Path of the browser, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@contextmanager
def launcher():
    """A callable that starts browsers with options, each with a profile of its own; all are closed at the end.

    Where there is none, a skip that says how to get it.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason=HOW)
    path = executable()
    if path is None:
        pytest.skip(HOW)
    with playwright.sync_playwright() as started:
        yield lambda *options: started.chromium.launch(executable_path=path, headless=True, args=[*OPTIONS, *options])


class Opened:
    """A page that is opened from its file, with the network off.

    Attributes:
        page: playwright's.
        requests: addresses of all requests.
        complaints: of the console, and exceptions that nobody caught.
    """

    def __init__(self, browser, path, size=(1280, 900), dark=False, hash="", state="ready", **options):
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, accept_downloads=True, **options
        )
        self.context.set_offline(True)
        self.page = self.context.new_page()
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.address = path.absolute().as_uri()
        self.page.goto(self.address + hash)
        self.page.wait_for_selector("html[data-state]", state="attached", timeout=30_000)
        assert self.page.evaluate("document.documentElement.dataset.state") == state

    def _heard(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.check()
        finally:
            self.context.close()

    def check(self):
        """Nothing was complained of, and no request left the page."""
        assert self.complaints == []
        beyond = [url for url in self.requests if not url.startswith((self.address, "data:", "blob:"))]
        assert self.requests and beyond == []

    def role(self, role, name, exact=True):
        """The element of a role and an accessible name."""
        return self.page.get_by_role(role, name=name, exact=exact)

    def press(self, name):
        """Click the button of this name."""
        self.role("button", name).click()
        self.settle()

    @property
    def stage(self):
        """The element in which the picture is shown."""
        return self.role("application", "Picture with its features")

    def place(self, row, column):
        """Place of a pixel's middle in the window."""
        self.stage.scroll_into_view_if_needed()
        box = self.stage.bounding_box()
        at = self.page.evaluate(f"Anyup.page.stage.placeOf({{row: {row}, column: {column}}})")
        return box["x"] + at["x"], box["y"] + at["y"]

    def hover(self, row, column):
        """The mouse over a pixel, until the similarity to it is drawn."""
        self.page.mouse.move(*self.place(row, column))
        self.settle()

    def click(self, row, column, **options):
        """A click on a pixel."""
        self.page.mouse.click(*self.place(row, column), **options)
        self.settle()

    def settle(self):
        """Wait until what is due has been drawn."""
        frame = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
        self.page.evaluate(frame)

    def download(self, button, folder):
        """The file that a button saves."""
        with self.page.expect_download() as waiting:
            self.press(button)
        download = waiting.value
        path = folder / download.suggested_filename
        assert os.path.basename(path) == download.suggested_filename
        download.save_as(path)
        return path
