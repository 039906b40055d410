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

from orchestrator.config.cli import parse, refuse
from orchestrator.config.errors import ConfigError, Problem, suggestion
from orchestrator.data import pack_config, shards_config
from orchestrator.launch import environment

PROG = "shards.py"


class Word(NamedTuple):
    """What a first word does."""

    summary: str
    presets: Callable[[], Any]
    default: str  # preset
    function: str  # module:function, from a configuration to an exit status


WORDS = {
    "pack": Word("Images into tars.", pack_config.presets, "folder", "orchestrator.launch.packing:pack"),
    "index": Word("Adopts others' tars.", shards_config.index_presets, "tars", "orchestrator.launch.shards:index_tars"),
    "verify": Word("Checks one.", shards_config.verify_presets, "dataset", "orchestrator.launch.shards:verify_all"),
}


def main(word: str = "--help", *arguments: str) -> int:
    if word in ("--help", "-h"):
        told = [f"  {name:<8}{known.summary}" for name, known in WORDS.items()]
        print("\n".join([f"usage: {PROG} WORD ...", "", *told, "", f"`{PROG} WORD --help` tells more of each."]))
        return 0
    if word not in WORDS:
        refuse(PROG, ConfigError(Problem(word, "unknown word" + suggestion(word, list(WORDS), "words"))))
    known = WORDS[word]
    config = parse(f"{PROG} {word}", known.summary, known.presets(), known.default, arguments)
    # Ray reads its switches when it is imported, and the heavy rooms are imported only now: help stays quick.
    environment.switch()
    from orchestrator.launch.command import guarded

    module, _, function = known.function.partition(":")
    return guarded(PROG, lambda: int(getattr(import_module(module), function)(config)))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
