"""Print the learning-rate schedule of a recipe, draw it and a sheet of augmented images; nothing is trained.

python jobs/simulate.py googlenet-imagenet --schedule.kind cosine
    the table alone
python jobs/simulate.py googlenet-imagenet --data s3://bucket/imagenet --out ~/previews --tracking http://HOST:5000
    with pictures, in a folder and in MLflow
python jobs/simulate.py winner.json
    the recipe in a file: a run's recipe.json, or what a sweep handed over
"""

from orchestrator.cli.simulate_config import build_simulate_presets, load_simulate_preset
from orchestrator.config.arg_parser import parse_args
from orchestrator.ray_backend import ray_env
from orchestrator.recipe import presets

PROG = "simulate.py"

if __name__ == "__main__":
    config = parse_args(
        PROG,
        "Print and draw a schedule, without training.",
        build_simulate_presets(),
        presets.DEFAULT,
        from_file=load_simulate_preset,
    )
    # The heavy rooms are imported only now: help and refusals stay quick.
    ray_env.prepare_process()
    from orchestrator.cli import simulate
    from orchestrator.cli.exit_status import make_console
    from orchestrator.cli.run_command import run_cluster_command

    raise SystemExit(run_cluster_command(PROG, lambda: simulate.simulate_training(config, make_console())))
