"""Find a schedule: a sweep of trials on Ray Tune, whose winner is a file that train.py and train_ensemble.py take.

python jobs/tune.py
    sixteen schedules on the embedded handwritten digits, on this machine
ray job submit --working-dir . -- python jobs/tune.py googlenet-imagenet --data s3://bucket/imagenet --space space.toml
    a space of your own on a cluster
"""

from orchestrator.config.arg_parser import parse_args
from orchestrator.ray_backend import ray_env
from orchestrator.ray_backend.run_spec import build_job_presets, make_preset_loader
from orchestrator.recipe import presets
from orchestrator.tuning.config import TuneJob

PROG = "tune.py"

if __name__ == "__main__":
    config = parse_args(
        PROG,
        "Find a schedule, or any other value of a recipe.",
        build_job_presets(TuneJob),
        presets.DEFAULT,
        from_file=make_preset_loader(TuneJob),
    )
    # Ray reads its switches when it is imported, and the heavy rooms (ray, mlflow) are imported only now: help and
    # refusals stay quick.
    ray_env.configure_ray_or_exit(PROG, config.destination, config.placement)
    ray_env.set_tune_variables()
    from orchestrator.ray_backend import cluster

    if not config.dry_run:
        cluster.connect_in_background(trial_cpus=config.placement.workers * config.placement.cpus_per_worker)
    from orchestrator.cli import tune
    from orchestrator.cli.run_command import run_cluster_command

    raise SystemExit(run_cluster_command(PROG, lambda: tune.run_tune(config)))
