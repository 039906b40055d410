"""The plan of a sweep whose plug-ins have changed since it began, and the line about a trial that ended."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.presets import googlenet_tiny
from orchestrator.tuning import run_sweep
from orchestrator.tuning.config import TuneJob
from orchestrator.tuning.run_sweep import SweepPlan
from orchestrator.tuning.space import Space
from orchestrator.tuning.trial import Metric
from tests.tuning import made

RATES = Space.from_dict({"dimensions": {"schedule.base_rate": {"values": [0.01, 0.02]}}})


def make_plan(digest: str, same_code_anyway: bool = False) -> SweepPlan:
    base = googlenet_tiny()
    job = TuneJob.from_dict({"recipe": base.to_dict(), "same_code_anyway": same_code_anyway})
    coded = base.model_copy(update={"code": {"own:Net": digest}}) if digest else base
    return SweepPlan(job, coded, RATES, "0" * 16)


def store(storage: Path, plan: SweepPlan) -> None:
    folder = storage / "sweeps" / plan.name
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"base": plan.base.to_dict()}))


def match(storage: Path, plan: SweepPlan) -> tuple[SweepPlan, list[str]]:
    lines: list[str] = []
    return run_sweep.match_code(plan, str(storage), lines.append), lines


def test_changed_code_is_another_sweep_and_the_job_says_so(tmp_path: Path) -> None:
    began, now = make_plan("1"), make_plan("2")
    store(tmp_path, began)
    other = replace(now, dataset_digest="1" * 16)
    assert match(tmp_path, other) == (other, []), "a sweep over other data is no such sweep"
    assert match(tmp_path, now) == (
        now,
        [
            f"{now.name}: the code of own:Net has changed since {began.name} began, so this is another one; "
            "--same-code-anyway resumes that one"
        ],
    )
    store(tmp_path, now)
    assert match(tmp_path, now) == (now, []), "it has begun"


def test_a_flag_resumes_the_sweep_of_the_old_code(tmp_path: Path) -> None:
    began, now = make_plan("1"), make_plan("2", same_code_anyway=True)
    assert match(tmp_path, now) == (now, [])
    store(tmp_path, began)
    (tmp_path / "sweeps" / "googlenet-tiny-sweep-damaged").mkdir()
    (tmp_path / "sweeps" / "googlenet-tiny-sweep-damaged" / "sweep.json").write_text("{")
    found, lines = match(tmp_path, now)
    assert (found.name, found.base) == (began.name, began.base)
    assert lines == [f"{began.name}: resumed, though the code of own:Net has changed since it began"]
    store(tmp_path, make_plan("3"))
    with pytest.raises(ConfigError, match="differ in their code only; remove all but one of them"):
        match(tmp_path, now)


def test_a_sweep_without_plug_ins_looks_at_no_other(tmp_path: Path) -> None:
    store(tmp_path, make_plan("1"))
    plan = make_plan("", same_code_anyway=True)
    assert match(tmp_path, plan) == (plan, [])


def test_the_plug_ins_of_a_space_count_as_well() -> None:
    base: Recipe = googlenet_tiny()
    kinds = Space.from_dict({"dimensions": {"model.kind": {"values": ["googlenet", "examples.small_cnn:SmallCNN"]}}})
    assert RATES.pin_code(base) is base
    assert kinds.pin_code(base).code.keys() == {"examples.small_cnn:SmallCNN"}


def test_a_trial_that_ended_is_a_line() -> None:
    metric = Metric(name="top1_error")
    finished = made.trial(1, [9.0, 8.125], assignment={"schedule.base_rate": 0.0123456})
    assert run_sweep.format_end(finished, metric) == (
        "t001: finished after 2 of 26 epochs, top-1 error 8.12% (base_rate=0.01235)"
    )
    failed = made.trial(2, [], "failed", {"a.kind": "x"}, reason="OSError: no space")
    assert run_sweep.format_end(failed, metric) == (
        "t002: failed after 0 of 26 epochs, top-1 error - (kind=x): OSError: no space"
    )
