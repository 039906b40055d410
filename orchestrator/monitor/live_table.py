"""Something that people watch while work goes on: a live table in a terminal, lines in a log."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live

POLL_SECONDS = 1.0


class LiveTable:
    """Is looked at in the background while its `with` block runs, and once more at its end."""

    def __init__(self, console: Console, name: str) -> None:
        """name: of the thread that looks."""
        self._console = console
        self._over = threading.Event()
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def refresh(self) -> None:
        """Show what there is now: in `_live`, or where there is none the news, in lines."""
        raise NotImplementedError

    def print_final(self) -> None:
        """Show what is to stay in a terminal when the live table has gone."""

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self.refresh()
        if self._live is not None:
            self._live.stop()
            self.print_final()

    def _run(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            self.refresh()
