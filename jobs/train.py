"""Train one model and record it in MLflow.

python jobs/train.py googlenet-digits --schedule.kind cosine
    a preset by its name, with a flag in place
python jobs/train.py s3://bucket/winner.json --data s3://bucket/imagenet
    the recipe in a file: a run's recipe.json, or what a sweep handed over
"""

from orchestrator.config.cli import parse
from orchestrator.fleet.config import TrainModel
from orchestrator.launch import environment
from orchestrator.launch.config import job_from_file, job_presets
from orchestrator.recipe import presets

PROG = "train.py"

if __name__ == "__main__":
    config = parse(
        PROG,
        "Train one model, record it in MLflow.",
        job_presets(TrainModel),
        presets.DEFAULT,
        from_file=job_from_file(TrainModel),
    )
    # Ray reads its switches when it is imported, and the heavy rooms (torch, ray, mlflow) are imported only now:
    # help and refusals stay quick.
    environment.prepare(PROG, config.destination, config.placement)
    from orchestrator.launch import cluster

    if not config.dry_run:
        cluster.begin(config.placement.workers)
    from orchestrator.fleet import command
    from orchestrator.launch.command import guarded

    raise SystemExit(guarded(PROG, lambda: command.train(config)))
