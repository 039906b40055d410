"""The command `orchestrator`, whose sub-commands the scripts in jobs/ run as well.

Importable without torch, ray and mlflow: help and usage errors take less than a second. Each command imports its own
module once its command line is valid.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.cli import config as command_lines
from orchestrator.config.arg_parser import Preset, exit_with_error, parse_args
from orchestrator.config.errors import PROGRAM, ConfigError, FieldError, format_command, format_suggestion
from orchestrator.data.build import config as dataset_config
from orchestrator.ensemble.config import EvaluateConfig, PredictConfig, ServeConfig, TrainEnsembleConfig
from orchestrator.models.config import NETWORKS, CostConfig
from orchestrator.ray_backend import ray_env
from orchestrator.ray_backend.run_spec import build_job_presets, make_preset_loader
from orchestrator.recipe import presets
from orchestrator.scheduler.config import TrainModel
from orchestrator.tuning.config import TuneJob

_HELP_FLAGS = ("--help", "-h")
_PLACES = ("data", "storage", "tracking", "experiment")
_TRAINING = ("epochs", "batch_size", "schedule.base_rate", "placement.workers", "new", "dry_run")
_COMMAND = re.compile(rf"(?<!\S){PROGRAM} ([a-z-]+)")  # in an example
_RUN_STATUSES = "Exit status: 0 done, 1 failed, 2 wrong usage, 128 + N stopped by signal N."

MainFn = Callable[[Any], int]  # from a valid configuration to the exit status


@dataclass(frozen=True)
class Command:
    """A command: its command line, its help, and what has to be set before its module is imported."""

    summary: str
    build_presets: Callable[[], Mapping[str, Preset[Any]]] = dict
    default: str = presets.DEFAULT
    from_file: Callable[[str], Preset[Any]] | None = None
    prepare: Callable[[str, Any], None] = lambda program, config: ray_env.prepare_process()
    example: str = ""  # shell lines, each followed by an indented line that explains it
    common: tuple[str, ...] = ()  # flags that the help lists first
    notes: str = ""  # below the summary in the help
    finishes_unread: bool = True  # it completes its work when its terminal or the reader of its output is gone
    run: Callable[[str, list[str]], int] | None = None  # from program and arguments to the exit status; replaces all


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `orchestrator COMMAND ...`; return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return _run_listed(PROGRAM, "Train, score and use ensembles of networks.", COMMANDS, given)


def run_job(script: str) -> int:
    """Run the command of a script in jobs/ with the arguments of this process; return the exit status."""
    program = os.path.basename(script)
    name = program.removesuffix(".py").replace("_", "-")
    return _run_command(program, name, COMMANDS[name], sys.argv[1:])


def _run_listed(program: str, description: str, commands: Mapping[str, Command], arguments: list[str]) -> int:
    """Run the command that the first argument names, or list the commands."""
    if not arguments or arguments[0] in _HELP_FLAGS:
        width = max(map(len, commands))
        lines = [f"usage: {program} COMMAND ...", "", description, "", "commands:"]
        lines += [f"  {name:<{width}}  {command.summary}" for name, command in commands.items()]
        sys.stdout.write("\n".join([*lines, "", f"`{program} COMMAND --help` explains a command.", ""]))
        return 0
    name, *rest = arguments
    if name not in commands:
        problem = "unknown command" + format_suggestion(name, list(commands), "commands")
        exit_with_error(program, ConfigError(FieldError(name, problem)))
    return _run_command(f"{program} {name}", name, commands[name], rest)


def _run_command(program: str, name: str, command: Command, arguments: list[str]) -> int:
    if command.run is not None:
        return command.run(program, arguments)
    config = parse_args(
        program,
        "\n\n".join(filter(None, (command.summary, command.notes))),
        command.build_presets(),
        command.default,
        arguments,
        from_file=command.from_file,
        common=command.common,
        example=_COMMAND.sub(lambda match: format_command(match[1]), command.example),
    )
    command.prepare(program, config)
    function = _import_command(name)
    from orchestrator.cli import exit_status  # it imports readers of storage, which help does not need

    shown = program.removesuffix(f" {name}") if name in SHARD_COMMANDS else program
    return exit_status.run_command(shown, lambda: function(config), command.finishes_unread)


def _import_command(name: str) -> MainFn:  # noqa: PLR0911 - a case for each command
    """Return the function of a command from its module, imported only now: torch, ray and mlflow take seconds."""
    match name:
        case "train":
            from orchestrator.cli import train  # heavy

            return train.run_train
        case "train-ensemble" | "evaluate":
            from orchestrator.cli import evaluate, train_ensemble  # heavy

            return evaluate.run_evaluate if name == "evaluate" else train_ensemble.run_train_ensemble
        case "tune":
            from orchestrator.cli import tune  # heavy

            return tune.run_tune
        case "predict":
            from orchestrator.cli import predict  # heavy

            return predict.run_predict
        case "serve":
            from orchestrator.cli import serve  # heavy

            return serve.run_serve
        case "status" | "stop":
            from orchestrator.cli import status, stop  # they load readers of storage

            return status.run_status if name == "status" else stop.run_stop
        case "audit" | "simulate":
            from orchestrator.cli import audit, simulate  # heavy

            return audit.run_audit if name == "audit" else simulate.run_simulate
        case "cost":
            from orchestrator.models import cost  # torch takes seconds to import

            return cost.print_cost
        case _:
            from orchestrator.cli import shards  # heavy

            functions: dict[str, MainFn] = {
                "pack": shards.pack_dataset,
                "index": shards.index_tars,
                "verify": shards.verify_dataset,
            }
            return functions[name]


def _run_shards(program: str, arguments: list[str]) -> int:
    return _run_listed(program, "Make, adopt and check datasets of WebDataset tars.", SHARD_COMMANDS, arguments)


def _prepare_training(program: str, config: TrainModel | TrainEnsembleConfig | TuneJob) -> None:
    """Check places and environment, set Ray's switches and connect in the background, unless only a plan is asked for.

    Exits with status 2 when something is wrong.
    """
    ray_env.configure_ray_or_exit(program, config.destination, config.placement)
    if isinstance(config, TuneJob):
        ray_env.set_tune_variables()
    if config.dry_run:
        return
    from orchestrator.ray_backend import cluster  # Ray reads its switches when it is imported

    workers = config.placement.workers
    if isinstance(config, TuneJob):
        cluster.connect_in_background(trial_cpus=workers * config.placement.cpus_per_worker)
    else:
        cluster.connect_in_background(workers)


def _prepare_evaluation(program: str, config: EvaluateConfig) -> None:
    ray_env.configure_ray_or_exit(program, config.provisional_destination, config.placement)


def _prepare_packing(program: str, config: object) -> None:
    ray_env.set_ray_variables()


COMMANDS = {
    "train": Command(
        "Train one model and record it in MLflow.",
        lambda: build_job_presets(TrainModel),
        from_file=make_preset_loader(TrainModel),
        prepare=_prepare_training,
        example="""
orchestrator train googlenet-digits --schedule.kind cosine
    a preset with one value changed
orchestrator train googlenet-imagenet --data /data/flowers-packed --batch-size 64 --epochs 30
    your own images, which `shards pack folder` has packed
orchestrator train s3://bucket/winner.json --data s3://bucket/imagenet
    the recipe in a file: a run's recipe.json, or the winner of a sweep""",
        common=(*_PLACES, *_TRAINING),
        notes=_RUN_STATUSES,
    ),
    "train-ensemble": Command(
        "Train an ensemble of independent models, score it with 1 / 10 / 144 crops and record it in MLflow.",
        lambda: build_job_presets(TrainEnsembleConfig),
        from_file=make_preset_loader(TrainEnsembleConfig),
        prepare=_prepare_training,
        example="""
orchestrator train-ensemble
    seven GoogLeNets on the embedded handwritten digits, on this machine
orchestrator train-ensemble googlenet-imagenet --data /data/flowers-packed --ensemble.members 3 --epochs 30
    three models of your own images, which `shards pack folder` has packed
ray job submit --working-dir . -- orchestrator train-ensemble googlenet-imagenet --data s3://bucket/imagenet
    the paper's ensemble on a cluster""",
        common=(*_PLACES, "ensemble.members", *_TRAINING),
        notes=_RUN_STATUSES,
    ),
    "tune": Command(
        "Search for a schedule, or any other value of a recipe, by many trials.",
        lambda: build_job_presets(TuneJob),
        from_file=make_preset_loader(TuneJob),
        prepare=_prepare_training,
        example="""
orchestrator tune
    sixteen schedules on the embedded handwritten digits, on this machine
orchestrator tune googlenet-imagenet --data s3://bucket/imagenet --space space.toml
    your own data and search space""",
        common=(*_PLACES, "space", "sampler", "scheduler", "metric", "budget.trials", "epochs", "dry_run"),
        notes=f"The winner is a recipe file for train and train-ensemble. {_RUN_STATUSES}",
    ),
    "evaluate": Command(
        "Score finished models as one ensemble with 1 / 10 / 144 crops. Existing scores are reused.",
        lambda: {"runs": Preset(EvaluateConfig())},
        "runs",
        prepare=_prepare_evaluation,
        example="""
orchestrator evaluate googlenet-digits-x7-0123456789
    all members of an ensemble
orchestrator evaluate googlenet-digits-m1-0123456789 googlenet-digits-m2-0123456789
    any models
orchestrator evaluate s3://bucket/runs/ensembles/googlenet-imagenet-x7-0123456789 --data s3://bucket/own-images
    models of another storage on your own images of the same classes; by default on the dataset they were trained on""",
        common=("members", "weights", *_PLACES, "dry_run"),
        notes=_RUN_STATUSES,
    ),
    "predict": Command(
        "Classify images with an ensemble or a model. Needs no cluster.",
        lambda: {"images": Preset(PredictConfig())},
        "images",
        finishes_unread=False,
        example="""
orchestrator predict cat.jpg holiday/ s3://bucket/photos/ https://example.org/dog.jpg
    your own images, by the registered champion or, without one, by the newest complete ensemble
orchestrator predict cat.jpg --model googlenet-digits-x7-0123456789abcdef --members 1,3 --crops 144
    two models of one ensemble, with all 144 crops
orchestrator predict cat.jpg --model models:/googlenet-digits@champion --json
    the ensemble of that name in MLflow's registry; a line of JSON for each image""",
        common=("model", "members", "crops", "top", "json", "storage", "tracking"),
        notes="Exit status: 0 all images were classified, 1 some could not be read, 2 wrong usage.",
    ),
    "serve": Command(
        "Classify images over HTTP with an ensemble or a model. Needs no cluster.",
        lambda: {"model": Preset(ServeConfig())},
        "model",
        example="""
orchestrator serve --port 8080
    then: curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' 'http://127.0.0.1:8080/?crops=144&top=3'
orchestrator serve --model models:/googlenet-digits@champion --members 1,3
    two models of the ensemble of that name in MLflow's registry""",
        common=("model", "members", "host", "port", "crops", "top", "storage", "tracking"),
        notes="GET /health answers when it is ready. For images in base64 in JSON use `mlflow models serve`.",
    ),
    "shards": Command("Make, adopt and check datasets of WebDataset tars.", run=_run_shards),
    "status": Command(
        "Show the state of runs, ensembles and sweeps, from their storage alone.",
        lambda: {"runs": Preset(command_lines.StatusConfig())},
        "runs",
        prepare=lambda program, config: None,
        finishes_unread=False,
        example="""
orchestrator status
    everything in the default storage; of sweeps only active and failed trials
orchestrator status googlenet-digits-x7-0123456789abcdef --watch 5
    one ensemble with its members, updated every 5 s until nothing runs or Ctrl-C
orchestrator status s3://bucket/runs/models/googlenet-imagenet-0123456789abcdef --json
    a run anywhere, for programs: one JSON list on a line for each update""",
        notes="States: waiting (for resources), starting, running, restarting (its workers crashed), stopping, "
        "finished, stopped, failed, lost (its driver died without releasing its lease), unreadable (a record is "
        "damaged or forbidden); for trials also pruned (ended early) and diverged.\n"
        "Exit status: 0 none failed, lost or unreadable, 1 some are, 2 wrong usage or an unknown run.",
    ),
    "stop": Command(
        "Stop runs and ensembles from anywhere; they save a checkpoint first.",
        lambda: {"runs": Preset(command_lines.StopConfig())},
        "runs",
        prepare=lambda program, config: None,
        finishes_unread=False,
        example="""
orchestrator stop googlenet-digits-m1-0123456789abcdef
    a run; stopping a member stops its whole ensemble
orchestrator stop s3://bucket/runs/ensembles/googlenet-imagenet-x7-0123456789abcdef --wait 600
    an ensemble anywhere, which may take longer to save
orchestrator stop RUN --no-save
    immediately, without a checkpoint: work since the last one is repeated on resume""",
        notes="Exit status: 0 they have ended, or --wait 0; 1 one still runs after --wait seconds; 2 wrong usage "
        "or an unknown run. Rerun the command that started them to resume.",
    ),
    "audit": Command(
        "Compare the samples that runs were trained on with their plan, epoch by epoch.",
        lambda: {"runs": Preset(command_lines.AuditConfig())},
        "runs",
        finishes_unread=False,
        example="""
orchestrator audit googlenet-digits-m1-0123456789
    a run in the default storage
orchestrator audit s3://bucket/runs/models/googlenet-imagenet-0123456789 --data s3://bucket/imagenet
    a run anywhere, whose dataset has moved""",
        notes="Exit status: 0 as planned, 1 not as planned, 2 wrong usage or an unknown run.",
    ),
    "simulate": Command(
        "Print and draw the learning-rate schedule of a recipe and augmented images, without training.",
        command_lines.build_simulate_presets,
        from_file=command_lines.load_simulate_preset,
        example="""
orchestrator simulate googlenet-imagenet --schedule.kind cosine
    the table alone
orchestrator simulate googlenet-imagenet --data /data/flowers-packed --out ~/previews --tracking http://HOST:5000
    with pictures of your own images, in a folder and in MLflow
orchestrator simulate winner.json
    the recipe in a file""",
        common=("data", "out", "samples", "tracking", "experiment", "epochs", "batch_size", "schedule.base_rate"),
    ),
    "cost": Command(
        "Print the parameters and multiply-adds of a network.",
        lambda: {model.kind: Preset(CostConfig(model=model)) for model in NETWORKS},
        "googlenet",
        prepare=lambda program, config: None,
        finishes_unread=False,
        example="""
orchestrator cost alexnet
    a network of the paper's comparison as it was published
orchestrator cost googlenet --model.width 1.25 --classes 100
    a wider GoogLeNet""",
        common=("classes", "model.image_size"),
    ),
}
SHARD_COMMANDS = {
    "pack": Command(
        "Pack images into tars.",
        dataset_config.pack_presets,
        "folder",
        prepare=_prepare_packing,
        example="""
orchestrator shards pack folder --source.url /data/flowers --source.holdout 0.1 --url /data/flowers-packed
    your own images: a folder for each class, a tenth of each held out for validation
ray job submit --working-dir . -- orchestrator shards pack ilsvrc --source.url s3://raw/ilsvrc --url s3://bucket/imagenet
    ILSVRC 2012's own tars, by tasks on a cluster; rerun it after a kill to resume""",
        common=("source.url", "source.holdout", "url", "name", "resize", "dry_run"),
    ),
    "index": Command(
        "Adopt WebDataset tars that were made elsewhere; they stay as they are.",
        dataset_config.index_presets,
        "tars",
        prepare=_prepare_packing,
        example="""
orchestrator shards index --url s3://bucket/own --train 'train-{0000..0146}.tar' --validation 'val-*.tar'
    your own tars""",
    ),
    "verify": Command(
        "Check a dataset.",
        dataset_config.verify_presets,
        "dataset",
        prepare=_prepare_packing,
        example="""
orchestrator shards verify --url s3://bucket/imagenet --deep
    decode every image, too""",
    ),
}
