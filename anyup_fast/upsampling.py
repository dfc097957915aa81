"""Former name of `anyup_fast.prepared` and `anyup_fast.heads`, kept for who imports from it."""

from .heads import linear_head, load_head
from .prepared import Prepared

__all__ = ["Prepared", "linear_head", "load_head"]
