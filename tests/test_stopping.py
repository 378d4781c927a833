"""Ending a run early: what is finished, what is dropped, and when. Several processes: tests/test_hosts.py."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dgpo_jax import stopping
from dgpo_jax.processes import NOTHING_MOVED, STOPPED_EARLY
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


def test_what_was_to_fit_and_takes_longer_is_dropped_when_its_time_is_over(clock):
    with Stopping(grace_seconds=30) as stops:
        an_iteration(stops, clock, 10)
        stops.boundary()
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(3):  # 10 s are known to fit into 15; a draw more than the last time makes it 20
            clock.goes(5)
            stops.chunk()
        clock.goes(5)
        with pytest.raises(Stop):
            stops.chunk()


@pytest.mark.parametrize("before, finished", [(4.0, True), (40.0, False), (None, False)])
def test_an_evaluation_is_finished_if_it_fits_by_itself(before, finished, clock):
    # The iteration before it fits in any case, and is finished: what it learned is kept even if the evaluation is not.
    with Stopping(grace_seconds=30) as stops:
        if before is not None:
            stops.evaluation()
            clock.goes(before)
        an_iteration(stops, clock, 6)
        stops.boundary(evaluates=True)
        os.kill(os.getpid(), signal.SIGTERM)
        clock.goes(5)
        stops.update()
        stops.evaluation()
        if not finished:
            with pytest.raises(Stop):
                stops.chunk()
            return
        stops.chunk()
        clock.goes(11)  # longer than the one before
        with pytest.raises(Stop):
            stops.chunk()


def test_the_time_of_an_evaluation_is_none_of_the_next_iteration(clock):
    with Stopping(grace_seconds=30) as stops:
        an_iteration(stops, clock, 6)
        stops.evaluation()
        clock.goes(100)
        stops.boundary()
        os.kill(os.getpid(), signal.SIGTERM)
        stops.chunk()  # 6 s, and not 106


def test_a_stop_is_heard_while_answers_are_checked(clock):
    with Stopping(grace_seconds=30) as stops:
        stops.boundary()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stop):
            stops.checking()


def test_a_rollout_of_however_many_chunks_hears_a_signal(clock):
    with Stopping(grace_seconds=30) as stops:
        stops.boundary()
        for _ in range(stopping.CHUNKS + 1):
            stops.chunk()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stop):
            stops.chunk()


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


@pytest.mark.parametrize(
    "limit, begun",
    [
        (169, 1),  # the second iteration would end with an evaluation at 170
        (171, 2),
    ],
)
def test_an_evaluation_counts_towards_the_time_limit_where_one_is_due(limit, begun, clock):
    count = 0
    with Stopping(limit_seconds=limit) as stops, pytest.raises(Stop):
        stops.evaluation()
        clock.goes(50)
        while True:
            stops.boundary(evaluates=count % 2 == 1)
            clock.goes(35)
            stops.update()
            if count % 2 == 1:
                stops.evaluation()
                clock.goes(50)
            count += 1
    assert count == begun


def test_a_time_limit_that_leaves_no_room_for_one_iteration_says_so(clock):
    with Stopping(limit_seconds=60) as stops:
        clock.goes(61)  # of compilation
        with pytest.raises(Stop):
            stops.boundary()
        assert "stop_after_minutes is 1, which leaves no room for an iteration: raise it" in stops.reason


def test_the_updates_of_a_warm_start_count_towards_the_time_limit_and_those_amid_an_iteration_do_not(clock):
    with Stopping(limit_seconds=60) as stops:
        stops.update(limited=True)
        clock.goes(61)
        stops.update()
        with pytest.raises(Stop):
            stops.update(limited=True)
        assert stops.reason == "stop_after_minutes is 1"


def test_the_first_interrupt_after_another_signal_does_not_leave_at_once(clock, capsys):
    with Stopping(grace_seconds=30) as stops:
        stops.boundary()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert "once more leaves at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


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
        stops.request("nothing has moved for 900 s", NOTHING_MOVED)
        with pytest.raises(Stop) as stop:
            stops.chunk()
        assert stops.reason == "nothing has moved for 900 s"
        assert stop.value.code == NOTHING_MOVED  # so that the launcher starts it again


class Peers:
    """Stands for other processes, and for what JAX has them agree on: all stop at question `agreed`."""

    def __init__(self, monkeypatch, count=2):
        self.board, self.agreed, self.asked = {}, None, []
        monkeypatch.setattr(stopping.hosts, "count", lambda: count)
        monkeypatch.setattr(stopping.hosts, "from_first", lambda function: function())
        monkeypatch.setattr(stopping.hosts, "tell", lambda topic, text: self.board.setdefault(topic, {}).update({0: text}))
        monkeypatch.setattr(stopping.hosts, "told", lambda topic: self.board.get(topic, {}))
        monkeypatch.setattr(stopping.multihost_utils, "reached_preemption_sync_point", self.ask)
        monkeypatch.setattr(stopping, "_rollouts", itertools.count(1))

    def ask(self, question):
        self.asked.append(question)
        return question == self.agreed


def test_of_several_processes_who_has_drawn_asks_the_rest_only_when_all_have(monkeypatch):
    peers = Peers(monkeypatch)
    stops = Stopping()
    stops.chunk()
    waiting = threading.Thread(target=stops.drawn)
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive() and peers.asked == [0] and peers.board[stopping.DRAWN] == {0: "1"}
    peers.board[stopping.DRAWN][1] = "1"
    waiting.join(10)
    assert peers.asked == list(range(stopping.CHUNKS))
    stops.chunk()  # the next rollout's first question has the same number on all
    assert peers.asked[-1] == stopping.CHUNKS


def test_who_has_drawn_comes_to_the_question_at_which_another_process_stops(monkeypatch, capsys):
    peers = Peers(monkeypatch)
    peers.agreed = 50
    peers.board |= {stopping.DRAWN: {}, stopping.STOPPING: {1: "50"}, stopping.WHY: {1: "76 nothing has moved for 900 s"}}
    stops = Stopping()
    with pytest.raises(Stop) as stop:
        stops.drawn()
    assert peers.asked == list(range(51))
    assert stops.reason == "nothing has moved for 900 s" and stop.value.code == NOTHING_MOVED
    assert peers.board[stopping.STOPPING][0] == "50"


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
