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

from orchestrator.cli.exit_status import STOPPED_NOTICE, make_console
from orchestrator.config import redaction
from orchestrator.config.redaction import make_printable
from orchestrator.data import manifest
from orchestrator.data.build import digits, indexing, packing, verify
from orchestrator.data.build.config import IndexConfig, PackConfig, VerifyConfig
from orchestrator.data.build.packing import Packing, PackingPlan, ShardId
from orchestrator.data.build.shard_packer import PackedShard, pack_shard
from orchestrator.data.build.sources.config import DigitsSource
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.ray_backend import cluster, signals, task_pool
from orchestrator.ray_backend.ray_env import has_existing_cluster
from orchestrator.ray_backend.signals import Interruption
from orchestrator.storage import file_io, ranged_reads

TaskResults = Iterator[tuple[int, Any]]

# Reads of a task that are under way side by side; its CPU decodes what came.
TASK_THREADS = 4
MAX_LOCAL_SHARDS = 4
GRACE_SECONDS = 5.0
# A log has no moving bar; it gets a line now and then.
LOG_INTERVAL_SECONDS = 30.0


def pack_dataset(config: PackConfig) -> int:
    """Pack a dataset, or go on with packing it; the exit status. Raises ConfigError, DataError or StorageError."""
    config, screen = config.resolve(), make_console()

    def say(text: str) -> None:
        screen.print(text, highlight=False, markup=False, soft_wrap=True)

    if isinstance(config.source, DigitsSource):
        return _pack_digits(config, say)
    if config.dry_run:
        _print_plan(packing.preview_plan(config, say), say)
        return 0
    begun = packing.start_packing(config, say)
    if isinstance(begun, Manifest):
        say(f"already packed: {_describe_dataset(config.url, begun)}")
        return 0
    _print_plan(begun.plan, say)
    with signals.catch_stop_signals() as interruption:
        entries = _pack_shards(begun, screen, interruption, say)
        if interruption.event.is_set():
            say(STOPPED_NOTICE)
            return interruption.exit_status
    made = packing.finish_packing(begun, entries)
    screen.print(packing.build_report_table(begun.plan, entries))
    if summary := packing.describe_left_out(begun.plan, entries):
        say(summary)
    for bad in packing.list_left_out(entries)[: packing.MAX_LISTED_IMAGES]:
        say(make_printable(f"left out: {bad.key} ({bad.source}): {bad.reason}"))
    say(
        f"packed: {_describe_dataset(config.url, made)}; report: "
        f"{redaction.redact(file_io.join(config.url, packing.REPORT_NAME))}"
    )
    return 0


def _pack_shards(
    begun: Packing, screen: Console, interruption: Interruption, say: Callable[[str], None]
) -> dict[ShardId, PackedShard]:
    """The entries of all shards, those of an earlier start too; fewer when interrupted.

    Raises DataError as soon as too many images are broken.
    """
    entries = dict(begun.finished)
    left = begun.list_unfinished()
    _check_bad_images(begun, entries)
    with (
        _run_shard_tasks(begun, left, interruption.event.is_set, say) as results,
        _show_progress(begun, screen, say) as advance,
    ):
        for number, raw in results:
            entries[left[number]] = PackedShard.from_dict(raw)
            advance(entries)
            _check_bad_images(begun, entries)
    return entries


def _check_bad_images(begun: Packing, entries: dict[ShardId, PackedShard]) -> None:
    problem = packing.check_bad_limit(begun.plan, entries, begun.config.max_bad)
    if problem is not None:
        raise DataError(problem)


# ------------------------------------------------------------------ tasks or threads
@contextmanager
def _run_shard_tasks(
    begun: Packing, left: Sequence[ShardId], stop: Callable[[], bool], say: Callable[[str], None]
) -> Iterator[TaskResults]:
    """(number in `left`, entry) of each shard as it is done, by whatever there is to do it."""
    cpus, at_once = os.cpu_count() or 1, begun.config.at_once
    if not left:
        yield iter(())
    elif has_existing_cluster():
        with cluster.connect_cluster() as capacity:
            # Twice as many as fit, so that none waits for the next and an autoscaler sees that there is more.
            most = at_once or max(1, 2 * int(capacity.cpus))
            say(f"packing {len(left)} shards by tasks on {len(capacity.nodes)} node(s)")
            tasks = [(begun.make_task(shard, TASK_THREADS).to_dict(),) for shard in left]
            yield task_pool.run_tasks(pack_shard, tasks, cpus=1, gpus=0, at_once=most, stop=stop)
    else:
        most = min(at_once or MAX_LOCAL_SHARDS, len(left))
        threads = max(1, -(-cpus // most)) + 1
        say(f"packing {len(left)} shards in this process")
        tasks = [(begun.make_task(shard, threads).to_dict(),) for shard in left]
        yield run_in_threads(pack_shard, tasks, most, stop)


def run_in_threads(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], at_once: int, stop: Callable[[], bool]
) -> TaskResults:
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
            ranged_reads.close_all_readers()


# ------------------------------------------------------------------ what is said
@contextmanager
def _show_progress(
    begun: Packing, screen: Console, say: Callable[[str], None]
) -> Iterator[Callable[[dict[ShardId, PackedShard]], None]]:
    """A function that shows how far the entries go: on a moving bar, or now and then in a log."""
    total, before = len(begun.plan.shards()), sum(entry.bytes for entry in begun.finished.values())
    whole = sum(split.bytes for split in begun.plan.splits.values())
    began = told = time.monotonic()
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("packing", total=total, completed=len(begun.finished), pace="")

        def advance(entries: dict[ShardId, PackedShard]) -> None:
            nonlocal told
            done = sum(entry.bytes for entry in entries.values())
            rate = max(1.0, (done - before) / max(1e-3, time.monotonic() - began))
            pace = f"{rate / 1e6:.1f} MB/s, {_format_duration((whole - done) / rate)} left"
            bar.update(task, completed=len(entries), pace=pace)
            if not screen.is_terminal and time.monotonic() - told > LOG_INTERVAL_SECONDS:
                told = time.monotonic()
                say(f"packing: {len(entries)} of {total} shards, {pace}")

        yield advance


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _print_plan(plan: PackingPlan, say: Callable[[str], None]) -> None:
    """The plan: samples, classes, shards and bytes of each split."""
    say(f"{plan.name}: {len(plan.classes)} classes")
    for name, split in plan.splits.items():
        say(f"  {name}: {split.samples:,} images, {split.bytes / 2**20:,.1f} MiB, {len(split.shards)} shards")
        if empty := split.per_class.count(0):
            say(f"  {name}: {empty} classes without images")


def _describe_dataset(url: str, made: Manifest) -> str:
    splits = ", ".join(
        f"{made.count_samples(name):,} {name} images in {len(made.shards(name))} shards" for name in made.splits
    )
    return f"{redaction.redact(url)}: {splits}, dataset {made.digest()}"


# ------------------------------------------------------------------ digits
def _pack_digits(config: PackConfig, say: Callable[[str], None]) -> int:
    """The embedded digits, exactly as a run on `--data digits` would pack them: in a second, in one piece."""
    shown = redaction.redact(config.url)
    if packing.load_plan(config.url) is not None:
        raise DataError(f"url: {shown}: an unfinished packing is there: take another --url, or remove it")
    if file_io.exists(file_io.join(config.url, manifest.FILE_NAME)):
        found = manifest.load(config.url, allow_elsewhere=True, field="url")
        if found.name != digits.DATASET_NAME:
            raise DataError(f"url: {shown}: the dataset {found.name!r} is there: take another --url, or remove it")
        say(f"already packed: {_describe_dataset(config.url, found)}")
    elif config.dry_run:
        say(
            f"{digits.DATASET_NAME}: 10 classes, {digits.NUM_IMAGES - digits.NUM_VALIDATION:,} train and "
            f"{digits.NUM_VALIDATION} validation "
            "images"
        )
    else:
        say(f"packed: {_describe_dataset(config.url, digits.pack_digits(config.url))}")
    return 0


def index_tars(job: IndexConfig) -> int:
    """Write manifest and indexes of tars made elsewhere; the exit status."""
    return indexing.index_dataset(job, make_console())


def verify_dataset(job: VerifyConfig) -> int:
    """Tell all that is wrong with a dataset; the exit status."""
    return verify.verify_dataset(job, make_console())
