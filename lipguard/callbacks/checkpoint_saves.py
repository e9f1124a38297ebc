"""Seeing every checkpoint that a Trainer writes and removes, with its exact payload."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["bypassed", "watch"]


def watch(
    trainer: Trainer,
    before: Callable[[dict[str, Any], str], None],
    after: Callable[[str], None],
    removed: Callable[[str], None],
) -> Callable[[], None]:
    """Call back around every save and removal of the Trainer's `checkpoint_io`, until the function returned is called.

    The plugin's own methods are wrapped in place, so that it keeps its class. `before` gets the payload and runs in the
    thread that saves, before anything is written. `after` and `removed` belong to the innermost plugin, which does the
    writing: with AsyncCheckpointIO `after` runs in its thread, when the file is there.
    """
    outer: Any = trainer.strategy.checkpoint_io
    inner: Any = outer
    while getattr(inner, "_checkpoint_io", None) is not None:
        inner = inner._checkpoint_io
    save, write, remove = outer.save_checkpoint, inner.save_checkpoint, inner.remove_checkpoint

    def wrote(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        after(_path(args, kwargs, 1))
        return result

    def saved(*args: Any, **kwargs: Any) -> Any:
        before(args[0] if args else kwargs["checkpoint"], _path(args, kwargs, 1))
        return wrote(*args, **kwargs) if inner is outer else save(*args, **kwargs)

    def took(*args: Any, **kwargs: Any) -> Any:
        result = remove(*args, **kwargs)
        removed(_path(args, kwargs, 0))
        return result

    inner.save_checkpoint, inner.remove_checkpoint = wrote, took
    outer.save_checkpoint = saved

    def undo() -> None:
        for plugin, names in ((outer, ("save_checkpoint",)), (inner, ("save_checkpoint", "remove_checkpoint"))):
            for name in names:
                plugin.__dict__.pop(name, None)

    return undo


def bypassed(trainer: Trainer) -> str | None:
    """Name of the strategy if it shards the network or its checkpoints, so that no payload holds the network; else None."""
    strategy = trainer.strategy
    name = type(strategy).__name__
    return name if name in ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy") else None


def _path(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> str:
    return str(args[position] if len(args) > position else kwargs["path"])
