"""Trials on a real cluster of two CPUs: a trial that ends early frees its CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launched import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.essential]


def test_a_trial_that_is_ended_early_gives_its_cpu_back_while_others_train(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.tuning.returning", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["errors"] == [None, None]
    assert result["ahead"] == 2, "the trials got the processes that were started ahead"
    assert result["seconds"] < 30
