"""The process that audits: `python -m lipguard.audit.worker PARENT` takes markers on its input and answers on its output.

One JSON object a line: {"marker": path, "final": bool, "twin": path or null} in, the fields of an `Attempt` or {"error": ...}
out. The end of the input, which is also what a killed training leaves, ends the process at once, whatever it is doing:
the marker is still there.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve until the input ends."""
    _end_with_parent(int(sys.argv[1]))
    if hasattr(os, "nice"):
        with contextlib.suppress(OSError):
            os.nice(10)
    # What a solver prints must not be taken for an answer: the real output is kept aside.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()

    import torch

    from lipguard.audit.pending import attempt

    torch.set_num_threads(1)
    while True:
        job: dict[str, Any] = json.loads(jobs.get())
        twin = job.get("twin")
        answer: dict[str, Any]
        try:
            tried = attempt(Path(job["marker"]), final=job["final"], twin=None if twin is None else Path(twin))
            answer = tried.__dict__ | {"written": None if tried.written is None else str(tried.written)}
        except Exception as error:  # the answer carries it to the process that asked
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _end_with_parent(parent: int) -> None:
    """Where the kernel can do so, let it end this process with its parent: a solver may keep Python from seeing the input end."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the call
            os._exit(0)


def _read(jobs: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
