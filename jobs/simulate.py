"""Print the learning-rate schedule of a recipe, draw it and a sheet of augmented images; nothing is trained.

python jobs/simulate.py googlenet-imagenet --schedule.kind cosine
    the table alone
python jobs/simulate.py googlenet-imagenet --data s3://bucket/imagenet --out ~/previews --tracking http://HOST:5000
    with pictures, in a folder and in MLflow
python jobs/simulate.py winner.json
    the recipe in a file: a run's recipe.json, or what a sweep handed over
"""

from orchestrator.config.cli import parse
from orchestrator.launch import environment
from orchestrator.launch.simulation import simulation_from_file, simulation_presets
from orchestrator.recipe import presets

PROG = "simulate.py"

if __name__ == "__main__":
    config = parse(
        PROG,
        "Print and draw a schedule, without training.",
        simulation_presets(),
        presets.DEFAULT,
        from_file=simulation_from_file,
    )
    # The heavy rooms are imported only now: help and refusals stay quick.
    environment.settle()
    from orchestrator.launch import simulate
    from orchestrator.launch.command import console, guarded

    raise SystemExit(guarded(PROG, lambda: simulate.run(config, console())))
