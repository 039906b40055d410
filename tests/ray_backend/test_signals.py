import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator.ray_backend import signals
from orchestrator.ray_backend.signals import Interruption
from tests.support.launched import ROOT, until


def test_actions_run_once_and_a_failure_stops_none(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []
    interruption = Interruption()
    interruption.add_callback(lambda: done.append("first"))
    interruption.add_callback(lambda: done.append(str(1 / 0)))
    interruption.add_callback(lambda: done.append("last"))
    assert not interruption.event.is_set()
    interruption.request_stop(signal.SIGINT)
    until(lambda: len(done) == 2 and "an action failed" in caplog.text)
    interruption.request_stop(signal.SIGTERM)
    late = threading.Event()
    interruption.add_callback(late.set)
    assert late.wait(5)
    assert sorted(done) == ["first", "last"]
    assert (interruption.signal, interruption.exit_status) == (signal.SIGINT, 130)


def test_a_stop_flag_counts_as_sigterm() -> None:
    interruption = Interruption()
    interruption.request_stop()
    assert interruption.event.is_set()
    assert interruption.exit_status == 143


def test_a_slow_action_does_not_hold_up_who_asks() -> None:
    interruption, free = Interruption(), threading.Event()
    interruption.add_callback(lambda: assert_true(free.wait(10)))
    interruption.request_stop()
    assert interruption.event.is_set()
    free.set()


def assert_true(value: bool) -> None:
    assert value


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with signals.catch_stop_signals() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.event.wait(5)
        assert interruption.exit_status == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_signal_in_the_middle_of_a_wait_for_the_event_does_not_block() -> None:
    with signals.catch_stop_signals() as interruption:
        with vars(interruption.event)["_cond"]:  # a wait holds it for a moment
            os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.event.wait(5)


CODE = """
import time
from orchestrator.ray_backend import signals
with signals.catch_stop_signals() as interruption:
    interruption.add_callback(lambda: print("acted", flush=True))
    print("ready", flush=True)
    while not (interruption.event.is_set() and {ends}):
        time.sleep(0.02)
time.sleep(0.2)
raise SystemExit(interruption.exit_status)
"""


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
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


@pytest.mark.process
def test_repeated_hangups_are_one_and_a_signal_after_them_is_the_first_of_its_kind() -> None:
    with subprocess.Popen([sys.executable, "-c", CODE.format(ends=False)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == b"acted\n"
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143


def test_a_hangup_that_was_ignored_at_the_start_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.catch_stop_signals() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert not interruption.event.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_started_in_the_shield_outlives_a_hangup() -> None:
    code = "print('ready', flush=True); input(); print('alive', flush=True)"
    with signals.shield_children_from_hangup():
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stdout.read() == b"alive\n"
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


CLOSED_TERMINAL = """
import sys
from pathlib import Path
from orchestrator.ray_backend import signals
from orchestrator.cli import exit_status
with exit_status.tolerate_closed_output(), signals.catch_stop_signals() as interruption:
    console = exit_status.make_console()
    console.print("ready")
    interruption.event.wait(20)
    console.print("stopping")
    sys.stderr.write("stopping\\n")
    print("saving", flush=True)
    Path(sys.argv[1]).write_text("saved")
raise SystemExit(interruption.exit_status)
"""


@pytest.mark.process
def test_a_closed_terminal_ends_a_job_in_order_though_it_prints(tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", CLOSED_TERMINAL, str(tmp_path / "state")])
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert (tmp_path / "state").read_text() == "saved"


@pytest.mark.process
def test_a_job_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CLOSED_TERMINAL, str(tmp_path / "state")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdout.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    assert (tmp_path / "state").read_text() == "saved"
