"""Child processes of a story: so many at a time, each with its share of the cores, none left behind.

    python -m dgpo_jax.processes PARENT CORES COMMAND...

is what is started for each: it ties itself to the parent's life, keeps to its cores, and becomes COMMAND by exec, so
that `ps` shows the command itself. Doing this between fork and exec would be unsafe in a parent with threads.
"""

import collections
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

# What `launch` tells the processes of one run: where they meet, how many there are, which one this is, and which of its machine's.
ADDRESS = "JAX_COORDINATOR_ADDRESS"  # JAX's own name
COUNT, INDEX, LOCAL_INDEX = "DGPO_JAX_PROCESSES", "DGPO_JAX_PROCESS", "DGPO_JAX_LOCAL_PROCESS"
STOPPED_EARLY = 75  # exit code of a run that saved and stopped; EX_TEMPFAIL of sysexits.h: try again later
NOTHING_MOVED = 76  # of one that the watchdog ended, or that lost another process
POLL_S = 0.1
GRACE_S = 20.0  # from SIGTERM to SIGKILL
_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 16_384  # of a log, where the reason of a failure is looked for


class Job(NamedTuple):
    """A command to be run."""

    command: Sequence[str]
    log: Path  # its output is appended there, behind a line with the command
    about: object = None  # whatever the caller wants to know it by


def run_all(
    jobs: Sequence[Job],
    at_once: int,
    ended: Callable[[Job, int, float], None],
    starting: Callable[[Job], None] = lambda job: None,
) -> None:
    """Runs the jobs in their order, `at_once` at a time. Call it from the main thread.

    However this is left, no child stays: an exception (Ctrl-C is one) stops them, and a parent that dies without a
    word takes them along (Linux).

    Args:
        ended: told of each job its exit code, -N for death by signal N, and its seconds.
        starting: called right before a job starts.
    """
    waiting, running = collections.deque(jobs), {}  # running: slot -> (job, process, when it began)
    shares = core_shares(at_once)
    try:
        while waiting or running:
            for slot in range(at_once):
                if waiting and slot not in running:
                    job = waiting.popleft()
                    starting(job)
                    running[slot] = job, start(job, shares[slot]), time.monotonic()
            time.sleep(POLL_S)
            for slot, (job, process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    ended(job, process.returncode, time.monotonic() - began)
    finally:
        stop([process for _, process, _ in running.values()])


def core_shares(at_once: int) -> list[list[int]]:
    """For each of `at_once` jobs the cores it may use; [] = as the parent.

    All get the same number, even if that leaves a core idle: how many threads there are decides how sums are rounded.
    """
    if at_once == 1 or not hasattr(os, "sched_getaffinity"):
        return [[]] * at_once
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // at_once)
    return [[cores[(slot * each + i) % len(cores)] for i in range(each)] for slot in range(at_once)]


def start(job: Job, cores: Sequence[int]) -> subprocess.Popen:
    """The running job. Its session is its own: Ctrl-C in the terminal reaches the parent alone, which then stops it."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a") as log:
        log.write(f"$ {shlex.join(job.command)}\n")
        log.flush()
        return subprocess.Popen(
            tied(job.command, cores), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def tied(command: Sequence[str], cores: Sequence[int] = ()) -> list[str]:
    """The command that becomes `command`, tied to the life of this process and kept to these cores; [] = all of them."""
    return [sys.executable, "-m", "dgpo_jax.processes", str(os.getpid()), ",".join(map(str, cores)), *command]


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """SIGTERM for all, SIGKILL for those that are still there after GRACE_S; returns when all are gone."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def describe_code(code: int) -> str:
    """An exit code as subprocess gives it, in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def why_failed(job: Job, code: int) -> str:
    """One line: the signal, or the last error in the log, or else the last line there."""
    if code < 0:
        return describe_code(code)
    with open(job.log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    lines = lines[starts[-1] + 1 :] if starts else lines  # what an earlier attempt said is not the reason
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {code}, no output"])[-1]


def die_with(parent: int) -> None:
    """Has the kernel kill this process when `parent`, which started it, ends (Linux; elsewhere nothing). Outlives an exec."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)


def main(parent: int, cores: list[int], command: list[str]) -> None:
    """In the child: becomes `command`."""
    die_with(parent)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # XLA starts as many threads as it finds cores
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(core) for core in sys.argv[2].split(",") if core], sys.argv[3:])
