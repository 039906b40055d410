"""`shards.py pack`: shards packed by tasks on a cluster, or by threads of this process without one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from orchestrator.config.printable import printable
from orchestrator.data import digits, manifest, pack_report, pack_state, packing
from orchestrator.data.errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.data.pack_config import Pack
from orchestrator.data.pack_state import Plan, ShardId
from orchestrator.data.packing import Packing
from orchestrator.data.shard_packing import Entry, pack_shard
from orchestrator.data.sources.config import DigitsSource
from orchestrator.launch import cluster, interrupt, pool
from orchestrator.launch.command import console
from orchestrator.launch.environment import is_submitted
from orchestrator.launch.interrupt import Interruption
from orchestrator.storage import files, ranged, urls

Results = Iterator[tuple[int, Any]]

# Reads of a task that are under way side by side; its CPU decodes what came.
TASK_THREADS = 4
LOCAL_SHARDS = 4
GRACE_SECONDS = 5.0
# A log has no moving bar; it gets a line now and then.
LOG_SECONDS = 30.0


def pack(config: Pack) -> int:
    """Pack a dataset, or go on with packing it; the exit status. Raises ConfigError, DataError or StorageError."""
    config, screen = config.resolved(), console()

    def say(text: str) -> None:
        screen.print(text, highlight=False, markup=False, soft_wrap=True)

    if isinstance(config.source, DigitsSource):
        return _pack_digits(config, say)
    if config.dry_run:
        _show(packing.preview(config, say), say)
        return 0
    begun = packing.begin(config, say)
    if isinstance(begun, Manifest):
        say(f"already packed: {_told(config.url, begun)}")
        return 0
    _show(begun.plan, say)
    with interrupt.handled() as interruption:
        entries = _pack_shards(begun, screen, interruption, say)
        if interruption.event.is_set():
            say("stopped; the same command goes on where it was")
            return interruption.exit_status
    made = packing.conclude(begun, entries)
    screen.print(pack_report.table(begun.plan, entries))
    if summary := pack_report.describe_left_out(begun.plan, entries):
        say(summary)
    for bad in pack_report.left_out(entries)[: pack_report.SHOWN]:
        say(printable(f"left out: {bad.key} ({bad.source}): {bad.reason}"))
    say(f"packed: {_told(config.url, made)}; report: {urls.redact(files.join(config.url, pack_report.NAME))}")
    return 0


def _pack_shards(
    begun: Packing, screen: Console, interruption: Interruption, say: Callable[[str], None]
) -> dict[ShardId, Entry]:
    """The entries of all shards, those of an earlier start too; fewer when interrupted.

    Raises DataError as soon as too many images are broken.
    """
    entries = dict(begun.done)
    left = begun.left()
    _refuse_broken(begun, entries)
    with _results(begun, left, interruption.event.is_set, say) as results, _progress(begun, screen, say) as advance:
        for number, raw in results:
            entries[left[number]] = Entry.from_dict(raw)
            advance(entries)
            _refuse_broken(begun, entries)
    return entries


def _refuse_broken(begun: Packing, entries: dict[ShardId, Entry]) -> None:
    problem = pack_report.too_many(begun.plan, entries, begun.config.max_bad)
    if problem is not None:
        raise DataError(problem)


# ------------------------------------------------------------------ tasks or threads
@contextmanager
def _results(
    begun: Packing, left: Sequence[ShardId], stop: Callable[[], bool], say: Callable[[str], None]
) -> Iterator[Results]:
    """(number in `left`, entry) of each shard as it is done, by whatever there is to do it."""
    cpus, at_once = os.cpu_count() or 1, begun.config.at_once
    if not left:
        yield iter(())
    elif is_submitted():
        with cluster.connected() as capacity:
            # Twice as many as fit, so that none waits for the next and an autoscaler sees that there is more.
            most = at_once or max(1, 2 * int(capacity.cpus))
            say(f"packing {len(left)} shards by tasks on {len(capacity.nodes)} node(s)")
            tasks = [(begun.task(shard, TASK_THREADS).to_dict(),) for shard in left]
            yield pool.run(pack_shard, tasks, cpus=1, gpus=0, at_once=most, stop=stop)
    else:
        most = min(at_once or LOCAL_SHARDS, len(left))
        threads = max(1, -(-cpus // most)) + 1
        say(f"packing {len(left)} shards in this process")
        tasks = [(begun.task(shard, threads).to_dict(),) for shard in left]
        yield in_threads(pack_shard, tasks, most, stop)


def in_threads(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], at_once: int, stop: Callable[[], bool]
) -> Results:
    """What pool.run does, in threads: (number of the argument, result) of each call as it ends.

    Raises what a call raised. What is under way is waited for, whatever ends this; after a stop, reads that wait for a
    store are given up after some seconds.
    """
    waiting = list(enumerate(arguments))[::-1]
    running: dict[Future[Any], int] = {}
    with ThreadPoolExecutor(at_once, thread_name_prefix="shard") as threads:
        while (waiting or running) and not stop():
            while waiting and len(running) < at_once:
                number, argument = waiting.pop()
                running[threads.submit(function, *argument)] = number
            for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
        if running and wait(running, timeout=GRACE_SECONDS).not_done:
            ranged.close_all()


# ------------------------------------------------------------------ what is said
@contextmanager
def _progress(
    begun: Packing, screen: Console, say: Callable[[str], None]
) -> Iterator[Callable[[dict[ShardId, Entry]], None]]:
    """A function that shows how far the entries go: on a moving bar, or now and then in a log."""
    total, before = len(begun.plan.shards()), sum(entry.bytes for entry in begun.done.values())
    whole = sum(split.bytes for split in begun.plan.splits.values())
    began = told = time.monotonic()
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("packing", total=total, completed=len(begun.done), pace="")

        def advance(entries: dict[ShardId, Entry]) -> None:
            nonlocal told
            done = sum(entry.bytes for entry in entries.values())
            rate = max(1.0, (done - before) / max(1e-3, time.monotonic() - began))
            pace = f"{rate / 1e6:.1f} MB/s, {_duration((whole - done) / rate)} left"
            bar.update(task, completed=len(entries), pace=pace)
            if not screen.is_terminal and time.monotonic() - told > LOG_SECONDS:
                told = time.monotonic()
                say(f"packing: {len(entries)} of {total} shards, {pace}")

        yield advance


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _show(plan: Plan, say: Callable[[str], None]) -> None:
    """The plan: samples, classes, shards and bytes of each split."""
    say(f"{plan.name}: {len(plan.classes)} classes")
    for name, split in plan.splits.items():
        say(f"  {name}: {split.samples:,} images, {split.bytes / 2**20:,.1f} MiB, {len(split.shards)} shards")
        if empty := split.per_class.count(0):
            say(f"  {name}: {empty} classes without images")


def _told(url: str, made: Manifest) -> str:
    splits = ", ".join(
        f"{made.samples(name):,} {name} images in {len(made.shards(name))} shards" for name in made.splits
    )
    return f"{urls.redact(url)}: {splits}, dataset {made.digest()}"


# ------------------------------------------------------------------ digits
def _pack_digits(config: Pack, say: Callable[[str], None]) -> int:
    """The embedded digits, exactly as a run on `--data digits` would pack them: in a second, in one piece."""
    shown = urls.redact(config.url)
    if pack_state.load(config.url) is not None:
        raise DataError(f"url: {shown}: an unfinished packing is there: take another --url, or remove it")
    if files.exists(files.join(config.url, manifest.NAME)):
        found = manifest.load(config.url, allow_elsewhere=True, field="url")
        if found.name != digits.NAME:
            raise DataError(f"url: {shown}: the dataset {found.name!r} is there: take another --url, or remove it")
        say(f"already packed: {_told(config.url, found)}")
    elif config.dry_run:
        say(
            f"{digits.NAME}: 10 classes, {digits.IMAGES - digits.HELD_OUT:,} train and {digits.HELD_OUT} validation "
            "images"
        )
    else:
        say(f"packed: {_told(config.url, digits.pack_digits(config.url))}")
    return 0
