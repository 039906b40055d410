"""Stop runs or ensembles, wherever they run: they save a checkpoint and end; the same command goes on with them.

python jobs/stop.py googlenet-digits-m1-0123456789abcdef
    a run in the default storage; one of an ensemble's members stops the whole ensemble
python jobs/stop.py s3://bucket/runs/ensembles/googlenet-imagenet-x7-0123456789abcdef --wait 600
    an ensemble anywhere, which may take longer to save
python jobs/stop.py RUN --no-save
    at once, without a checkpoint: what came after the last one is trained again

Exit status: 0 nobody runs them (any more), or they were asked and not waited for (--wait 0); 1 one still runs after
--wait seconds; 2 one is unknown.
"""

from typing import Annotated

from pydantic import Field

from orchestrator.config.arg_parser import Preset, parse_args
from orchestrator.config.base import Config
from orchestrator.config.flags import Flag
from orchestrator.ray_backend.run_spec import RUNS_VARIABLE

PROG = "stop.py"


class StopConfig(Config):
    """What the command line sets."""

    runs: Annotated[tuple[str, ...], Flag(positional=True)] = Field(
        (), description="names of runs or ensembles, or URLs of their folders"
    )
    storage: str = Field("", description=f"folder URL of runs; by default ${RUNS_VARIABLE}, else ~/orchestrator-runs")
    save: bool = Field(True, description="write a checkpoint first")
    wait: float = Field(180.0, ge=0, description="seconds to wait for them to end; 0 asks and waits for nothing")


if __name__ == "__main__":
    config = parse_args(PROG, "Stop runs; the same command goes on with them.", {"runs": Preset(StopConfig())}, "runs")
    from orchestrator.cli import stop
    from orchestrator.cli.exit_status import make_console, run_command

    raise SystemExit(
        run_command(PROG, lambda: stop.stop_runs(config.runs, config.storage, config.save, config.wait, make_console()))
    )
