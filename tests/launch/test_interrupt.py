import os
import signal
import subprocess
import sys
import threading

import pytest

from orchestrator.launch import interrupt
from orchestrator.launch.interrupt import Interruption
from tests.support.launched import ROOT, until


def test_actions_run_once_in_order_and_a_failure_stops_none(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []
    interruption = Interruption()
    interruption.on_set(lambda: done.append("first"))
    interruption.on_set(lambda: done.append(str(1 / 0)))
    interruption.on_set(lambda: done.append("last"))
    assert not interruption.event.is_set()
    interruption.request(signal.SIGINT)
    until(lambda: "last" in done)
    interruption.request(signal.SIGTERM)
    late = threading.Event()
    interruption.on_set(late.set)
    assert late.wait(5)
    assert done == ["first", "last"]
    assert "an action failed" in caplog.text
    assert (interruption.signal, interruption.exit_status) == (signal.SIGINT, 130)


def test_a_stop_flag_counts_as_sigterm() -> None:
    interruption = Interruption()
    interruption.request()
    assert interruption.event.is_set()
    assert interruption.exit_status == 143


def test_a_slow_action_does_not_hold_up_who_asks() -> None:
    interruption, free = Interruption(), threading.Event()
    interruption.on_set(lambda: assert_true(free.wait(10)))
    interruption.request()
    assert interruption.event.is_set()
    free.set()


def assert_true(value: bool) -> None:
    assert value


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with interrupt.handled() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.event.wait(5)
        assert interruption.exit_status == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


CODE = """
import time
from orchestrator.launch import interrupt
with interrupt.handled() as interruption:
    interruption.on_set(lambda: print("acted", flush=True))
    print("ready", flush=True)
    while not (interruption.event.is_set() and {ends}):
        time.sleep(0.02)
time.sleep(0.2)
raise SystemExit(interruption.exit_status)
"""


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_event_and_gives_the_exit_status(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", CODE.format(ends=True)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.stdout.read() == b"acted\n"
    assert process.returncode == 128 + number


@pytest.mark.process
def test_a_second_signal_ends_a_process_that_is_stuck() -> None:
    with subprocess.Popen([sys.executable, "-c", CODE.format(ends=False)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"acted\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
