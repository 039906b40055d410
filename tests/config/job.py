"""Minimal job, run in a process of its own by test_arg_parser.py."""

import json
import sys

from orchestrator.config.arg_parser import Preset, parse_args
from tests.config.samples import Train

if __name__ == "__main__":
    presets = {
        "digits": Preset(Train(), "Minutes on a laptop.\nNot shown."),
        "googlenet-imagenet": Preset(Train(data="s3://imagenet"), "The paper."),
    }
    json.dump(parse_args("train", "Trains one model.", presets, "digits").to_dict(), sys.stdout)
