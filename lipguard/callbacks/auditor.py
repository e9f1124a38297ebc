"""CheckpointAuditor: an exact constant, or the best enclosure in time, beside every checkpoint that is saved."""

from __future__ import annotations

import copy
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lipguard.audit.pending import Pending, drop, fail, pending_in, pending_path, prepare
from lipguard.audit.pool import Finished, Pool
from lipguard.audit.recipe import captured
from lipguard.audit.record import AuditRecord, read_record, record_path
from lipguard.audit.run import Options, Subject, describe
from lipguard.audit.weights import fingerprint
from lipguard.callbacks.asked import Asked, named, number, whole
from lipguard.callbacks.base import Callback
from lipguard.callbacks.checkpoint_saves import bypassed, watch
from lipguard.callbacks.progress import waiting
from lipguard.certificate import Ball, Box
from lipguard.errors import LimitExceeded, LipguardError, UnsupportedQuery
from lipguard.outward import narrowed, show_interval, show_lower
from lipguard.query import Inputs, Norm, Outputs

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["CheckpointAuditor"]


class CheckpointAuditor(Callback):
    """Audits every checkpoint saved (top-k, last, weights-only, manual, averaged weights) in a process of its own.

    Beside each checkpoint lies then `<checkpoint>.lipguard.json`: the enclosure of the network's Lipschitz constant with
    all the evidence, which `lipguard verify` re-checks without the training script. What is audited is the payload that is
    saved, not the module in training. The training does not wait; at its end the last audits are finished, within their
    time limits. If the training is killed, the next one, or `lipguard audit FOLDER`, finishes what was pending. An audit
    that fails is recorded as such.

    Logged at the step of the save, rounded outward so that it holds in a float32 sink: `{prefix}/upper` and
    `{prefix}/lower`, the verified ends; `{prefix}/gap`, (upper - lower) / upper; `{prefix}/status`, the number of
    `lipguard.audit.STATUS_CODES`: 0 closed, 1 gap reached, 2 time limit, 3 memory limit, 4 interrupted, 5 solver failed,
    6 bounds only (no exact method applies), 7 failed; `{prefix}/claimed_upper` where a mixed-integer solver claims a smaller
    upper end than the verified one.

    Args:
        domain: a `Box` or a `Ball` of inputs, or text such as "box:0,1"; None means all inputs.
        norm: 1, 2 or inf, or a pair (input, output) of them.
        method: exact method, as for `lipguard.exact`; "bounds" for none.
        solver: solver of the exact method, as for `lipguard.exact`.
        submodule: dotted name of the submodule to audit; None for the whole module's `forward`.
        max_workers: processes that audit at the same time, each with one thread and a lower priority.
        time_limit: seconds for one audit.
        every_n_checkpoints: audit every n-th step at which a checkpoint is saved.
        max_lipschitz: limit that the verified upper bound must keep; None for no limit.
        on_violation: "warn", "stop" (the training ends in good order) or "raise" (`LimitExceeded` at the next hook) when a
            verified upper bound is above the limit. The message says whether the constant itself is above it, or
            whether that is undecided because the lower bound is not.
        prefix: first part of the names logged.
        example: an input of the network, or of the submodule; None takes the module's `example_input_array`, or else what
            `forward` is called with in training.
        gap: relative gap at which an audit is closed.
        outputs, inputs: what of the outputs, and with respect to what, as for `lipguard.bound`: outputs="policy.logits" for one
            of several tensors that the network returns.

    Example::

        trainer = Trainer(callbacks=[CheckpointAuditor(domain=Box(0.0, 1.0), time_limit=60)])
    """

    def __init__(
        self,
        domain: Box | Ball | str | dict[str, Any] | None = None,
        norm: Norm = 2,
        method: str = "auto",
        solver: str = "auto",
        submodule: str | None = None,
        max_workers: int = 1,
        time_limit: float = 60.0,
        every_n_checkpoints: int = 1,
        max_lipschitz: float | None = None,
        on_violation: Literal["warn", "stop", "raise"] = "warn",
        prefix: str = "lipschitz/audit",
        example: Any = None,
        gap: float = 1e-6,
        outputs: Outputs | list[Any] | None = None,
        inputs: Inputs | list[Any] | None = None,
    ) -> None:
        super().__init__()
        who = "CheckpointAuditor"
        self.asked = Asked(who, norm=norm, domain=domain, submodule=submodule, outputs=outputs, inputs=inputs, example=example)
        self.options = Options(method=method, solver=solver, time_limit=time_limit, gap=gap, query=self.asked.query)
        with named(who):
            self.options.check()
        whole(who, max_workers=max_workers, every_n_checkpoints=every_n_checkpoints)
        if on_violation not in ("warn", "stop", "raise"):
            raise UnsupportedQuery(f"CheckpointAuditor: on_violation={on_violation!r} must be 'warn', 'stop' or 'raise'.")
        if max_lipschitz is not None:
            number(who, "a finite number >= 0", lambda value: value >= 0, max_lipschitz=max_lipschitz)
        self.prefix = prefix
        self.max_workers, self.every_n_checkpoints = max_workers, every_n_checkpoints
        self.max_lipschitz, self.on_violation = max_lipschitz, on_violation
        self.records: dict[Path, AuditRecord] = {}
        self._pool = Pool(max_workers)
        self._saves, self._saved_step = 0, -1
        self._digests: dict[str, Path] = {}
        self._twins: dict[Path, Path] = {}
        self._saver = 0
        self._prepared: dict[Path, Path | None] = {}
        self._written: deque[Path] = deque()
        self._violation: str | None = None
        self._fitting, self._resumed, self._warned = False, False, set[str]()
        self.preparing_seconds = 0.0
        self._undo: Callable[[], None] | None = None

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """The count of saves, for `every_n_checkpoints`."""
        return {"saves": self._saves, "saved_step": self._saved_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self._saves, self._saved_step, self._resumed = state_dict["saves"], state_dict["saved_step"], True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watches the Trainer's checkpoints.

        Raises:
            UnsupportedQuery: a second CheckpointAuditor would write the same files.
        """
        if stage != "fit" or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue] - set outside __init__
            return
        others: list[object] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue] - set outside __init__
        if sum(isinstance(callback, CheckpointAuditor) for callback in others) > 1:
            raise UnsupportedQuery(
                "two CheckpointAuditors would write the same <checkpoint>.lipguard.json. Keep one, and audit for another norm "
                "or domain afterwards, on a copy of the checkpoints, with lipguard audit."
            )
        sharding = bypassed(trainer)
        if sharding is not None:
            warnings.warn(
                f"CheckpointAuditor audits nothing: {sharding} shards the network or its checkpoints, so that no payload holds "
                "it. Consolidate a checkpoint into one file, then run lipguard audit --model on it.",
                stacklevel=2,
            )
            return
        if self._undo is not None:
            self._undo()
        self._fitting = True
        if trainer.is_global_zero:
            self._undo = watch(
                trainer,
                lambda payload, path: self._before(trainer, payload, Path(os.path.abspath(path)), remote="://" in path),
                lambda path: self._after(trainer, Path(os.path.abspath(path))),
                lambda path: self._removed(Path(os.path.abspath(path))),
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes up the audits that an earlier training left pending.

        Raises:
            UnknownName: the module has no such submodule.
        """
        self.asked.check(pl_module)
        if self._undo is None:
            return
        if not trainer.checkpoint_callbacks:
            self._warn(
                "the Trainer has no ModelCheckpoint: only what trainer.save_checkpoint writes is audited. Add one to the "
                "Trainer's callbacks."
            )
        callbacks: list[Any] = trainer.checkpoint_callbacks
        folders = {getattr(callback, "dirpath", None) for callback in callbacks}
        if trainer.ckpt_path:
            folders.add(os.path.dirname(os.path.abspath(trainer.ckpt_path)))
        for marker in pending_in(folder for folder in folders if folder and "://" not in str(folder)):
            self._pool.submit(marker, self.options.time_limit, final=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the save that is resumed from: its own state was taken before it was counted."""
        if self._resumed:
            self._count(trainer.global_step)
        self._resumed = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers the first sample of the first batch."""
        self.asked.see(pl_module, batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Takes in what has been audited."""
        self._advance(trainer)
        self._act(trainer, together=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes in what has been audited."""
        self._advance(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes in what has been audited, and lets all ranks act on it."""
        self._advance(trainer)
        self._act(trainer, together=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finishes the last audits behind a progress bar."""
        if self._undo is not None:
            self._finish(trainer)
        self._fitting = False
        self._act(trainer, together=True, last=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the workers; what they were at stays pending."""
        self._advance(trainer)
        self._fitting = False
        self._pool.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the workers."""
        self._fitting = False
        self._pool.close()

    def _before(self, trainer: Trainer, payload: dict[str, Any], path: Path, remote: bool) -> None:
        """Write the marker of a checkpoint that is about to be saved."""
        self._saver = threading.get_ident()
        self._count(trainer.global_step)
        if self._saves % self.every_n_checkpoints:
            self._prepared[path] = None
            return
        if remote:
            self._warn(
                f"{path.name} is not on this machine's file system and was not audited. Fetch it, then run lipguard audit."
            )
            return
        try:
            started = time.monotonic()
            subject = self._subject(trainer, payload)
            path.parent.mkdir(parents=True, exist_ok=True)
            expects = {"fingerprint": fingerprint(payload.get("state_dict", payload))}
            self._prepared[path] = prepare(path, Pending(expects, subject, self.options))
            if subject.recipe is not None:
                # The last.ckpt beside the best one often holds the same weights: one search serves both.
                first = self._digests.setdefault(subject.recipe["digest"], path)
                self._twins[path] = first
            self.preparing_seconds += time.monotonic() - started
        except Exception as error:  # the checkpoint must be written, whatever becomes of its audit
            self._warn(f"{path.name} is not audited: {type(error).__name__}: {error}")

    def _count(self, step: int) -> None:
        if step != self._saved_step:
            self._saves, self._saved_step = self._saves + 1, step

    def _subject(self, trainer: Trainer, payload: dict[str, Any]) -> Subject:
        """The network in the payload: a copy of the module, given the weights that are saved."""
        module = trainer.lightning_module
        query = self.options.query
        try:
            query = self.asked.at(trainer, module)
            with torch.inference_mode(False), torch.no_grad():
                # Lightning leaves the Trainer out of a module's copies.
                double = copy.deepcopy(module).to("cpu")
                double.load_state_dict(payload["state_dict"], strict=True)
                _, recipe = captured(double, query.example, submodule=query.submodule, outputs=query.outputs, inputs=query.inputs)
            return Subject(describe(module, query.example, query.submodule), recipe)
        except Exception as error:  # recorded in the checkpoint's record; the training goes on
            failure = " ".join(f"{type(error).__name__}: {error}".split())
            self._warn(f"a checkpoint's network cannot be audited: {failure}")
            return Subject(describe(module, query.example, query.submodule), None, failure)

    def _after(self, trainer: Trainer, path: Path) -> None:
        self._written.append(path)
        # AsyncCheckpointIO writes in a thread of its own, with which its workers would end; the next hook starts them.
        if threading.get_ident() == self._saver:
            self._submit()
            if not self._fitting:
                self._finish(trainer)
                self._pool.close()

    def _submit(self) -> None:
        while self._written:
            path = self._written.popleft()
            marker = self._prepared.get(path)
            if marker is not None:
                twin = self._twins.get(path)
                self._pool.submit(marker, self.options.time_limit, final=False, twin=None if twin is None else record_path(twin))
            elif path in self._prepared:
                drop(path)  # a version that is not audited has replaced one that was

    def _removed(self, path: Path) -> None:
        self._pool.cancel(pending_path(path))
        for table in (self._prepared, self._twins):
            table.pop(path, None)
        self._digests = {digest: first for digest, first in self._digests.items() if first != path}
        self.records.pop(path, None)
        drop(path)

    def _advance(self, trainer: Trainer) -> None:
        """Start what is written, log what is finished."""
        self._submit()
        for finished in self._pool.collect():
            record = self._record(finished)
            if record is not None:
                if finished.result == "done":
                    self.records[finished.checkpoint] = record
                self._log(trainer, record)
                self._judge(record)

    def _record(self, finished: Finished) -> AuditRecord | None:
        record = finished.record
        if finished.result == "failed":
            try:
                fail(pending_path(finished.checkpoint), finished.error or "the audit failed.")
                self.records[finished.checkpoint] = record = read_record(record_path(finished.checkpoint))
            except (LipguardError, OSError) as error:
                self._warn(f"the audit of {finished.checkpoint.name} left no record: {finished.error or error}")
        if record is not None and record.failure is not None:
            self._warn(f"the audit of {finished.checkpoint.name} recorded a failure: {record.failure}")
        return record

    def _log(self, trainer: Trainer, record: AuditRecord) -> None:
        values: dict[str, float] = {"status": float(record.code)}
        if record.enclosure is not None:
            values |= {name: record.enclosure[name] for name in ("upper", "lower", "gap", "claimed_upper")}
        metrics = {f"{self.prefix}/{k}": float(narrowed(v, k)) for k, v in values.items() if v is not None}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=record.step)

    def _judge(self, record: AuditRecord) -> None:
        limit, upper, lower = self.max_lipschitz, record.upper, record.lower
        if limit is None or (upper is not None and upper <= limit):
            return
        name = record.checkpoint["name"]
        if upper is None or lower is None:
            text = f"{name}: whether its Lipschitz constant keeps to {limit:g} is undecided, as its audit failed."
        elif lower > limit:
            text = f"{name}: its Lipschitz constant, at least {show_lower(lower)}, exceeds the limit {limit:g}."
        else:
            text = (
                f"{name}: its Lipschitz constant in {show_interval(lower, upper)} is not shown to keep to {limit:g}: undecided."
            )
        self._violation = self._violation or text
        if self.on_violation != "raise":
            warnings.warn(f"CheckpointAuditor: {text}", stacklevel=2)

    def _act(self, trainer: Trainer, *, together: bool, last: bool = False) -> None:
        """Stop or raise on a violation; all ranks together where there are several."""
        if self.max_lipschitz is None or self.on_violation == "warn":
            return
        violation = self._violation
        if trainer.world_size > 1 and not last:  # at the very end the strategy is torn down; rank 0 then speaks for all
            if not together:
                return
            violation = trainer.strategy.broadcast(violation)
        if violation is None:
            return
        self._violation = None
        if self.on_violation == "raise":
            raise LimitExceeded(violation)
        if not last:
            trainer.should_stop = True

    def _finish(self, trainer: Trainer) -> None:
        """Wait for what is open, showing how far it is, no longer than its time limits allow."""
        self._advance(trainer)
        total = self._pool.open
        if not total:
            return
        deadline = time.monotonic() + self._pool.patience
        with waiting("Auditing the last checkpoints", total, trainer.progress_bar_callback is not None) as done:
            while self._pool.open and time.monotonic() < deadline:
                self._pool.wait(0.2)
                self._advance(trainer)
                done(total - self._pool.open)
        if self._pool.open:
            self._warn(f"{self._pool.open} audits did not end in time; lipguard audit finishes them.")

    def _warn(self, text: str) -> None:
        """Warn once about each kind of trouble."""
        kind = text.partition(": ")[2] or text
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"CheckpointAuditor: {text}", stacklevel=2)
