"""How much of the machine's memory this process has used."""

from __future__ import annotations

import os


def memory_share() -> float:
    """Peak resident memory of the process as a share of the machine's; 0 where either is unknown."""
    try:
        import resource

        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ImportError, ValueError, OSError, AttributeError):
        return 0.0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return used * (1 if os.uname().sysname == "Darwin" else 1024) / total
