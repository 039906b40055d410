"""Find a schedule: a sweep of trials on Ray Tune, whose winner is a file that train.py and train_ensemble.py take.

python jobs/tune.py
    sixteen schedules on the embedded handwritten digits, on this machine
ray job submit --working-dir . -- python jobs/tune.py googlenet-imagenet --data s3://bucket/imagenet --space space.toml
    a space of your own on a cluster
"""

from orchestrator.config.cli import parse
from orchestrator.launch import environment
from orchestrator.launch.config import job_from_file, job_presets
from orchestrator.recipe import presets
from orchestrator.tuning import switches
from orchestrator.tuning.config import TuneJob

PROG = "tune.py"

if __name__ == "__main__":
    config = parse(
        PROG,
        "Find a schedule, or any other value of a recipe.",
        job_presets(TuneJob),
        presets.DEFAULT,
        from_file=job_from_file(TuneJob),
    )
    # Ray reads its switches when it is imported, and the heavy rooms (ray, mlflow) are imported only now: help and
    # refusals stay quick.
    environment.prepare(PROG, config.destination, config.placement)
    switches.switch()
    from orchestrator.launch import cluster

    if not config.dry_run:
        cluster.begin(trial_cpus=config.placement.workers * config.placement.cpus_per_worker)
    from orchestrator.launch.command import guarded
    from orchestrator.tuning import command

    raise SystemExit(guarded(PROG, lambda: command.tune(config)))
