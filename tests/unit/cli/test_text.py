"""The command line's screen: nothing is cut in a pipe, nothing is read as markup, and rich may be missing."""

import io
import sys

import pytest

from lipguard.cli.text import Screen, progress

NAME = "lightning_logs/version_12/checkpoints/" + "epoch=13-step=345613-" * 8 + "[red]x[/red].ckpt"
ROWS = [[("verified", "green"), NAME, "1.5"], [("refused", "red"), "b.ckpt", ""]]


def test_a_pipe_has_no_width(capsys):
    screen = Screen()
    screen.table(ROWS, ("", "file", "upper"), title="After all")
    screen.line(NAME, ("done", "bold"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "After all"
    assert lines[2] == f"verified  {NAME}  1.5"
    assert lines[3] == "refused   b.ckpt"
    assert lines[1].index("upper") == lines[2].index("1.5")
    assert lines[4] == f"{NAME} done"


def test_a_terminal_folds_names_and_reads_no_markup():
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=60, force_terminal=False)
    Screen(console).table(ROWS, ("", "file", "upper"))
    text = console.file.getvalue()
    column = "".join(line[10:50].strip() for line in text.splitlines())
    assert "…" not in text
    assert "[red]x[/red].ckpt" in column.replace(" ", "")


def test_without_rich_all_is_plain(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("Working", 2) as done:
        done(1)
    Screen().table(ROWS)
    assert NAME in capsys.readouterr().out


def test_another_encoding_gets_a_stand_in(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    Screen().line("l2 → l∞")
    stream.flush()
    assert stream.buffer.getvalue().decode("ascii").strip() == "l2 ? l?"
