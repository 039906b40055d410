"""Printable output: console, streams, logs, tracebacks and warnings without credentials and control characters."""

from __future__ import annotations

import io
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from orchestrator.config.redaction import make_printable

_KEPT_WHITESPACE = "\n\t"  # of a text of several lines


class PrintableConsole(Console):
    """A rich console that prints every text literally: no markup, no credentials, no escapes."""

    def __init__(self, **options: Any) -> None:
        """Take the options of `rich.console.Console`."""
        # Names of classes and files come from users: brackets in a name are no style, ":car:" is no picture.
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text as rich does, made printable first."""
        return super().render_str(make_printable(text, keep=_KEPT_WHITESPACE), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Return the segments of a renderable, its texts made printable first."""
        if isinstance(renderable, Text):
            shown = make_printable(renderable.plain, keep=_KEPT_WHITESPACE)
            if shown != renderable.plain:
                renderable = renderable.blank_copy(shown)
        return super().render(renderable, options)


def prepare_output() -> None:
    """Make all further output of this process printable; characters that a stream's encoding lacks become escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(_PrintableLogRecord)
    # Another hook, such as a debugger's, stays.
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_uncaught
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _print_uncaught_in_thread
    warnings.formatwarning = _format_warning


class _PrintableLogRecord(logging.LogRecord):
    """A log record, of this project or a library, whose message and traceback are printable."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        if self.exc_info:
            self.exc_text = _format_traceback(*self.exc_info)  # which a formatter then takes as it is

    def getMessage(self) -> str:
        return make_printable(super().getMessage(), keep=_KEPT_WHITESPACE)


def _format_traceback(kind: Any, error: Any, trace: Any) -> str:
    return make_printable("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), keep=_KEPT_WHITESPACE)


def _print_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(_format_traceback(kind, error, trace) + "\n")


def _print_uncaught_in_thread(uncaught: threading.ExceptHookArgs) -> None:
    kind, error, trace, thread = uncaught
    if kind is not SystemExit:
        sys.stderr.write(f"Exception in thread {make_printable(thread.name if thread else 'unknown')}:\n")
        _print_uncaught(kind, error or kind(), trace)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return make_printable(f"{filename}:{lineno}: {category.__name__}: {message}\n", keep=_KEPT_WHITESPACE)
