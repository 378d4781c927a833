"""Silence is noticed, explained, and ended if so set."""

import os
import subprocess
import sys
import threading
import time

import pytest

from dgpo_jax import activity
from dgpo_jax.processes import NOTHING_MOVED
from dgpo_jax.watchdog import Watchdog


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_what_is_under_way_is_named_from_the_outside_in():
    with activity.doing("iteration 3"), activity.doing("verify", lambda: "2 of 8 outstanding"):
        assert activity.describe() == "iteration 3, verify (2 of 8 outstanding)"
    assert activity.describe() == "nothing that has a name"


def test_other_threads_are_named_behind_the_main_one():
    there, leave = threading.Event(), threading.Event()

    def work():
        with activity.doing("compiling 'apply'"):
            there.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    there.wait()
    with activity.doing("start"):
        description = activity.describe()
    leave.set()
    thread.join()
    assert description == "start; compiling 'apply'"


def test_silence_is_reported_once_with_what_is_waited_for_and_the_stacks_of_all_threads(tmp_path, capfd):
    with (
        Watchdog(0.2, tmp_path / "stacks", who="process 1 of 4 on host"),
        activity.doing("iteration 7"), activity.doing("verify", lambda: "3 answers outstanding"),
    ):  # fmt: skip
        wait_for(lambda: list(tmp_path.glob("stacks/*")))
        time.sleep(0.4)
    said = capfd.readouterr().err
    assert said.count("nothing has moved") == 1
    assert "process 1 of 4 on host: iteration 7, verify (3 answers outstanding)" in said
    (stacks,) = tmp_path.glob("stacks/*")
    assert str(stacks) in said
    text = stacks.read_text()
    assert "iteration 7, verify" in text and "test_silence_is_reported_once" in text and "watchdog.py" in text


def test_whoever_moves_is_left_alone(tmp_path, capfd):
    with Watchdog(0.4, tmp_path / "stacks"):
        for _ in range(16):
            time.sleep(0.05)
            activity.beat()
    assert "nothing" not in capfd.readouterr().err and not (tmp_path / "stacks").exists()


def test_a_second_silence_is_reported_again(tmp_path, capfd):
    with Watchdog(0.15, tmp_path / "stacks"):
        for _ in range(2):
            time.sleep(0.5)
            activity.beat()
            time.sleep(0.05)
    assert capfd.readouterr().err.count("nothing has moved") == 2


def test_the_run_is_asked_to_stop_and_told_why(tmp_path, monkeypatch):
    monkeypatch.setattr(activity, "silence", lambda: 0.3)  # else a pause of this test could reach 0.4, which would end pytest
    asked = []
    with Watchdog(0.2, tmp_path / "stacks", stop=asked.append):
        wait_for(lambda: asked)
    assert asked == ["nothing has moved for 0 s"]


def test_processes_with_the_same_pid_in_a_shared_folder_write_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in every pod
    monkeypatch.setattr(time, "strftime", lambda _: "20261130-120000")  # as when all wait for one
    for number in range(2):
        Watchdog(1, tmp_path, who=f"process {number} of 2 on dgpo-{number}").report(60.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "20261130-120000-process-0-of-2-on-dgpo-0-1.txt", "20261130-120000-process-1-of-2-on-dgpo-1-1.txt",
    ]  # fmt: skip


def test_what_a_gauge_shows_is_a_beat_when_it_changes(tmp_path, capfd):
    shown = [0]
    with Watchdog(0.4, tmp_path / "stacks"), activity.doing("writing a checkpoint", gauge=lambda: shown[0]):
        for shown[0] in range(16):  # such as the bytes that a library writes
            time.sleep(0.05)
        assert "nothing" not in capfd.readouterr().err
        wait_for(lambda: list(tmp_path.glob("stacks/*")))
    assert "writing a checkpoint" in capfd.readouterr().err


def test_the_traffic_of_this_process_counts_what_it_reads_and_writes(tmp_path):
    path, before = tmp_path / "file", activity.traffic()
    if before is None:
        pytest.skip("only Linux tells")
    path.write_bytes(bytes(3 << 20))
    assert 3 <= activity.traffic() - before <= 4
    path.read_bytes()
    assert 6 <= activity.traffic() - before <= 7


def test_who_waits_for_another_process_is_silent_only_when_that_one_is(tmp_path, capfd):
    board, moving = {}, threading.Event()
    moving.set()

    def exchange(text):
        board[0] = text
        if moving.is_set():
            board[2] = f"{int(board.get(2, '0').split()[0]) + 1} iteration 3, rollout"
        return {1: "5 iteration 3, waiting for the other processes", 2: board[2]}

    with Watchdog(0.5, tmp_path / "stacks", who="process 0 of 3 on host", exchange=exchange), activity.doing("iteration 3, waiting"):
        time.sleep(1.5)
        assert "nothing" not in capfd.readouterr().err
        moving.clear()
        wait_for(lambda: list(tmp_path.glob("stacks/*")))
    said = capfd.readouterr().err
    assert "process 0 of 3 on host: iteration 3, waiting; the last of the others that moved is process 2: iteration 3, rollout;" in said
    assert board[0].split(" ", 1)[1] == "iteration 3, waiting" and int(board[0].split()[0]) > 0


def test_zero_seconds_watch_nothing(tmp_path):
    with Watchdog(0, tmp_path / "stacks") as dog:
        assert not dog.is_alive()


@pytest.mark.parametrize("stop, code", [(True, NOTHING_MOVED), (False, 0)])
def test_a_process_that_cannot_be_called_back_is_ended_if_so_set(stop, code, tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom dgpo_jax.watchdog import Watchdog\n"
        f"with Watchdog(0.3, Path({str(tmp_path)!r}), stop={'(lambda why: None)' if stop else None}):\n    time.sleep(2)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == code
    assert ("the last checkpoint is intact" in result.stderr) == stop


def test_stacks_that_cannot_be_written_do_not_silence_the_line(tmp_path, capfd):
    (tmp_path / "stacks").write_text("a file where the folder should be")
    Watchdog(1, tmp_path / "stacks").report(60.0)
    said = capfd.readouterr().err
    assert "nothing has moved for 60 s" in said and "could not be written" in said
