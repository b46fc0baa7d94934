"""How a command's process ends, whatever its streams, its signals and its errors are."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from cards import simulate
from rich.text import Text

from specdistill.cli import application, console
from specdistill.cli.process import interrupting_signals
from specdistill.cli.tables import rows_table
from specdistill.errors import InputError

COMPARE = (sys.executable, "-m", "specdistill", "compare")


@pytest.fixture
def cards(tmp_path: Path) -> list[str]:
    files = []
    for name, alpha in (("a", 0.7), ("b", 0.5)):
        files.append(str(tmp_path / f"{name}.json"))
        simulate({(0.0, 4): alpha}, draft=name).write(Path(files[-1]))
    return files


def end(monkeypatch: pytest.MonkeyPatch, error: BaseException, *options: str) -> int | str | None:
    """How `main` ends where the command raises an error."""

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(application, "app", fails)
    monkeypatch.setattr(sys, "argv", ["specdistill", "compare", *options])
    with pytest.raises(SystemExit) as ended:
        application.main()
    return ended.value.code


def test_what_nobody_foresaw_is_one_line_and_70(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(monkeypatch, ZeroDivisionError("division\nby zero \x1b[2J")) == 70
    said = capsys.readouterr().err
    assert said.startswith("error: ZeroDivisionError: division by zero")
    assert "run with --debug" in said
    assert said.count("\n") == 1
    assert "\x1b" not in said
    assert end(monkeypatch, ZeroDivisionError("division \x1b[2J"), "--debug") == 70
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert "in fails" in said
    assert "\x1b" not in said


def test_what_the_user_can_put_right_is_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out_of_memory = type("OutOfMemoryError", (RuntimeError,), {})
    full = "I/O error: No space left on device (os error 28)"  # safetensors'
    torn = "[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed"
    for error, words in (
        (InputError("name [another]"), "error: name [another]\n"),
        (MemoryError(), "--batch-size"),
        (out_of_memory("CUDA"), "--batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--batch-size"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: 64 bytes"), "--batch-size"),
        (RuntimeError("CUDA error: out of memory"), "--batch-size"),
        (OSError(28, "No space left on device", "x.json"), "x.json: No space left on device"),
        (NotADirectoryError(20, "Not a directory", "a/b"), "a/b: Not a directory"),
        (IsADirectoryError(21, "Is a directory", "a"), "a: Is a directory"),
        (RuntimeError(full), "make room"),
        (RuntimeError(torn), "make room"),
    ):
        assert end(monkeypatch, error) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert end(monkeypatch, RecursionError()) == 70


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_signals_end_work_as_an_interrupt_does(number: str) -> None:
    kill = getattr(signal, number)

    def killed() -> None:
        with interrupting_signals():
            os.kill(os.getpid(), kill)
            time.sleep(5)

    signal.signal(kill, signal.SIG_DFL)  # whatever ran the tests
    with pytest.raises(KeyboardInterrupt):
        killed()
    assert signal.getsignal(kill) is signal.SIG_DFL
    signal.signal(kill, signal.SIG_IGN)  # as `nohup` does
    try:
        with interrupting_signals():
            os.kill(os.getpid(), kill)
    finally:
        signal.signal(kill, signal.SIG_DFL)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_any_encoding_shows_the_result(cards: list[str], encoding: str) -> None:
    done = subprocess.run(
        [*COMPARE, *cards, "--json"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])
    assert b"speedup" in done.stderr


@pytest.mark.parametrize(
    "redirection", [">/dev/full", ">&-", "2>&-", ">/dev/full 2>&1", ">&- 2>&-", "| true"]
)
def test_a_stream_that_is_lost_ends_no_work(
    cards: list[str], tmp_path: Path, redirection: str
) -> None:
    out = tmp_path / "out.json"
    words = [*COMPARE, *cards, "--out", str(out)]
    line = f'set -o pipefail; "$@" {redirection}'
    done = subprocess.run(["bash", "-c", line, "_", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if redirection == ">/dev/full":
        assert "what was printed is lost: No space left on device" in done.stderr


def test_what_is_shown_is_no_markup_and_no_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.table import Table

    screen = console.screen_for(as_json=False)
    table = Table("a [/old]", title="[v2] :smile: \x1b[2J")
    table.add_row("[/x] \x9b2J [bold]b[/bold]")
    screen.print(table)
    console.print_lines(screen, ["[/y] \x07 line"])
    console.note("error: [red] \x1b]0;title\x07")
    with console.progress() as progress:
        progress("stage", 1, 1, "[/z] \x1b[31m")
    shown = capsys.readouterr()
    for words in ("a [/old]", "[v2] :smile:", "[/x]", "[bold]b[/bold]", "[/y] \\x07 line"):
        assert words in shown.out
    for words in ("[red]", "[/z]"):
        assert words in shown.err
    assert not {"\x1b", "\x9b", "\x07"} & set(shown.out + shown.err)


def test_bars_show_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = console.Screen()
    screen.file, screen._force_terminal = io.StringIO(), True
    monkeypatch.setattr(console, "err", screen)
    with console.progress() as progress:
        progress("stage", 0, 2, "a [/old] \x1b]0;title\x07")
        progress("stage", 2, 2, "b [v2]")
    shown = screen.file.getvalue()
    assert "b [v2]" in shown
    assert "\x1b]0;" not in shown


def test_no_other_writer_gives_the_terminal_orders(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Libraries write names into their warnings; rich alone may colour."""

    def warns(*_: Any, **__: Any) -> None:
        sys.stdout.write("a\x1b[2J\u202e\tb\n")
        sys.stderr.write("c\x9b2J\n")
        warnings.warn("e \x1b[31m", stacklevel=1)
        console.Screen().print(Text("f", style="red"))

    monkeypatch.setattr(application, "app", warns)
    monkeypatch.setattr(sys, "argv", ["specdistill", "env"])
    monkeypatch.setenv("FORCE_COLOR", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: sys.stderr.write(f"{message}\n")
        application.main()
    shown = capsys.readouterr()
    assert shown.out == "a\\x1b[2J\\u202e\tb\n\x1b[31mf\x1b[0m\n"
    assert "c\\x9b2J" in shown.err
    assert "e \\x1b[31m" in shown.err
    assert not {"\x1b", "\x9b", "\x07"} & set(shown.err)


@pytest.mark.parametrize("columns", ["1", "20", "79"])
def test_a_narrow_terminal_costs_no_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str
) -> None:
    card = simulate({(0.0, 4): 0.7, (1.0, 8): 0.6}, draft="a")
    monkeypatch.setenv("COLUMNS", "80")
    console.screen_for(as_json=False).print(rows_table(card))
    usual = capsys.readouterr().out
    assert "…" not in usual
    monkeypatch.setenv("COLUMNS", columns)
    console.screen_for(as_json=False).print(rows_table(card))
    assert capsys.readouterr().out == usual


def test_a_dumb_terminal_is_told_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = console.Screen()
    screen.file, screen._force_terminal = io.StringIO(), True
    monkeypatch.setattr(console, "err", screen)
    with console.progress() as progress:
        progress("stage", 0, 2, "a")
        assert "stage 0% a" in screen.file.getvalue()
