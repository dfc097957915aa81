"""SIGINT and SIGTERM during a run: at once while nothing is in work, after what is in work otherwise."""

import logging
import signal
import threading
from contextlib import contextmanager

logger = logging.getLogger("anyup_fast")

GRACE = 5.0  # seconds that what is in work has to finish


class Stopped(KeyboardInterrupt):
    """A signal that came while nothing was in work."""


class Stop:
    """Which signal came first, and what it does: called, it gives its number or None.

    Attributes:
        at_once: whether a signal raises `Stopped` where the program stands; else it is only noted, and a second SIGINT
            raises KeyboardInterrupt.
    """

    def __init__(self):
        self.caught, self.at_once = None, True

    def __call__(self):
        return self.caught

    def note(self, number, _):
        """The handler."""
        first, self.caught = self.caught is None, self.caught or number
        if self.at_once:
            raise Stopped
        if not first and number == signal.SIGINT:
            raise KeyboardInterrupt
        if first:
            logger.warning("%s: finishing what is being computed ...", signal.Signals(number).name)

    def install(self):
        """Be the handler of both signals, in the main thread; gives those that were, by number."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    @contextmanager
    def held(self, at_once=False):
        """Note signals in this block, and do nothing else (or the opposite)."""
        before, self.at_once = self.at_once, at_once
        try:
            yield self
        finally:
            self.at_once = before


@contextmanager
def stopping():
    """Handle both signals for a while, in the main thread; gives a `Stop`."""
    stop = Stop()
    before = stop.install()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
