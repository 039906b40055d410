"""Train an ensemble of independent models, score it with 1 / 10 / 144 crops, record everything in MLflow.

python jobs/train_ensemble.py
    seven GoogLeNets on the embedded handwritten digits, on this machine
ray job submit --working-dir . -- python jobs/train_ensemble.py googlenet-imagenet --data s3://bucket/imagenet
    the paper's ensemble on a cluster
python jobs/train_ensemble.py winner.json
    one of the recipe in a file: a run's recipe.json, or what a sweep handed over
"""

from orchestrator.config.cli import parse
from orchestrator.ensemble.config import TrainEnsemble
from orchestrator.launch import environment
from orchestrator.launch.config import job_from_file, job_presets
from orchestrator.recipe import presets

PROG = "train_ensemble.py"

if __name__ == "__main__":
    config = parse(
        PROG,
        "Train an ensemble, score it with 1 / 10 / 144 crops, record it in MLflow.",
        job_presets(TrainEnsemble),
        presets.DEFAULT,
        from_file=job_from_file(TrainEnsemble),
    )
    # Ray reads its switches when it is imported, and the heavy rooms (torch, ray, mlflow) are imported only now:
    # help and refusals stay quick.
    environment.prepare(PROG, config.destination, config.placement)
    from orchestrator.launch import cluster

    if not config.dry_run:
        cluster.begin(config.placement.workers)
    from orchestrator.ensemble import command
    from orchestrator.launch.command import guarded

    raise SystemExit(guarded(PROG, lambda: command.train_ensemble(config)))
