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
from typing import TYPE_CHECKING, Any

from orchestrator.cli import config as command_lines
from orchestrator.config.arg_parser import Preset, exit_with_error, parse_args
from orchestrator.config.base import Config
from orchestrator.config.errors import PROGRAM, ConfigError, FieldError, format_command, format_suggestion
from orchestrator.data.build.config import IndexConfig, PackConfig, VerifyConfig, pack_presets
from orchestrator.ensemble.config import EvaluateConfig, PredictConfig, ServeConfig, TrainEnsembleConfig
from orchestrator.models.config import NETWORKS, CostConfig
from orchestrator.ray_backend import ray_env
from orchestrator.ray_backend.run_spec import JobConfig, build_job_presets, make_preset_loader
from orchestrator.recipe import presets
from orchestrator.scheduler.config import TrainModel
from orchestrator.tuning.config import TuneJob

if TYPE_CHECKING:
    from rich.console import Console

_HELP_FLAGS = ("--help", "-h")
_PLACES = ("data", "storage", "tracking", "experiment")
_TRAINING = ("epochs", "batch_size", "schedule.base_rate", "placement.workers", "new", "dry_run")
_READERS = ("predict", "status", "stop", "audit")  # whose work ends with the reader of their output
_COMMAND = re.compile(rf"(?<!\S){PROGRAM} ([a-z-]+)")  # in an example
_RUN_STATUSES = "Exit status: 0 done, 1 failed, 2 wrong usage, 128 + N stopped by signal N."


@dataclass(frozen=True)
class Command:
    """A command: its summary, the class of its command line, and its help."""

    summary: str
    config: type[Config]
    example: str  # shell lines, each followed by an indented line that explains it
    common: tuple[str, ...] = ()  # flags that the help lists first
    notes: str = _RUN_STATUSES  # below the summary in the help

    def build_presets(self) -> tuple[Mapping[str, Preset[Any]], str, Callable[[str], Preset[Any]] | None]:
        """Return the presets, the name of the default one (empty where it is the only one), and the loader of files."""
        if issubclass(self.config, JobConfig):
            return build_job_presets(self.config), presets.DEFAULT, make_preset_loader(self.config)
        if self.config is command_lines.SimulateConfig:
            return command_lines.build_simulate_presets(), presets.DEFAULT, command_lines.load_simulate_preset
        if self.config is PackConfig:
            return pack_presets(), "folder", None
        if self.config is CostConfig:
            return {model.kind: Preset(CostConfig(model=model)) for model in NETWORKS}, "googlenet", None
        return {"": Preset(self.config())}, "", None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `orchestrator COMMAND ...`; return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return _run_listed(PROGRAM, "Train, score and use ensembles of networks.", COMMANDS, given)


def run_job(script: str) -> int:
    """Run the command of a script in jobs/ with the arguments of this process; return the exit status."""
    program = os.path.basename(script)
    name = program.removesuffix(".py").replace("_", "-")
    return _run_command(program, name, COMMANDS[name], sys.argv[1:])


def _run_listed(program: str, description: str, commands: Mapping[str, Command | str], arguments: list[str]) -> int:
    if not arguments or arguments[0] in _HELP_FLAGS:
        width = max(map(len, commands))
        summaries = {name: each if isinstance(each, str) else each.summary for name, each in commands.items()}
        lines = [f"usage: {program} COMMAND ...", "", description, "", "commands:"]
        lines += [f"  {name:<{width}}  {summary}" for name, summary in summaries.items()]
        sys.stdout.write("\n".join([*lines, "", f"`{program} COMMAND --help` explains a command.", ""]))
        return 0
    name, *rest = arguments
    if name not in commands:
        problem = "unknown command" + format_suggestion(name, list(commands), "commands")
        exit_with_error(program, ConfigError(FieldError(name, problem)))
    return _run_command(f"{program} {name}", name, commands[name], rest)


def _run_command(program: str, name: str, command: Command | str, arguments: list[str]) -> int:
    if isinstance(command, str):
        return _run_listed(program, command, SHARD_COMMANDS, arguments)
    known, default, load_file = command.build_presets()
    config = parse_args(
        program,
        f"{command.summary}\n\n{command.notes}",
        known,
        default,
        arguments,
        from_file=load_file,
        common=command.common,
        example=_COMMAND.sub(lambda match: format_command(match[1]), command.example),
    )
    _prepare_process(program, config)
    function = _import_command(name)
    from orchestrator.cli import exit_status  # it imports readers of storage, which help does not need

    def run() -> int:
        result = function(config, exit_status.make_console())
        return result if isinstance(result, int) else int(result.exit_status)

    return exit_status.run_command(program, run, finishes_unread=name not in _READERS)


def _prepare_process(program: str, config: Config) -> None:
    """Set the environment that a command needs before its module is imported; a training connects in the background.

    Exits with status 2 when places or environment cannot work.
    """
    match config:
        case command_lines.StatusConfig() | command_lines.StopConfig() | CostConfig():
            pass
        case PackConfig() | IndexConfig() | VerifyConfig():
            ray_env.set_ray_variables()
        case EvaluateConfig():
            ray_env.configure_ray_or_exit(program, config.provisional_destination, config.placement)
        case JobConfig():
            ray_env.configure_ray_or_exit(program, config.destination, config.placement)
            workers, cpus = config.placement.workers, 0
            if isinstance(config, TuneJob):
                ray_env.set_tune_variables()
                workers, cpus = 0, workers * config.placement.cpus_per_worker
            if not config.dry_run:
                from orchestrator.ray_backend import cluster  # Ray reads its switches when it is imported

                cluster.connect_in_background(workers, cpus)
        case _:
            ray_env.prepare_process()


def _import_command(name: str) -> Callable[[Any, Console], Any]:  # noqa: C901, PLR0912  a case for each command
    """Return the function of a command from its module, imported only now: torch, ray and mlflow take seconds.

    It takes configuration and console, and returns the exit status or a result that has it.
    """
    run: Callable[[Any, Console], Any]
    match name:
        case "train":
            from orchestrator.cli.train import train_model as run  # heavy
        case "train-ensemble":
            from orchestrator.cli.train_ensemble import train_ensemble as run  # heavy
        case "tune":
            from orchestrator.cli.tune import run_tune as run  # heavy
        case "evaluate":
            from orchestrator.cli.train_ensemble import evaluate_runs as run  # heavy
        case "predict":
            from orchestrator.cli.predict import run_predict as run  # heavy
        case "serve":
            from orchestrator.cli.serve import run_serve as run  # heavy
        case "status":
            from orchestrator.cli.status import run_status as run  # it loads readers of storage
        case "stop":
            from orchestrator.cli.stop import run_stop as run  # it loads readers of storage
        case "audit":
            from orchestrator.cli.audit import run_audit as run  # heavy
        case "simulate":
            from orchestrator.cli.simulate import run_simulate as run  # heavy
        case "cost":
            from orchestrator.models.cost import print_cost as run  # heavy
        case "pack":
            from orchestrator.cli.shards import pack_dataset as run  # heavy
        case "index":
            from orchestrator.data.build.indexing import index_dataset as run  # heavy
        case _:
            from orchestrator.data.build.verify import verify_dataset as run  # heavy
    return run


# A text is the summary of what has commands of its own.
COMMANDS: dict[str, Command | str] = {
    "train": Command(
        "Train one model and record it in MLflow.",
        TrainModel,
        """
orchestrator train googlenet-digits --schedule.kind cosine
    a preset with one value changed
orchestrator train googlenet-imagenet --data /data/flowers-packed --batch-size 64 --epochs 30
    your own images, which `shards pack folder` has packed
orchestrator train s3://bucket/winner.json --data s3://bucket/imagenet
    the recipe in a file: a run's recipe.json, or the winner of a sweep""",
        common=(*_PLACES, *_TRAINING),
    ),
    "train-ensemble": Command(
        "Train an ensemble of independent models, score it with 1 / 10 / 144 crops and record it in MLflow.",
        TrainEnsembleConfig,
        """
orchestrator train-ensemble
    seven GoogLeNets on the embedded handwritten digits, on this machine
orchestrator train-ensemble googlenet-imagenet --data /data/flowers-packed --ensemble.members 3 --epochs 30
    three models of your own images, which `shards pack folder` has packed
ray job submit --working-dir . -- orchestrator train-ensemble googlenet-imagenet --data s3://bucket/imagenet
    the paper's ensemble on a cluster""",
        common=(*_PLACES, "ensemble.members", *_TRAINING),
    ),
    "tune": Command(
        "Search for a schedule, or any other value of a recipe, by many trials.",
        TuneJob,
        """
orchestrator tune
    sixteen schedules on the embedded handwritten digits, on this machine
orchestrator tune googlenet-imagenet --data s3://bucket/imagenet --space space.toml
    your own data and search space""",
        common=(*_PLACES, "space", "sampler", "scheduler", "metric", "budget.trials", "epochs", "dry_run"),
        notes=f"The winner is a recipe file for train and train-ensemble. {_RUN_STATUSES}",
    ),
    "evaluate": Command(
        "Score finished models as one ensemble with 1 / 10 / 144 crops. Existing scores are reused.",
        EvaluateConfig,
        """
orchestrator evaluate googlenet-digits-x7-0123456789
    all members of an ensemble
orchestrator evaluate s3://bucket/runs/ensembles/googlenet-imagenet-x7-0123456789 --data s3://bucket/own-images
    models of another storage on your own images of the same classes; by default on the dataset they were trained on""",
        common=("members", "weights", *_PLACES, "dry_run"),
    ),
    "predict": Command(
        "Classify images with an ensemble or a model. Needs no cluster.",
        PredictConfig,
        """
orchestrator predict cat.jpg holiday/ s3://bucket/photos/ https://example.org/dog.jpg
    your own images, by the registered champion
orchestrator predict cat.jpg --model googlenet-digits-x7-0123456789abcdef --members 1,3 --crops 144
    two models of one ensemble, with all 144 crops""",
        common=("model", "members", "crops", "top", "json", "storage", "tracking"),
        notes="Exit status: 0 all images were classified, 1 some could not be read, 2 wrong usage.",
    ),
    "serve": Command(
        "Classify images over HTTP with an ensemble or a model. Needs no cluster.",
        ServeConfig,
        """
orchestrator serve --port 8080
    then: curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' 'http://127.0.0.1:8080/?crops=144&top=3'""",
        common=("model", "members", "host", "port", "crops", "top", "storage", "tracking"),
        notes="GET /health answers when it is ready. For images in base64 in JSON use `mlflow models serve`.",
    ),
    "shards": "Make, adopt and check datasets of WebDataset tars.",
    "status": Command(
        "Show the state of runs, ensembles and sweeps, from their storage alone.",
        command_lines.StatusConfig,
        """
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
        command_lines.StopConfig,
        """
orchestrator stop googlenet-digits-m1-0123456789abcdef
    a run; stopping a member stops its whole ensemble""",
        notes="Exit status: 0 they have ended, or --wait 0; 1 one still runs after --wait seconds; 2 wrong usage "
        "or an unknown run. Rerun the command that started them to resume.",
    ),
    "audit": Command(
        "Compare the samples that runs were trained on with their plan, epoch by epoch.",
        command_lines.AuditConfig,
        """
orchestrator audit s3://bucket/runs/models/googlenet-imagenet-0123456789 --data s3://bucket/imagenet
    a run anywhere, whose dataset has moved""",
        notes="Exit status: 0 as planned, 1 not as planned, 2 wrong usage or an unknown run.",
    ),
    "simulate": Command(
        "Print and draw the learning-rate schedule of a recipe and augmented images, without training.",
        command_lines.SimulateConfig,
        """
orchestrator simulate googlenet-imagenet --data /data/flowers-packed --out ~/previews
    with pictures of the schedule and of your own images
orchestrator simulate winner.json
    the recipe in a file""",
        common=("data", "out", "samples", "epochs", "batch_size", "schedule.base_rate"),
    ),
    "cost": Command(
        "Print the parameters and multiply-adds of a network.",
        CostConfig,
        """
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
        PackConfig,
        """
orchestrator shards pack folder --source.url /data/flowers --source.holdout 0.1 --url /data/flowers-packed
    your own images: a folder for each class, a tenth of each held out for validation
ray job submit --working-dir . -- orchestrator shards pack ilsvrc --source.url s3://raw/ilsvrc --url s3://bucket/imagenet
    ILSVRC 2012's own tars, by tasks on a cluster; rerun it after a kill to resume""",
        common=("source.url", "source.holdout", "url", "name", "resize", "dry_run"),
    ),
    "index": Command(
        "Adopt WebDataset tars that were made elsewhere; they stay as they are.",
        IndexConfig,
        """
orchestrator shards index --url s3://bucket/own --train 'train-{0000..0146}.tar' --validation 'val-*.tar'
    your own tars""",
    ),
    "verify": Command(
        "Check a dataset.",
        VerifyConfig,
        """
orchestrator shards verify --url s3://bucket/imagenet --deep
    decode every image, too""",
    ),
}
