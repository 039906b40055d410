"""The jobs on tars that are there already: index those made elsewhere, verify a dataset."""

from __future__ import annotations

from orchestrator.data import adopt, verify
from orchestrator.data.shards_config import IndexJob, VerifyJob
from orchestrator.launch.command import console


def index_tars(job: IndexJob) -> int:
    """Write manifest and indexes of tars made elsewhere; the exit status."""
    return adopt.run(job, console())


def verify_all(job: VerifyJob) -> int:
    """Tell all that is wrong with a dataset; the exit status."""
    return verify.run(job, console())
