"""Seconds that a cluster of three nodes takes to start, to train and to train again: `make bench-nodes`.

Nodes are network namespaces of this machine, which share its cores; data, storage and MLflow are on a fourth one (S3,
PostgreSQL). Seconds to goals, not ratios: what is waited for are other programs' starts and time-outs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.frame import Figure
from tests.nodes.scenes import flags
from tests.nodes.site import SiteRun, site
from tests.support import machines, postgres

UP_SECONDS, STEP_SECONDS, AGAIN_SECONDS = 20.0, 60.0, 30.0


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-nodes`."""
    del folder  # what is made has short paths of its own, for sockets
    if (reason := machines.trouble() or postgres.trouble()) is not None:
        raise RuntimeError(f"no cluster of several nodes here: {reason}")
    with site((1, 1, 1)) as made:
        yield Figure("nodes.three_up_s", made.seconds["cluster"], at_most=UP_SECONDS)
        # Two workers: when a node is lost there is another one.
        run = made.submitted("nodes", "train.py", *flags(2))
        yield Figure("nodes.submission_to_first_step_s", run.first_step(), at_most=STEP_SECONDS)
        yield Figure("nodes.kill_to_training_again_s", _killed(run), at_most=AGAIN_SECONDS)
        run.stop()


def _killed(run: SiteRun) -> float:
    """Seconds from the end of a worker's node, which is not the driver's, to a step of a new group."""
    run.wait(lambda: bool(run.committed()), "a checkpoint")
    node = max(run.nodes.groups()[-1].values())
    lost = time.time()
    run.nodes.nodes[node].kill()
    return run.await_steps_after(lost).time - lost
