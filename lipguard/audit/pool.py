"""Worker processes of an audit, seen from the process that asks: never waits unless told to, leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lipguard.audit.pending import Attempt, checkpoint_of, commit
from lipguard.audit.record import AuditRecord
from lipguard.errors import LipguardError

__all__ = ["Finished", "Pool"]

GRACE = 15.0
"""Seconds beyond its time limit that an audit may take: start of the process, checks, writing."""

_TRIES = 2
"""A worker that dies takes its job to one more worker; then the job failed."""

_WORTH = 5.0
"""Seconds of work on a checkpoint that is gone after which its process is ended."""

_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Finished:
    """The end of a job.

    Attributes:
        checkpoint: the file audited.
        result: as of `commit`, or "failed" where no worker could finish it.
        error: why it failed.
        record: what was found, also where a later save has replaced the version audited.
    """

    checkpoint: Path
    result: str
    error: str | None = None
    record: AuditRecord | None = None


@dataclass(eq=False)
class _Job:
    marker: Path
    limit: float
    final: bool
    twin: Path | None
    tries: int = 0
    abandoned: bool = False


class _Worker:
    """One process, and the thread that waits for its answers."""

    def __init__(self, answers: deque[tuple[_Worker, dict[str, Any] | None]], bell: threading.Condition) -> None:
        environment = os.environ | dict.fromkeys(_ENVIRONMENT, "1")
        # The package must be found wherever this process found it; the user's script is never imported.
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lipguard.audit.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C is for the training; it decides what becomes of the workers
        )
        self.job: _Job | None = None
        self.given = self.deadline = 0.0
        self._answers, self._bell = answers, bell
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def give(self, job: _Job) -> None:
        """Hand over a job."""
        self.job, self.given = job, time.monotonic()
        self.deadline = self.given + job.limit + GRACE
        line = {"marker": str(job.marker), "final": job.final, "twin": None if job.twin is None else str(job.twin)}
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it died: the listener says so
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        """End the process now and wait for its end. Its thread ends with it, once it can tell so."""
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):  # what was not yet handed over is lost with the process
                self.process.stdin.close()

    def join(self) -> None:
        """Wait for the thread, which needs the bell for its last word: not to be called while holding it."""
        self._thread.join()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as answers:
            for line in answers:
                self._tell(json.loads(line))
        self._tell(None)

    def _tell(self, answer: dict[str, Any] | None) -> None:
        with self._bell:
            self._answers.append((self, answer))
            self._bell.notify_all()


class Pool:
    """Up to `size` workers, started when there is work.

    Call it from the thread that lives as long as the work: on Linux a worker ends with the thread that started it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._jobs: deque[_Job] = deque()
        self._workers: list[_Worker] = []
        self._answers: deque[tuple[_Worker, dict[str, Any] | None]] = deque()
        self._bell = threading.Condition(threading.RLock())
        self._finished: deque[Finished] = deque()

    def submit(self, marker: Path, limit: float, *, final: bool, twin: Path | None = None) -> None:
        """Queue the audit that a marker asks for; a queued one of the same marker is replaced."""
        with self._bell:
            self._jobs = deque(job for job in self._jobs if job.marker != marker)
            self._jobs.append(_Job(marker, limit, final, twin))
            self._advance()

    def cancel(self, marker: Path) -> None:
        """Forget the audit of a checkpoint that is gone."""
        with self._bell:
            self._jobs = deque(job for job in self._jobs if job.marker != marker)
            for worker in [w for w in self._workers if w.job is not None and w.job.marker == marker]:
                assert worker.job is not None
                worker.job.abandoned = True
                # A new process takes as long to start as a short audit to end.
                if time.monotonic() - worker.given > _WORTH:
                    self._discard(worker)
            self._advance()

    def collect(self) -> list[Finished]:
        """What has finished since the last call."""
        with self._bell:
            self._advance()
            found = list(self._finished)
            self._finished.clear()
            return found

    def wait(self, seconds: float) -> None:
        """Return when something has finished, nothing is left to do, or the seconds are over."""
        with self._bell:
            self._advance()
            if self.open and not self._finished:
                self._bell.wait(seconds)
                self._advance()

    @property
    def open(self) -> int:
        """Jobs that run or wait."""
        with self._bell:
            return len(self._jobs) + sum(worker.job is not None for worker in self._workers)

    @property
    def patience(self) -> float:
        """Seconds within which all that is open will have ended, by its time limits."""
        with self._bell:
            running = [max(w.deadline - time.monotonic(), 0.0) for w in self._workers if w.job is not None]
            waiting = [(job.limit + GRACE) * (_TRIES - job.tries) for job in self._jobs]
            return max(running, default=0.0) * _TRIES + sum(waiting) / self.size + max(waiting, default=0.0)

    def close(self) -> None:
        """End every worker; audits that were not finished keep their markers."""
        with self._bell:
            self._jobs.clear()
            workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()
            worker.join()
        with self._bell:
            self._answers.clear()

    def _advance(self) -> None:
        while self._answers:
            worker, answer = self._answers.popleft()
            if worker not in self._workers or (worker.job is None and answer is not None):
                continue
            job = worker.job
            if answer is None:
                self._discard(worker)
                if job is not None:
                    self._retry(job, f"the audit's process ended by itself (exit code {worker.process.returncode}).")
            elif job is not None:
                worker.job = None
                self._take(job, answer)
        for worker in [w for w in self._workers if w.job is not None and time.monotonic() > w.deadline]:
            job = worker.job
            self._discard(worker)
            if job is not None:
                job.tries = _TRIES  # a second run would only last as long again
                self._retry(job, f"the audit did not end within {job.limit:g} s + {GRACE:g} s and was stopped.")
        while self._jobs:
            idle = next((w for w in self._workers if w.job is None), None)
            if idle is None and len(self._workers) >= self.size:
                break
            if idle is None:
                idle = _Worker(self._answers, self._bell)
                self._workers.append(idle)
            idle.give(self._jobs.popleft())

    def _take(self, job: _Job, answer: dict[str, Any]) -> None:
        checkpoint = checkpoint_of(job.marker)
        error = answer.get("error")
        if error is None:
            written = answer["written"]
            tried = Attempt(answer["result"], answer["identity"], answer["current"], None if written is None else Path(written))
            try:
                result, record = commit(job.marker, tried)
            except (LipguardError, OSError) as trouble:
                error = f"{type(trouble).__name__}: {trouble}"
            else:
                if not job.abandoned:
                    self._finished.append(Finished(checkpoint, result, None, record))
                return
        if not job.abandoned:
            self._finished.append(Finished(checkpoint, "failed", error))

    def _retry(self, job: _Job, reason: str) -> None:
        job.tries += 1
        if job.abandoned:
            return
        if job.tries < _TRIES:
            self._jobs.appendleft(job)
        else:
            self._finished.append(Finished(checkpoint_of(job.marker), "failed", reason))

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()
