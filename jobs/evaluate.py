"""Score finished models as one ensemble with 1 / 10 / 144 crops; what was scored before is not scored again.

python jobs/evaluate.py googlenet-digits-x7-0123456789
    all members of an ensemble
python jobs/evaluate.py googlenet-digits-m1-0123456789 googlenet-digits-m2-0123456789
    any subset of models
python jobs/evaluate.py s3://bucket/runs/ensembles/googlenet-imagenet-x7-0123456789 --data s3://bucket/other-images
    those of another storage, on another dataset of the same classes; without --data on the one they were trained on
"""

from orchestrator.config.arg_parser import Preset, parse_args
from orchestrator.ensemble.config import EvaluateConfig
from orchestrator.ray_backend import ray_env

PROG = "evaluate.py"

if __name__ == "__main__":
    config = parse_args(PROG, "Score finished runs on 1 / 10 / 144 crops.", {"runs": Preset(EvaluateConfig())}, "runs")
    # Ray reads its switches when it is imported, and the heavy rooms (torch, ray, mlflow) are imported only now:
    # help and refusals stay quick.
    ray_env.configure_ray_or_exit(PROG, config.provisional_destination, config.placement)
    from orchestrator.cli import train_ensemble
    from orchestrator.cli.run_command import run_cluster_command

    raise SystemExit(run_cluster_command(PROG, lambda: train_ensemble.run_evaluate(config)))
