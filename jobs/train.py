"""Train one model and record it in MLflow.

python jobs/train.py googlenet-digits --schedule.kind cosine
"""

from orchestrator.config.cli import Preset, parse
from orchestrator.launch.config import JobConfig
from orchestrator.recipe import presets

PROG = "train.py"

if __name__ == "__main__":
    config = parse(
        PROG,
        "Train one model, record it in MLflow.",
        {name: Preset(JobConfig(recipe=make()), presets.summary(name)) for name, make in presets.PRESETS.items()},
        presets.DEFAULT,
    )
    # Heavy rooms (torch, ray, mlflow) only now: help and refusals are quick.
    from orchestrator.fleet import command
    from orchestrator.launch.command import guarded

    raise SystemExit(guarded(PROG, lambda: command.train(config)))
