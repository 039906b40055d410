"""Prove what runs were trained on: which samples were seen how often in each epoch, failures included.

python jobs/audit.py googlenet-digits-m1-0123456789
    a run in the default storage: its record, kept with its weights, against the plan computed anew
python jobs/audit.py s3://bucket/runs/models/googlenet-imagenet-0123456789 --data s3://bucket/imagenet
    a run anywhere, whose dataset has moved

Exit status: 0 as planned, 1 not as planned, 2 nothing to audit.
"""

from typing import Annotated

from pydantic import Field

from orchestrator.config.arg_parser import Preset, parse_args
from orchestrator.config.base import Config
from orchestrator.config.flags import Flag
from orchestrator.ray_backend import ray_env
from orchestrator.ray_backend.run_spec import RUNS_VARIABLE

PROG = "audit.py"


class AuditConfig(Config):
    """What the command line sets."""

    runs: Annotated[tuple[str, ...], Flag(positional=True)] = Field(
        (), description="names of runs, or URLs of their folders"
    )
    storage: str = Field("", description=f"folder URL of runs; by default ${RUNS_VARIABLE}, else ~/orchestrator-runs")
    data: str = Field("", description="URL of the packed dataset, when it is not where the run had it")


if __name__ == "__main__":
    config = parse_args(
        PROG, "Compare what runs were trained on with the plan.", {"runs": Preset(AuditConfig())}, "runs"
    )
    # The heavy rooms are imported only now: help and refusals stay quick.
    ray_env.prepare_process()
    from orchestrator.cli import audit
    from orchestrator.cli.exit_status import make_console, run_command

    raise SystemExit(
        run_command(PROG, lambda: audit.audit_runs(config.runs, config.storage, config.data, make_console()))
    )
