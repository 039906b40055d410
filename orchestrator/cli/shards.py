"""Pack, index and verify datasets; shards are packed by tasks on a cluster, or without one by threads."""

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
from orchestrator.data.build import indexing, packing, verify
from orchestrator.data.build.config import DigitsSource, IndexConfig, PackConfig, PluginSource, VerifyConfig
from orchestrator.data.build.packing import Packing
from orchestrator.data.build.packing_plan import PackedShard, PackingPlan, ShardId
from orchestrator.data.build.shard_packer import pack_shard
from orchestrator.data.manifest import Manifest
from orchestrator.monitor.formatting import format_duration
from orchestrator.ray_backend import cluster, signals, task_pool
from orchestrator.ray_backend.ray_env import has_existing_cluster
from orchestrator.ray_backend.signals import Interruption
from orchestrator.storage import file_io, ranged_reads

TaskResults = Iterator[tuple[int, Any]]

# Parallel reads of a task, whose CPU decodes what has arrived.
TASK_THREADS = 4
MAX_LOCAL_SHARDS = 4
GRACE_SECONDS = 5.0
# A log gets a line now and then in place of the progress bar.
LOG_INTERVAL_SECONDS = 30.0


def pack_dataset(config: PackConfig) -> int:
    """Pack a dataset, or resume packing it; return the exit status. Raises ConfigError, DataError or StorageError."""
    config, console = config.resolve(), make_console()

    def print_line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if isinstance(config.source, DigitsSource | PluginSource):
        packed = packing.pack_samples(config, print_line)
        if packed is not None:
            print_line(f"packed: {_describe_dataset(config.url, packed)}")
        return 0
    if config.dry_run:
        _print_plan(packing.preview_plan(config, print_line), print_line)
        return 0
    work = packing.start_packing(config, print_line)
    if isinstance(work, Manifest):
        print_line(f"already packed: {_describe_dataset(config.url, work)}")
        return 0
    _print_plan(work.plan, print_line)
    with signals.catch_stop_signals() as interruption:
        entries = _pack_shards(work, console, interruption, print_line)
        if interruption.event.is_set():
            print_line(STOPPED_NOTICE)
            return interruption.exit_status
    dataset = packing.finish_packing(work, entries)
    for line in packing.describe_report(packing.build_report(work.plan, entries)):
        print_line(line)
    print_line(
        f"packed: {_describe_dataset(config.url, dataset)}; report: "
        f"{redaction.redact(file_io.join(config.url, packing.REPORT_NAME))}"
    )
    return 0


def _pack_shards(
    work: Packing, console: Console, interruption: Interruption, print_line: Callable[[str], None]
) -> dict[ShardId, PackedShard]:
    """Return the entries of all shards, including those packed earlier; fewer when interrupted.

    Raises DataError as soon as too many images are broken.
    """
    entries = dict(work.finished)
    left = work.list_unfinished()
    packing.check_bad_limit(work.plan, entries, work.config.max_bad)
    with (
        _run_shard_tasks(work, left, interruption.event.is_set, print_line) as results,
        _show_progress(work, console, print_line) as advance,
    ):
        for number, raw in results:
            entries[left[number]] = PackedShard.from_dict(raw)
            advance(entries)
            packing.check_bad_limit(work.plan, entries, work.config.max_bad)
    return entries


# ------------------------------------------------------------------ tasks or threads
@contextmanager
def _run_shard_tasks(
    work: Packing, left: Sequence[ShardId], stop: Callable[[], bool], print_line: Callable[[str], None]
) -> Iterator[TaskResults]:
    """Yield an iterator of (number in `left`, entry), in order of completion, by tasks or threads."""
    cpus, at_once = os.cpu_count() or 1, work.config.at_once
    if not left:
        yield iter(())
    elif has_existing_cluster():
        with cluster.connect_cluster() as capacity:
            # Twice as many as fit: no CPU idles between tasks, and an autoscaler sees the demand.
            most = at_once or max(1, 2 * int(capacity.cpus))
            print_line(f"packing {len(left)} shards by tasks on {len(capacity.nodes)} node(s)")
            tasks = [(work.make_task(shard, TASK_THREADS).to_dict(),) for shard in left]
            yield task_pool.run_tasks(pack_shard, tasks, cpus=1, gpus=0, at_once=most, stop=stop)
    else:
        most = min(at_once or MAX_LOCAL_SHARDS, len(left))
        threads = max(1, -(-cpus // most)) + 1
        print_line(f"packing {len(left)} shards in this process")
        tasks = [(work.make_task(shard, threads).to_dict(),) for shard in left]
        yield run_in_threads(pack_shard, tasks, most, stop)


def run_in_threads(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], at_once: int, stop: Callable[[], bool]
) -> TaskResults:
    """Run calls in threads as `task_pool.run_tasks` does in tasks; yield (number of the argument, result).

    Raises the exception of a call. Running calls are always awaited; after a stop, reads that wait for a store are
    abandoned after some seconds.
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


# ------------------------------------------------------------------ output
@contextmanager
def _show_progress(
    work: Packing, console: Console, print_line: Callable[[str], None]
) -> Iterator[Callable[[dict[ShardId, PackedShard]], None]]:
    """Yield a function that shows the progress of the entries: on a bar, or now and then in a log."""
    total, before = len(work.plan.shards()), sum(entry.bytes for entry in work.finished.values())
    whole = sum(split.bytes for split in work.plan.splits.values())
    began = logged = time.monotonic()
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("packing", total=total, completed=len(work.finished), pace="")

        def advance(entries: dict[ShardId, PackedShard]) -> None:
            nonlocal logged
            done = sum(entry.bytes for entry in entries.values())
            rate = max(1.0, (done - before) / max(1e-3, time.monotonic() - began))
            pace = f"{rate / 1e6:.1f} MB/s, {format_duration((whole - done) / rate)} left"
            bar.update(task, completed=len(entries), pace=pace)
            if not console.is_terminal and time.monotonic() - logged > LOG_INTERVAL_SECONDS:
                logged = time.monotonic()
                print_line(f"packing: {len(entries)} of {total} shards, {pace}")

        yield advance


def _print_plan(plan: PackingPlan, print_line: Callable[[str], None]) -> None:
    """Print samples, classes, shards and bytes of each split."""
    print_line(f"{plan.name}: {len(plan.classes)} classes")
    for name, split in plan.splits.items():
        print_line(f"  {name}: {split.samples:,} images, {split.bytes / 2**20:,.1f} MiB, {len(split.shards)} shards")
        if empty := split.per_class.count(0):
            print_line(f"  {name}: {empty} classes without images")


def _describe_dataset(url: str, dataset: Manifest) -> str:
    splits = ", ".join(
        f"{dataset.count_samples(name):,} {name} images in {len(dataset.shards(name))} shards"
        for name in dataset.splits
    )
    return f"{redaction.redact(url)}: {splits}, dataset {dataset.digest()}"


def index_tars(job: IndexConfig) -> int:
    """Write manifest and indexes of tars made elsewhere; return the exit status."""
    return indexing.index_dataset(job, make_console())


def verify_dataset(job: VerifyConfig) -> int:
    """Print every problem of a dataset; return the exit status."""
    return verify.verify_dataset(job, make_console())
