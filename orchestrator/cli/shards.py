"""Pack, index and verify datasets; shards are packed by tasks on a cluster, or without one by threads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from typing import Any

from rich.console import Console

from orchestrator.cli.exit_status import STOPPED_NOTICE
from orchestrator.config import redaction
from orchestrator.data.build import packing
from orchestrator.data.build.config import DigitsSource, PackConfig, PluginSource
from orchestrator.data.build.packing import Packing
from orchestrator.data.build.packing_plan import PackedShard, PackingPlan, ShardId
from orchestrator.data.build.shard_packer import pack_shard
from orchestrator.data.manifest import Manifest
from orchestrator.monitor.formatting import format_duration, print_line
from orchestrator.ray_backend import cluster, signals
from orchestrator.ray_backend.ray_env import has_existing_cluster
from orchestrator.storage import file_io, ranged_reads

TaskResults = Generator[tuple[int, Any]]

# Parallel reads of a task, whose CPU decodes what has arrived.
TASK_THREADS = 4
MAX_LOCAL_SHARDS = 4
GRACE_SECONDS = 5.0
LOG_INTERVAL_SECONDS = 30.0  # between lines of progress in a log


def pack_dataset(config: PackConfig, console: Console) -> int:
    """Pack a dataset, or resume packing it; return the exit status. Raises ConfigError, DataError or StorageError."""
    config, say = config.resolve(), partial(print_line, console)
    if isinstance(config.source, DigitsSource | PluginSource):
        packed = packing.pack_samples(config, say)
        if packed is not None:
            say(f"packed: {_describe_dataset(config.url, packed)}")
        return 0
    if config.dry_run:
        _print_plan(packing.preview_plan(config, say), say)
        return 0
    work = packing.start_packing(config, say)
    if isinstance(work, Manifest):
        say(f"already packed: {_describe_dataset(config.url, work)}")
        return 0
    _print_plan(work.plan, say)
    with signals.catch_stop_signals() as interruption:
        entries = _pack_shards(work, console, interruption.event.is_set)
        if interruption.event.is_set():
            say(STOPPED_NOTICE)
            return interruption.exit_status
    dataset = packing.finish_packing(work, entries)
    for line in packing.describe_report(packing.build_report(work.plan, entries)):
        say(line)
    report = redaction.redact(file_io.join(config.url, packing.REPORT_NAME))
    say(f"packed: {_describe_dataset(config.url, dataset)}; report: {report}")
    return 0


def _pack_shards(work: Packing, console: Console, stop: Callable[[], bool]) -> dict[ShardId, PackedShard]:
    """Return the entries of all shards, including those packed earlier; fewer when interrupted.

    Raises DataError as soon as too many images are broken.
    """
    entries, left = dict(work.finished), work.list_unfinished()
    total, before = sum(split.bytes for split in work.plan.splits.values()), _count_bytes(entries)
    began = logged = time.monotonic()
    packing.check_bad_limit(work.plan, entries, work.config.max_bad)
    with closing(_run_shard_tasks(work, left, stop, console)) as results, console.status("packing") as status:
        for number, raw in results:
            entries[left[number]] = PackedShard.from_dict(raw)
            packing.check_bad_limit(work.plan, entries, work.config.max_bad)
            done, now = _count_bytes(entries), time.monotonic()
            rate = max(1.0, (done - before) / max(1e-3, now - began))
            text = f"packing: {len(entries)} of {len(work.plan.shards())} shards, {rate / 1e6:.1f} MB/s, "
            text += f"{format_duration((total - done) / rate)} left"
            status.update(text)
            if not console.is_terminal and now - logged > LOG_INTERVAL_SECONDS:
                logged = now
                print_line(console, text)
    return entries


def _count_bytes(entries: dict[ShardId, PackedShard]) -> int:
    return sum(entry.bytes for entry in entries.values())


def _run_shard_tasks(work: Packing, left: Sequence[ShardId], stop: Callable[[], bool], console: Console) -> TaskResults:
    """Yield (number in `left`, entry) of each shard, in order of completion, by tasks or threads."""
    at_once = work.config.at_once
    if left and has_existing_cluster():
        with cluster.connect_cluster() as capacity:
            # Twice as many as fit: no CPU idles between tasks, and an autoscaler sees the demand.
            most = at_once or max(1, 2 * int(capacity.cpus))
            print_line(console, f"packing {len(left)} shards by tasks on {len(capacity.nodes)} node(s)")
            tasks = [(work.make_task(shard, TASK_THREADS).to_dict(),) for shard in left]
            yield from cluster.run_tasks(pack_shard, tasks, cpus=1, gpus=0, at_once=most, stop=stop)
    elif left:
        most = min(at_once or MAX_LOCAL_SHARDS, len(left))
        threads = max(1, -(-(os.cpu_count() or 1) // most)) + 1
        print_line(console, f"packing {len(left)} shards in this process")
        tasks = [(work.make_task(shard, threads).to_dict(),) for shard in left]
        yield from run_in_threads(pack_shard, tasks, most, stop)


def run_in_threads(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], at_once: int, stop: Callable[[], bool]
) -> TaskResults:
    """Run calls in threads as `cluster.run_tasks` does in tasks; yield (number of the argument, result).

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


def _print_plan(plan: PackingPlan, say: Callable[[str], None]) -> None:
    say(f"{plan.name}: {len(plan.classes)} classes")
    for name, split in plan.splits.items():
        say(f"  {name}: {split.samples:,} images, {split.bytes / 2**20:,.1f} MiB, {len(split.shards)} shards")
        if empty := split.per_class.count(0):
            say(f"  {name}: {empty} classes without images")


def _describe_dataset(url: str, dataset: Manifest) -> str:
    splits = ", ".join(
        f"{dataset.count_samples(name):,} {name} images in {len(dataset.shards(name))} shards"
        for name in dataset.splits
    )
    return f"{redaction.redact(url)}: {splits}, dataset {dataset.digest()}"
