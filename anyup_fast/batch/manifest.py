"""The record of a run: JSON lines in OUTPUT/manifest.jsonl, appended as pictures are done."""

import errno
import hashlib
import json
import os
import threading
from pathlib import Path

NAME = "manifest.jsonl"


class Manifest:
    """What was made, of what, with which settings; the last line about a name counts.

    Two kinds of lines: `{"settings": DIGEST, "is": {...}, "anyup_fast": VERSION}` before the first picture made with
    them, and one for each picture: `name`, `status` ("done" or "failed"), `settings` (the digest), `source`
    (`path`, `bytes`, `mtime_ns`, `sha256`; `size`, [H, W] of the picture as it is stored, and its EXIF `orientation`
    and number of `frames` where these are not 1; in a video `frame`, of several pages `page`), and `files` (relative
    path -> `bytes`, `sha256`) with `shape`, or `error`.

    A line that a killed process left unfinished is dropped when the manifest is opened for writing.

    Args:
        folder: of the run.

    Attributes:
        settings: digest -> settings. headers: digest -> their whole line. records: name -> its last line.

    Raises:
        ValueError: a damaged line before the last one.
    """

    def __init__(self, folder):
        self.path = Path(folder) / NAME
        self.settings, self.headers, self.records = {}, {}, {}
        self._lock = threading.Lock()
        text = self.path.read_bytes() if self.path.exists() else b""
        self._length = text.rfind(b"\n") + 1
        for number, line in enumerate(text[: self._length].splitlines(), 1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"{self.path}: line {number} is damaged ({error}); restore it, or remove it to have its picture "
                    "made again"
                ) from error

    def _take(self, record):
        if "is" in record:
            self.settings[record["settings"]], self.headers[record["settings"]] = record["is"], record
        else:
            self.records[record["name"]] = record

    def begin(self, settings, **about):
        """Make `settings` known if they are new; returns their digest."""
        digest = settings_digest(settings)
        if digest not in self.settings:
            self.add({"settings": digest, "is": settings, **about})
        return digest

    def add(self, record):
        """Append a line. When that fails (a full disk) the file is as before.

        Raises:
            OSError: the line could not be written.
        """
        try:
            line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        except UnicodeEncodeError:  # a name that is no text for this system; its escapes are
            line = (json.dumps(record) + "\n").encode()
        with self._lock:
            with open(self.path, "ab", buffering=0) as file:
                if file.tell() != self._length:
                    file.truncate(self._length)
                try:
                    if file.write(line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(self._length)
                    raise
            self._length += len(line)
            self._take(record)


def settings_digest(settings):
    """Twelve hexadecimal digits that stand for settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
