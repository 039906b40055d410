"""Thread pool that does the same work on every shard, with progress on the screen or in the log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from orchestrator.storage import ranged_reads

T = TypeVar("T")
R = TypeVar("R")

# A log has no moving bar; it gets a line at times.
LOG_SECONDS = 60.0


class _StoppedError(Exception):
    """Another item failed: the rest is not needed."""


def run_on_shards(
    items: Sequence[T],
    work: Callable[[T, Callable[[int], None]], R],
    receive: Callable[[int, R], None],
    threads: int,
    console: Console,
    title: str,
    total_bytes: int,
) -> None:
    """Do `work(item, tick)` on all items and hand each result to `receive(number, result)` here, as they are done.

    `tick(bytes)` is to be called as bytes are read; it ends the work when another item's work, `receive` or Ctrl-C
    raised, which is then raised here. After Ctrl-C no read that waits for a store is waited for.
    """
    stop = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=total_bytes)

        def tick(count: int) -> None:
            if stop.is_set():
                raise _StoppedError
            bar.advance(task, count)

        def do(item: T) -> R:
            tick(0)
            try:
                return work(item, tick)
            except BaseException:
                # Here, because this thread takes its next item before the collecting one sees the failure.
                stop.set()
                raise

        pool = ThreadPoolExecutor(threads)
        try:
            pending = {pool.submit(do, item): number for number, item in enumerate(items)}
            _collect_results(pending, receive, console, title)
        except KeyboardInterrupt:
            stop.set()
            ranged_reads.close_all_readers()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        pool.shutdown()


def _collect_results(
    pending: dict[Future[R], int], receive: Callable[[int, R], None], console: Console, title: str
) -> None:
    reported = time.monotonic()
    for done, future in enumerate(as_completed(pending), start=1):
        if isinstance(future.exception(), _StoppedError):
            continue  # the failure for which it was stopped is still to come
        receive(pending[future], future.result())
        if not console.is_terminal and time.monotonic() - reported > LOG_SECONDS:
            reported = time.monotonic()
            console.print(f"{title}: {done} of {len(pending)} shards", highlight=False)
