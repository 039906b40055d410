"""Sums over the steps of an epoch."""

import time
from collections.abc import Iterator

import pytest
import torch

from orchestrator.training.meter import Meter


def test_sums_and_a_new_start() -> None:
    meter = Meter(torch.device("cpu"))
    for loss, weight in ((1.5, 3.0), (2.5, 4.0)):
        meter.add(torch.tensor(loss), weight)
    assert (meter.loss(), meter.weight, meter.steps) == (4.0, 7.0, 2)
    meter.start()
    assert (meter.loss(), meter.weight, meter.steps, meter.waited_seconds) == (0.0, 0.0, 0, 0.0)


def test_waiting_is_counted_and_working_is_not() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    meter = Meter(torch.device("cpu"))
    for _ in meter.timed(slow()):
        time.sleep(0.05)
    assert meter.waited_seconds >= 0.06
    assert meter.waited_seconds + 0.15 <= meter.seconds


def test_the_batches_are_the_same_and_errors_pass() -> None:
    def ending() -> Iterator[int]:
        yield 1
        raise OSError("lost")

    meter = Meter(torch.device("cpu"))
    assert list(meter.timed(iter([3, 1, 2]))) == [3, 1, 2]
    seen = meter.timed(ending())
    assert next(seen) == 1
    with pytest.raises(OSError, match="lost"):
        next(seen)


def test_a_loss_that_is_not_finite_stays_so() -> None:
    meter = Meter(torch.device("cpu"))
    meter.add(torch.tensor(float("nan")), 1.0)
    meter.add(torch.tensor(1.0), 1.0)
    assert meter.loss() != meter.loss()


def test_percentiles_of_the_steps_leave_waiting_out() -> None:
    def slow() -> Iterator[int]:
        for number in range(11):
            time.sleep(0.02)
            yield number

    meter = Meter(torch.device("cpu"))
    assert meter.step_percentiles() == {}
    for number in meter.timed(slow()):
        time.sleep(0.2 if number == 10 else 0.001)
    found = meter.step_percentiles()
    assert list(found) == [50, 90, 99]
    assert found[50] < 0.02
    assert found[99] > 0.1
