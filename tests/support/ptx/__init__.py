"""x"""

from .launch import launcher
from .machine import run
from .report import Fault, Report
from .syntax import Unsupported

__all__ = ["Fault", "Report", "Unsupported", "launcher", "run"]
