"""Train one model and record it in MLflow.

python jobs/train.py googlenet-digits --schedule.kind cosine
    a preset by its name, with a flag in place
python jobs/train.py s3://bucket/winner.json --data s3://bucket/imagenet
    the recipe in a file: a run's recipe.json, or what a sweep handed over
"""

from orchestrator.config.arg_parser import parse_args
from orchestrator.ray_backend import ray_env
from orchestrator.ray_backend.run_spec import build_job_presets, make_preset_loader
from orchestrator.recipe import presets
from orchestrator.scheduler.config import TrainModel

PROG = "train.py"

if __name__ == "__main__":
    config = parse_args(
        PROG,
        "Train one model, record it in MLflow.",
        build_job_presets(TrainModel),
        presets.DEFAULT,
        from_file=make_preset_loader(TrainModel),
    )
    # Ray reads its switches when it is imported, and the heavy rooms (torch, ray, mlflow) are imported only now:
    # help and refusals stay quick.
    ray_env.configure_ray_or_exit(PROG, config.destination, config.placement)
    from orchestrator.ray_backend import cluster

    if not config.dry_run:
        cluster.connect_in_background(config.placement.workers)
    from orchestrator.cli import train
    from orchestrator.cli.run_command import run_cluster_command

    raise SystemExit(run_cluster_command(PROG, lambda: train.train_model(config)))
