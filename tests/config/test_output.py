"""Printable output of processes."""

import io
import logging
import subprocess
import sys

import pytest
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.config.output import PrintableConsole, prepare_output

# Names as others give them: markup and a picture of rich's, a terminal's escape, a password.
NAMES = ("[bold]a", "a[/x]", "[/]", ":car:", "a\x1b[2Jb", "a\x1b]0;title\x07", "a\u202eb", "http://u:PW@h/x")
SHOWN = ("[bold]a", "a[/x]", "[/]", ":car:", r"a\x1b[2Jb", r"a\x1b]0;title\x07", r"a\u202eb", "http://h/x")


@pytest.mark.parametrize(("name", "shown"), zip(NAMES, SHOWN, strict=True))
def test_a_name_is_printed_literally_wherever_rich_shows_it(name: str, shown: str) -> None:
    screen = PrintableConsole(width=200, file=io.StringIO())
    table = Table(title=f"title {name}", caption=f"caption {name}")
    table.add_column(f"column {name}")
    table.add_row(f"cell {name}")
    table.add_row(Text(f"text {name}", style="bold"))
    screen.print(f"line {name}")
    screen.print(table)
    with Live(Text(f"live {name}"), console=screen, auto_refresh=False):
        pass
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    # rich itself drops a bell from a Text.
    for where in ("line", "title", "caption", "column", "cell"):
        assert f"{where} {shown}" in text
    for where in ("text", "live"):
        assert f"{where} {shown.replace(chr(92) + 'x07', '')}" in text
    assert not set("\x1b\x07\u202e") & set(text)
    assert "PW" not in text


def test_a_style_stays_where_nothing_has_to_be_escaped() -> None:
    screen = PrintableConsole(width=80, file=io.StringIO(), force_terminal=True, color_system="standard")
    screen.print(Text("plain", style="bold"))
    assert screen.file.getvalue() == "\x1b[1mplain\x1b[0m\n"  # type: ignore[attr-defined]


def test_a_log_line_and_its_traceback_are_printable(caplog: pytest.LogCaptureFixture) -> None:
    factory = logging.getLogRecordFactory()
    try:
        prepare_output()
        try:
            raise ValueError("http://u:PW@h/x \x1b[2J")
        except ValueError:
            logging.getLogger("a.library").warning("at %s", "s3://u:PW@b/x\x1b[2J", exc_info=True)
    finally:
        logging.setLogRecordFactory(factory)
    assert r"at s3://b/x\x1b[2J" in caplog.text
    assert r"ValueError: http://h/x \x1b[2J" in caplog.text
    assert "PW" not in caplog.text and "\x1b" not in caplog.text


@pytest.mark.process
@pytest.mark.parametrize("where", ["main", "thread", "warning"])
def test_uncaught_errors_are_printable(where: str) -> None:
    code = f"""
import threading, warnings
from orchestrator.config.output import prepare_output
prepare_output()
text = "http://u:PW@h/x \\x1b[2J"
def fail(): raise RuntimeError(text)
if {where!r} == "warning": warnings.warn(text)
elif {where!r} == "main": fail()
else:
    thread = threading.Thread(target=fail); thread.start(); thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert r"http://h/x \x1b[2J" in done.stderr
    assert "PW" not in done.stderr and "\x1b" not in done.stderr
    assert (done.returncode == 1) == (where == "main")
