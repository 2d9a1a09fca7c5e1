"""What there is to compute with."""

from __future__ import annotations

import os


def cores() -> int:
    """CPU cores this process may use: those it is bound to, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
