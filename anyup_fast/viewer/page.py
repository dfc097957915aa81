"""The page: its data and files put together to one text, which is written or shown."""

import html
import json
import os
import re
from pathlib import Path

from ..files import written_aside
from . import SCRIPTS

FILES = Path(__file__).parent
HEIGHT = 760  # pixels of the frame in a notebook


class Page:
    """What `view` returns. The last value of a notebook's cell, it is shown there.

    Attributes:
        html: the page, one text without references to anything outside.
        names: of the pictures.
    """

    def __init__(self, data):
        """`data`: what the page's scripts read."""
        self.html, self.names = _filled(data), [picture["name"] for picture in data["pictures"]]

    @property
    def size(self):
        """Bytes of the file."""
        return len(self.html.encode())

    def write(self, path):
        """Write the page; a file that is there already is replaced when the whole page has been written.

        Args:
            path: of the file, which should end in ".html" for a browser to take it as a page.

        Returns:
            pathlib.Path, the file.

        Raises:
            OSError: it can't be written.
        """
        with written_aside(path) as aside:
            aside.write_bytes(self.html.encode())
        return Path(os.path.expanduser(os.fspath(path)))

    def __repr__(self):
        count = f"{len(self.names)} picture{'s'[: len(self.names) != 1]}"
        return f"<Page of {count}, {self.size / 1e6:.1f} MB; write it with .write('page.html')>"

    def _repr_html_(self):
        """The page in a frame of its own, which can reach neither the notebook around it nor the network."""
        return (
            f'<iframe title="Features of {html.escape(", ".join(self.names))}" sandbox="allow-scripts allow-downloads" '
            f'style="width: 100%; height: {HEIGHT}px; border: 0" srcdoc="{html.escape(self.html)}"></iframe>'
        )


def _filled(data):
    """The template with its marks replaced, by text that ends none of the elements that it stands in."""
    scripts = [(FILES / name).read_text(encoding="utf-8") for name in SCRIPTS]
    parts = {
        "title": html.escape(data["title"]),
        "style": f"<style>\n{(FILES / 'style.css').read_text(encoding='utf-8')}</style>",
        "data": f'<script type="application/json" id="data">{as_json(data)}</script>',
        "script": "\n".join(f"<script>\n{script}</script>" for script in scripts),
    }
    template = (FILES / "page.html").read_text(encoding="utf-8")
    return re.sub(r"<!-- (title|style|data|script) -->", lambda mark: parts[mark[1]], template)


def as_json(data):
    """JSON that may stand in a script of HTML: no "<" in it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
