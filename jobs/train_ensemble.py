"""Train an ensemble of independent models, score it with 1 / 10 / 144 crops, record everything in MLflow.

python jobs/train_ensemble.py
    seven GoogLeNets on the embedded handwritten digits, on this machine
ray job submit --working-dir . -- python jobs/train_ensemble.py googlenet-imagenet --data s3://bucket/imagenet
    the paper's ensemble on a cluster
python jobs/train_ensemble.py winner.json
    one of the recipe in a file: a run's recipe.json, or what a sweep handed over
"""

from orchestrator.config.arg_parser import parse_args
from orchestrator.ensemble.config import TrainEnsembleConfig
from orchestrator.ray_backend import ray_env
from orchestrator.ray_backend.run_spec import build_job_presets, make_preset_loader
from orchestrator.recipe import presets

PROG = "train_ensemble.py"

if __name__ == "__main__":
    config = parse_args(
        PROG,
        "Train an ensemble, score it with 1 / 10 / 144 crops, record it in MLflow.",
        build_job_presets(TrainEnsembleConfig),
        presets.DEFAULT,
        from_file=make_preset_loader(TrainEnsembleConfig),
    )
    # Ray reads its switches when it is imported, and the heavy rooms (torch, ray, mlflow) are imported only now:
    # help and refusals stay quick.
    ray_env.configure_ray_or_exit(PROG, config.destination, config.placement)
    from orchestrator.ray_backend import cluster

    if not config.dry_run:
        cluster.connect_in_background(config.placement.workers)
    from orchestrator.cli import train_ensemble
    from orchestrator.cli.run_command import run_cluster_command

    raise SystemExit(run_cluster_command(PROG, lambda: train_ensemble.run_train_ensemble(config)))
