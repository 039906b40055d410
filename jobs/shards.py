"""Datasets as WebDataset tars with a manifest.

python jobs/shards.py pack folder --source.url /data/flowers --source.holdout 0.1 --url /data/flowers-packed
    a folder per class; `pack ilsvrc` takes ILSVRC2012's own tars
ray job submit --working-dir . -- python jobs/shards.py pack ilsvrc --source.url s3://raw/ilsvrc --url s3://data/imagenet
    the same as tasks on a cluster; given again after a kill, it goes on
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from orchestrator.config.arg_parser import exit_with_error, parse_args
from orchestrator.config.errors import ConfigError, FieldError, format_suggestion
from orchestrator.data.build import config
from orchestrator.ray_backend import ray_env

PROG = "shards.py"


class Subcommand(NamedTuple):
    """What a first word does."""

    summary: str
    presets: Callable[[], Any]
    default: str  # preset
    function: str  # module:function, from a configuration to an exit status


SUBCOMMANDS = {
    "pack": Subcommand("Images into tars.", config.pack_presets, "folder", "orchestrator.cli.shards:pack_dataset"),
    "index": Subcommand("Adopts others' tars.", config.index_presets, "tars", "orchestrator.cli.shards:index_tars"),
    "verify": Subcommand("Checks one.", config.verify_presets, "dataset", "orchestrator.cli.shards:verify_dataset"),
}


def main(word: str = "--help", *arguments: str) -> int:
    if word in ("--help", "-h"):
        told = [f"  {name:<8}{known.summary}" for name, known in SUBCOMMANDS.items()]
        print("\n".join([f"usage: {PROG} WORD ...", "", *told, "", f"`{PROG} WORD --help` tells more of each."]))
        return 0
    if word not in SUBCOMMANDS:
        exit_with_error(
            PROG, ConfigError(FieldError(word, "unknown word" + format_suggestion(word, list(SUBCOMMANDS), "words")))
        )
    known = SUBCOMMANDS[word]
    config = parse_args(f"{PROG} {word}", known.summary, known.presets(), known.default, arguments)
    # Ray reads its switches when it is imported, and the heavy rooms are imported only now: help stays quick.
    ray_env.set_ray_variables()
    from orchestrator.cli.run_command import run_cluster_command

    module, _, function = known.function.partition(":")
    return run_cluster_command(PROG, lambda: int(getattr(import_module(module), function)(config)))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
