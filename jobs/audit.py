"""Prove what runs were trained on: which samples were seen how often in each epoch, failures included.

python jobs/audit.py googlenet-digits-m1-0123456789
    a run in the default storage: its record, kept with its weights, against the plan computed anew
python jobs/audit.py s3://bucket/runs/models/googlenet-imagenet-0123456789 --data s3://bucket/imagenet
    a run anywhere, whose dataset has moved

Exit status: 0 as planned, 1 not as planned, 2 nothing to audit.
"""

from typing import Annotated

import tyro
from pydantic import Field

from orchestrator.config.base import Config
from orchestrator.config.cli import Preset, parse
from orchestrator.launch import environment
from orchestrator.launch.config import RUNS_VARIABLE

PROG = "audit.py"


class Audit(Config):
    """What the command line sets."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = Field(
        (), description="names of runs, or URLs of their folders"
    )
    storage: str = Field("", description=f"folder URL of runs; by default ${RUNS_VARIABLE}, else ~/orchestrator-runs")
    data: str = Field("", description="URL of the packed dataset, when it is not where the run had it")


if __name__ == "__main__":
    config = parse(PROG, "Compare what runs were trained on with the plan.", {"runs": Preset(Audit())}, "runs")
    # The heavy rooms are imported only now: help and refusals stay quick.
    environment.settle()
    from orchestrator.launch import audit
    from orchestrator.launch.screen import console, guarded

    raise SystemExit(guarded(PROG, lambda: audit.run(config.runs, config.storage, config.data, console())))
