"""Sums over the steps of an epoch."""

import time
from collections.abc import Iterator

import pytest
import torch

from orchestrator.training.epoch_meter import EpochMeter


def test_sums_and_a_new_start() -> None:
    meter = EpochMeter(torch.device("cpu"))
    for loss, weight in ((1.5, 3.0), (2.5, 4.0)):
        meter.record_step(torch.tensor(loss), weight)
    assert (meter.read_loss_sum(), meter.weight, meter.steps) == (4.0, 7.0, 2)
    meter.reset()
    assert (meter.read_loss_sum(), meter.weight, meter.steps, meter.waited_seconds) == (0.0, 0.0, 0, 0.0)


def test_waiting_is_counted_and_working_is_not() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    meter = EpochMeter(torch.device("cpu"))
    for _ in meter.time_batches(slow()):
        time.sleep(0.05)
    assert meter.waited_seconds >= 0.06
    assert meter.waited_seconds + 0.15 <= meter.elapsed_seconds


def test_the_batches_are_the_same_and_errors_pass() -> None:
    def ending() -> Iterator[int]:
        yield 1
        raise OSError("lost")

    meter = EpochMeter(torch.device("cpu"))
    assert list(meter.time_batches(iter([3, 1, 2]))) == [3, 1, 2]
    seen = meter.time_batches(ending())
    assert next(seen) == 1
    with pytest.raises(OSError, match="lost"):
        next(seen)


def test_a_loss_that_is_not_finite_stays_so() -> None:
    meter = EpochMeter(torch.device("cpu"))
    meter.record_step(torch.tensor(float("nan")), 1.0)
    meter.record_step(torch.tensor(1.0), 1.0)
    assert meter.read_loss_sum() != meter.read_loss_sum()


def test_percentiles_of_the_steps_leave_waiting_out() -> None:
    def slow() -> Iterator[int]:
        for number in range(11):
            time.sleep(0.02)
            yield number

    meter = EpochMeter(torch.device("cpu"))
    assert meter.compute_step_percentiles() == {}
    for number in meter.time_batches(slow()):
        time.sleep(0.2 if number == 10 else 0.001)
    found = meter.compute_step_percentiles()
    assert list(found) == [50, 90, 99]
    assert found[50] < 0.02
    assert found[99] > 0.1
