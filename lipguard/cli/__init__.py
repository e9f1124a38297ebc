"""The `lipguard` command."""

from __future__ import annotations

from lipguard.cli.main import main

__all__ = ["main"]
