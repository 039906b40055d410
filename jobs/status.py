"""What runs are doing, from their storage alone: no cluster and no MLflow are asked.

python jobs/status.py
    every run, ensemble and sweep in the default storage; of sweeps the trials that run or went wrong
python jobs/status.py googlenet-digits-x7-0123456789abcdef --watch 5
    one ensemble with its members, looked at every 5 s until nobody runs it or Ctrl-C
python jobs/status.py googlenet-digits-sweep-0123456789
    a sweep with all its trials
python jobs/status.py s3://bucket/runs/models/googlenet-imagenet-0123456789abcdef --json
    a run anywhere, for machines: a JSON list on a line of its own for each look

States: waiting (for its turn or for workers), starting, running, restarting (its workers crashed), stopping, finished,
stopped, failed, lost (its driver died and left its lease), unreadable (a record of it is damaged or may not be read);
of trials also pruned (ended early) and diverged. Images/s and the time left are those of running ones. An ensemble
whose models are trained says how far its scoring is.

Exit status: 0 none failed, lost or unreadable, 1 some are, 2 one is unknown.
"""

from typing import Annotated

from pydantic import Field

from orchestrator.config.arg_parser import Preset, parse_args
from orchestrator.config.base import Config
from orchestrator.config.flags import Flag
from orchestrator.ray_backend.run_spec import RUNS_VARIABLE

PROG = "status.py"


class StatusConfig(Config):
    """What the command line sets."""

    runs: Annotated[tuple[str, ...], Flag(positional=True)] = Field(
        (), description="names of runs, ensembles or sweeps, or URLs of their folders; all there are by default"
    )
    storage: str = Field("", description=f"folder URL of runs; by default ${RUNS_VARIABLE}, else ~/orchestrator-runs")
    json_lines: Annotated[bool, Flag(name="json")] = Field(False, description="print JSON instead of tables")
    watch: float | None = Field(None, gt=0, description="seconds between looks; by default there is one look")


if __name__ == "__main__":
    config = parse_args(PROG, "Show what runs are doing.", {"runs": Preset(StatusConfig())}, "runs")
    from orchestrator.cli import status
    from orchestrator.cli.exit_status import make_console, run_command

    raise SystemExit(
        run_command(
            PROG,
            lambda: status.show_status(config.runs, config.storage, config.json_lines, config.watch, make_console()),
        )
    )
