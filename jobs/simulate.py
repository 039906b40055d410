"""Print the learning-rate schedule of a recipe, draw it and a sheet of augmented images; nothing is trained.

python jobs/simulate.py googlenet-imagenet --schedule.kind cosine
    the table alone
python jobs/simulate.py googlenet-imagenet --data s3://bucket/imagenet --out ~/previews --tracking http://HOST:5000
    with pictures, in a folder and in MLflow
"""

from orchestrator.config.cli import parse
from orchestrator.launch.simulation import simulation_presets
from orchestrator.recipe import presets

PROG = "simulate.py"

if __name__ == "__main__":
    config = parse(PROG, "Print and draw a schedule, without training.", simulation_presets(), presets.DEFAULT)
    # The heavy rooms are imported only now: help and refusals stay quick.
    from orchestrator.launch import simulate
    from orchestrator.launch.command import console, guarded

    raise SystemExit(guarded(PROG, lambda: simulate.run(config, console())))
