"""Sums over the steps of an epoch."""

import math
import time
from collections.abc import Iterator

import pytest
import torch

from orchestrator.training.rank_sync import EpochMeter, StepSums


def sums(loss: float, correct: int = 0) -> StepSums:
    return StepSums(torch.tensor(loss), torch.tensor(correct))


def test_steps_add_up() -> None:
    meter = EpochMeter(torch.device("cpu"))
    for loss, correct, weight in ((1.5, 2, 3.0), (2.5, 1, 4.0)):
        meter.record_step(sums(loss, correct), weight)
    assert (meter.read_sums(), meter.weight, meter.steps) == ((4.0, 3.0), 7.0, 2)


def test_metrics_of_an_epoch_are_means_over_its_samples() -> None:
    metrics = EpochMeter(torch.device("cpu")).compute_metrics(loss=8.0, weight=16.0, correct=4.0, learning_rate=0.1)
    assert (metrics["train/loss"], metrics["train/top1_accuracy"], metrics["train/rate"]) == (0.5, 25.0, 0.1)


def test_waiting_is_counted_and_working_is_not() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    meter = EpochMeter(torch.device("cpu"))
    for _ in meter.time_batches(slow()):
        time.sleep(0.05)
    assert meter.waited_seconds >= 0.06
    assert meter.waited_seconds + 0.15 <= time.perf_counter() - meter.start_time


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
    meter.record_step(sums(float("nan")), 1.0)
    meter.record_step(sums(1.0), 1.0)
    assert math.isnan(meter.read_sums()[0])


def test_percentiles_of_the_steps_leave_waiting_out() -> None:
    def slow() -> Iterator[int]:
        for number in range(11):
            time.sleep(0.02)
            yield number

    meter = EpochMeter(torch.device("cpu"))
    assert "train/step_ms_p50" not in meter.compute_metrics(1.0, 1.0, 1.0, 0.1)
    for number in meter.time_batches(slow()):
        time.sleep(0.2 if number == 10 else 0.001)
    found = meter.compute_metrics(1.0, 1.0, 1.0, 0.1)
    assert found["train/step_ms_p50"] < 20
    assert found["train/step_ms_p90"] <= found["train/step_ms_p99"]
    assert found["train/step_ms_p99"] > 100
