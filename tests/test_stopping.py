"""Ending a run early: what is finished, what is dropped, and when. Several processes: tests/test_hosts.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dgpo_jax import stopping
from dgpo_jax.processes import STOPPED_EARLY
from dgpo_jax.stopping import Stop, Stopping

ROOT = Path(__file__).parent.parent


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: self.now))

    def goes(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def an_iteration(stops, clock, seconds):
    """Asks as an iteration does that takes so long."""
    stops.boundary()
    for ask in (stops.chunk, stops.drawn, stops.update):
        clock.goes(seconds / 3)
        ask()


def test_nobody_is_stopped_without_a_reason(clock):
    with Stopping(grace_seconds=30) as stops:
        for _ in range(3):
            an_iteration(stops, clock, 60)
        stops.boundary()
        assert stops.reason == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_iterations_ends_the_run_there(number, clock, capsys):
    with Stopping(grace_seconds=30) as stops:
        an_iteration(stops, clock, 60)
        os.kill(os.getpid(), number)
        with pytest.raises(Stop):
            stops.boundary()
        assert stops.reason == signal.Signals(number).name
    assert "saves and stops" in capsys.readouterr().err


@pytest.mark.parametrize(
    "seconds, passed, finished",
    [
        (20, 10, True),  # 10 s are left of it, and half of 30 s may be spent
        (20, 4, False),  # 16 s are left
        (60, 50, True),
        (60, 0, False),
        (20, 25, False),  # it takes longer than the one before, nobody knows how much
    ],
)
def test_an_iteration_is_finished_if_the_rest_fits_into_half_of_the_grace_period(seconds, passed, finished, clock):
    with Stopping(grace_seconds=30) as stops:
        an_iteration(stops, clock, seconds)
        stops.boundary()
        clock.goes(passed)
        os.kill(os.getpid(), signal.SIGTERM)
        if not finished:
            with pytest.raises(Stop):
                stops.chunk()
            return
        for ask in (stops.chunk, stops.drawn, stops.update):
            ask()
        with pytest.raises(Stop):
            stops.boundary()


def test_the_first_iteration_is_dropped_since_nobody_knows_how_long_it_takes(clock):
    with Stopping(grace_seconds=3600) as stops:
        stops.boundary()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stop):
            stops.update()


def test_an_iteration_begun_before_a_restart_says_nothing_about_how_long_the_next_one_takes(clock):
    with Stopping(grace_seconds=30) as stops:
        stops.boundary(whole=False)
        clock.goes(5)  # that were left of it
        stops.boundary()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stop):
            stops.chunk()


@pytest.mark.parametrize(
    "limit, begun",
    [
        (181, 3),  # iterations of 60 s: the fourth would end at 240
        (179, 2),  # the third would end at 180
        (10, 1),  # how long the first takes is not known before
    ],
)
def test_no_iteration_begins_that_would_go_beyond_the_time_limit(limit, begun, clock):
    count = 0
    with Stopping(limit_seconds=limit) as stops, pytest.raises(Stop):
        while True:
            an_iteration(stops, clock, 60)
            count += 1
    assert count == begun
    assert "stop_after_minutes" in stops.reason


def test_a_second_interrupt_leaves_at_once(clock):
    with Stopping(grace_seconds=30) as stops:
        stops.boundary()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_before_are_there_again_afterwards():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stopping():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_watchdog_may_ask_from_another_thread(clock):
    with Stopping() as stops:
        stops.boundary()
        stops.request("nothing has moved for 900 s")
        with pytest.raises(Stop):
            stops.chunk()
        assert stops.reason == "nothing has moved for 900 s"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_anything_has_begun_a_signal_stops_at_once_whatever_is_done(number, capsys):
    with Stopping(grace_seconds=30), pytest.raises(Stop):
        os.kill(os.getpid(), number)
        time.sleep(10)  # as long as a compilation
    assert "before anything had begun" in capsys.readouterr().err


def test_a_command_that_is_stopped_amid_a_compilation_does_not_wait_for_it():
    program = """
import os, signal, sys, threading, time
from dgpo_jax import session
from dgpo_jax.ahead import Program, compile_ahead
from dgpo_jax.stopping import Stopping

class Slow:
    def lower(self):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(60)

def story(config, workdir):
    with Stopping(grace_seconds=30):
        compile_ahead([Program("slow", "update", Slow(), ())])

sys.argv = ["story", "--config=configs/smoke.py"]
session.run_command("story", "", story)
"""
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == STOPPED_EARLY, result.stderr
    assert time.monotonic() - began < 50
