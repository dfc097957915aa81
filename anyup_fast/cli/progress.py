"""What a command tells while it runs: each step with its time, or a bar."""

import logging
import time
from functools import partial

logger = logging.getLogger("anyup_fast")


class Steps:
    """Reports each step with the time it took."""

    def __init__(self):
        self.start = time.perf_counter()

    def done(self, text):
        """Report what took the time since the last report."""
        now = time.perf_counter()
        logger.info("%7.2f s  %s", now - self.start, text)
        self.start = now


def bar(disable, extra):
    """`tqdm` as the commands use it, silent with `disable`.

    Raises:
        RuntimeError: tqdm is missing; `extra` of this package brings it.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise RuntimeError(f"the progress bar needs tqdm: pip install 'anyup-fast[{extra}]'") from error
    return partial(tqdm, disable=disable, dynamic_ncols=True)
