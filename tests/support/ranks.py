"""A few processes that are ranks of gloo groups: started once, since each start imports torch, used for many groups."""

import multiprocessing
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Task = Callable[[int, int, Any], Any]  # (rank, workers, argument) -> something that can be pickled
SECONDS = 120


class Ranks:
    """`run` calls a function of a module on each rank of a new process group."""

    def __init__(self, processes: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = folder
        self._pipes: list[Connection] = []
        self._processes = []
        for number in range(processes):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), name=f"rank-{number}", daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, task: Task, workers: int, argument: Any, collective_seconds: float = SECONDS / 2) -> list[Any]:
        """Return the result of each rank; a RuntimeError with the traceback stands for a rank that raised.

        collective_seconds: how long a rank waits in a collective for the others.
        """
        store = str(self._folder / uuid.uuid4().hex)
        for rank in range(workers):
            self._pipes[rank].send((task, rank, workers, argument, store, collective_seconds))
        answers = []
        for rank in range(workers):
            if not self._pipes[rank].poll(SECONDS):
                raise TimeoutError(f"rank {rank} of {workers} gave no answer within {SECONDS} s")
            answers.append(self._pipes[rank].recv())
        return answers

    def close(self) -> None:
        """End the processes."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()  # it waits for a task; a clean end takes seconds
            process.join()
            pipe.close()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            task, rank, workers, argument, store, seconds = pipe.recv()
        except EOFError:
            return
        pipe.send(_one(task, rank, workers, argument, store, seconds))


def _one(task: Task, rank: int, workers: int, argument: Any, store: str, seconds: float) -> Any:
    # Sockets of the loopback only.
    if workers > 1:
        dist.init_process_group(
            "gloo", f"file://{store}", rank=rank, world_size=workers, timeout=timedelta(seconds=seconds)
        )
    try:
        return task(rank, workers, argument)
    except Exception:
        return RuntimeError(traceback.format_exc())
    finally:
        if workers > 1:
            dist.destroy_process_group()
