"""What networks cost: parameters and multiply-adds of one image, row by row or network by network.

GoogLeNet's rows are those of Table 1 (arXiv 1409.4842, section 5), beside the paper's own figures.

Run it: python -m orchestrator.models.cost [--model alexnet] [--width 1.0] [--module naive] [--image-size 224]
        python -m orchestrator.models.cost --compare
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence

from rich.console import Console

from orchestrator.config.base import Config
from orchestrator.config.output import PrintableConsole, prepare_output
from orchestrator.models import cost_print
from orchestrator.models.config import GoogLeNetConfig, ModelConfig
from orchestrator.models.measure import CLASSES, cost_table

COLUMNS = 110  # widest print


class _Asked(Config):
    model: ModelConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table for the command line's network; exits with status 2 and one line for an impossible one."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    fields = ("width", "module", "stem", "image_size")
    given = {name: getattr(chosen, name) for name in fields if getattr(chosen, name) is not None}
    if chosen.compare and (given or chosen.auxiliary or chosen.model):
        parser.error("--compare lists each network as it was published; leave all but --classes out")
    try:
        if chosen.compare:
            cost_print.compare(chosen.classes, _console())
            return
        config = _Asked.from_dict({"model": {"kind": chosen.model or "googlenet", **given}}).model
        rows = cost_table(config, chosen.classes)
    except ValueError as error:
        parser.error(str(error))
    cost_print.show(rows, config, chosen.classes, chosen.auxiliary, _console())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.models.cost", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = GoogLeNetConfig.model_fields["kind"].description
    parser.add_argument("--model", help=f"{kinds} (default: googlenet)")
    parser.add_argument("--compare", action="store_true", help="all networks, a line each, as they were published")
    parser.add_argument("--width", type=float, help="googlenet: multiplier on every filter count (default: 1.0)")
    parser.add_argument("--module", help="googlenet: reduced (Figure 2b, default) or naive (Figure 2a)")
    parser.add_argument("--stem", help="googlenet: plain (default) or separable, the one that Table 1 counts")
    parser.add_argument("--image-size", type=int, help="side of the input in pixels (default: the network's own)")
    parser.add_argument("--classes", type=int, default=CLASSES, help="classes (default: 1000)")
    parser.add_argument("--auxiliary", action="store_true", help="googlenet: also list the two auxiliary heads")
    return parser


def _console() -> Console:
    # A pipe has no width: rich would take 80 columns and cut.
    width = min(COLUMNS, shutil.get_terminal_size().columns) if sys.stdout.isatty() else COLUMNS
    prepare_output()
    return PrintableConsole(width=width, highlight=False)


if __name__ == "__main__":
    main()
