"""Score finished models as one ensemble with 1 / 10 / 144 crops; what was scored before is not scored again.

python jobs/evaluate.py googlenet-digits-x7-0123456789
    all members of an ensemble
python jobs/evaluate.py googlenet-digits-m1-0123456789 googlenet-digits-m2-0123456789
    any subset of models
python jobs/evaluate.py s3://bucket/runs/ensembles/googlenet-imagenet-x7-0123456789 --data s3://bucket/other-images
    those of another storage, on another dataset of the same classes; without --data on the one they were trained on
"""

from orchestrator.config.cli import Preset, parse
from orchestrator.ensemble.config import Evaluate
from orchestrator.launch import environment

PROG = "evaluate.py"

if __name__ == "__main__":
    config = parse(PROG, "Score finished runs on 1 / 10 / 144 crops.", {"runs": Preset(Evaluate())}, "runs")
    # Ray reads its switches when it is imported, and the heavy rooms (torch, ray, mlflow) are imported only now:
    # help and refusals stay quick.
    environment.prepare(PROG, config.places, config.placement)
    from orchestrator.ensemble import command
    from orchestrator.launch.command import guarded

    raise SystemExit(guarded(PROG, lambda: command.evaluate(config)))
