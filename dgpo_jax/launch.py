"""Starts the processes of one run on this machine, and says which of them died.

    python -m dgpo_jax.launch --processes=2 -- dgpo_jax.train --config=configs/qwen_7b.py            # GPUs of one machine
    python -m dgpo_jax.launch --machines=2 --machine=0 --coordinator=10.0.0.1:8476 -- dgpo_jax.train --config=...

The second form is given on every machine, with its own number. A TPU pod, Slurm, Kubernetes or Open MPI start and count processes
themselves: there `--config.hosts.cluster=auto` is enough, and this command not needed.

When a process dies the others cannot go on: JAX ends them once the dead one's heartbeat is missed (hosts.heartbeat_s). Here
it is known at once: a line says which process died and of what, and the others on this machine are ended. One that hangs is
known by its heartbeat only: then the line names those that JAX did not end. With --restarts all of them are started again
after a kill, an abort or exit code 76 (a loss, or the watchdog's end, saved or not), and go on from the last checkpoint.

SIGTERM and Ctrl-C are passed on: the run saves and stops, and this ends with exit code 75, after which nothing is started
again; a second Ctrl-C ends it at once. While several processes still compile they do not hear them: the run stops when that
is done, or is killed after --grace-seconds. Killed, this takes its processes along.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

from dgpo_jax.processes import ADDRESS, COUNT, INDEX, LOCAL_INDEX, NOTHING_MOVED, STOPPED_EARLY, describe_code, tied

POLL_S = 0.05
READ_S = 5.0  # for what an ended process said last; a process that it left behind may hold the pipe open for ever
FOLLOW_S = 10.0  # that the others have to end by themselves when one has ended with an error of its own
ABORT_S = 3.0  # that they have when JAX has aborted one for a loss, of which all others are told at about the same time
FINE = (0, STOPPED_EARLY)  # exit codes that need no explanation


@dataclass(frozen=True)
class Options:
    """How many processes, and where."""

    processes: int = 1  # on this machine
    machines: int = 1  # each of which gives this command with its own number
    machine: int = 0  # the number of this one
    coordinator: str = ""  # HOST:PORT of machine 0, a free port, or [IPv6]:PORT; '' = this machine, any port
    gpus: int = 0  # of this machine, shared evenly among its processes; 0 = every process sees all of them
    restarts: int = 0  # starts after the first, for when a process was killed, aborted, or ended with exit code 76; not for bad input
    grace_seconds: float = 90.0  # from SIGTERM to SIGKILL; more than the run's own grace_seconds

    def __post_init__(self):
        if self.processes < 1 or self.machines < 1:
            raise ValueError(f"--processes={self.processes} --machines={self.machines}: both count something; give at least 1.")
        if not 0 <= self.machine < self.machines:
            raise ValueError(f"--machine={self.machine}: there are {self.machines}; give 0 to {self.machines - 1}.")
        if self.machines > 1 and ":" not in self.coordinator:
            raise ValueError(f"--coordinator={self.coordinator!r}: the machines need a place to meet; give HOST:PORT of machine 0.")
        if self.gpus < 0 or self.restarts < 0:
            raise ValueError(f"--gpus={self.gpus} --restarts={self.restarts}: both count something; give 0 for none.")
        if not 0 <= self.grace_seconds < math.inf:
            raise ValueError(f"--grace-seconds={self.grace_seconds}: it is a time; give 0 to kill at once.")
        if self.gpus % self.processes:
            raise ValueError(f"--gpus={self.gpus}: {self.processes} processes cannot share them evenly; change one of the two.")


class Child(NamedTuple):
    """A process that runs."""

    index: int  # among all machines' processes
    process: subprocess.Popen
    reader: threading.Thread | None  # passes on what it says; None = it has the terminal


def launch(options: Options, command: list[str]) -> int:
    """Runs the processes to their end.

    Args:
        command: a module and its arguments.
    Returns:
        The exit code: 0, or that of the first process that failed (128 + N for signal N); NOTHING_MOVED before STOPPED_EARLY.
    """
    for attempt in range(options.restarts + 1):
        code, may_help = run_once(options, command)
        if not may_help or attempt == options.restarts:
            break
        note(f"starting all again ({options.restarts - attempt - 1} restarts left)")
    return code


def run_once(options: Options, command: list[str]) -> tuple[int, bool]:
    """Starts all processes and waits for them.

    Returns:
        (exit code, whether starting them again may help).
    """
    children = start_all(options, command)
    told = []  # signals to us

    def pass_on(number, _):
        told.append(number)
        for child in children:
            child.process.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        codes = wait(children, options, told)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
        for child in children:
            if child.reader is not None:
                child.reader.join(READ_S)  # its last words
        for number, handler in before.items():
            signal.signal(number, handler)
    failed = next((code for code in codes if code), 0)
    if failed == STOPPED_EARLY and NOTHING_MOVED in codes:  # the watchdog's stop: who was told of it by another may not know
        failed = NOTHING_MOVED
    if told and failed == -signal.SIGTERM:  # it had not come as far as to have something to save
        failed = STOPPED_EARLY
    killed = failed < 0 or failed in (128 + signal.SIGABRT, NOTHING_MOVED)
    return (128 - failed if failed < 0 else failed), killed and not told


def start_all(options: Options, command: list[str]) -> list[Child]:
    """The running processes of this machine."""
    gpus, each = visible_gpus(options), options.gpus // options.processes
    address = options.coordinator or f"127.0.0.1:{free_port()}"
    children = []
    for local in range(options.processes):
        index = options.machine * options.processes + local
        count = options.machines * options.processes
        environment = {**os.environ, ADDRESS: address, COUNT: str(count), INDEX: str(index), LOCAL_INDEX: str(local)}
        if options.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[local * each :][:each])
        first = index == 0  # has the terminal; what others say gets their number in front
        process = subprocess.Popen(
            tied([sys.executable, "-m", *command]), env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=None if first else subprocess.PIPE, stderr=None if first else subprocess.STDOUT,
        )  # fmt: skip
        reader = None if first else threading.Thread(target=number_lines, args=(index, process), daemon=True)
        if reader is not None:
            reader.start()
        children.append(Child(index, process, reader))
    return children


def visible_gpus(options: Options) -> list[str]:
    """Names of the GPUs to share: the first of those in CUDA_VISIBLE_DEVICES, if that is set.

    Raises:
        ValueError: these are too few.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed is not None else [str(number) for number in range(options.gpus)]
    if len(names) < options.gpus:
        raise ValueError(f"--gpus={options.gpus}: CUDA_VISIBLE_DEVICES={listed} has {len(names)}; change one of the two.")
    return names


def number_lines(index: int, process: subprocess.Popen) -> None:
    """Passes on what a process says."""
    for line in process.stdout:
        sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")
        sys.stderr.flush()


def wait(children: list[Child], options: Options, told: list[int]) -> list[int]:
    """Exit codes, in the order in which the processes ended; says which one ended the run."""
    running, codes, cause, deadline = list(children), [], 0, float("inf")
    while running:
        time.sleep(POLL_S)
        if told and deadline == float("inf"):
            deadline = time.monotonic() + options.grace_seconds
        if told.count(signal.SIGINT) > 1:
            deadline = 0.0
        for child in take_ended(running):
            codes.append(child.process.returncode)
            if cause in FINE and codes[-1] not in FINE:
                cause = codes[-1]
                note(describe_end(child, others=len(children) - len(codes)))
                deadline = min(deadline, time.monotonic() + follow_s(cause))
        if time.monotonic() > deadline:
            end(running, aborted=cause == -signal.SIGABRT)
    return codes


def describe_end(child: Child, others: int) -> str:
    """About the first process that failed.

    Args:
        others: processes of this machine that run on.
    """
    code = child.process.returncode
    words = f"process {child.index} (pid {child.process.pid}) on {socket.gethostname()}: {describe_code(code)}"
    if code == -signal.SIGABRT:
        words += ", as JAX does to those that lost another one"
    return f"{words}; ending the other {others}" if others else words


def follow_s(code: int) -> float:
    """Seconds that the others have to end by themselves, once one has ended so."""
    if code == -signal.SIGABRT:
        return ABORT_S
    return 0.0 if code < 0 else FOLLOW_S


def end(running: list[Child], aborted: bool) -> None:
    """Kills them.

    Args:
        aborted: JAX has ended another one for a loss, and not these: the lost one may be among them, hung.
    """
    if aborted and running:
        names = ", ".join(f"process {child.index} (pid {child.process.pid})" for child in running)
        note(f"still there {ABORT_S:g} s later, and so likely what was lost (unless the aborted one names a fault of its own above): {names}")
    for child in running:
        child.process.kill()
        child.process.wait()  # so that this is done once


def take_ended(running: list[Child]) -> list[Child]:
    """Takes those that have ended out of `running`: first those that others may have ended because of.

    These are killed ones; but SIGABRT is how JAX ends a process when another one has left with an error of its own.
    """
    if all(child.process.poll() is None for child in running):
        return []
    # Once more: one that was asked before it ended must not be found later than one that ended because of it.
    ended = [child for child in running if child.process.poll() is not None]
    running[:] = [child for child in running if child not in ended]
    return sorted(ended, key=lambda child: (child.process.returncode == -signal.SIGABRT, child.process.returncode >= 0))


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def note(text: str) -> None:
    """A line of ours among those of the run."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Reads the command line: options, then -- and the command."""
    import tyro

    arguments = sys.argv[1:]
    border = arguments.index("--") if "--" in arguments else len(arguments)
    command = arguments[border + 1 :]
    if not command and not {"-h", "--help"} & set(arguments):
        note("no command given; try: python -m dgpo_jax.launch --processes=2 -- dgpo_jax.train --config=configs/smoke.py")
        raise SystemExit(2)
    try:
        options = tyro.cli(Options, args=arguments[:border], prog="python -m dgpo_jax.launch", description=__doc__)
        visible_gpus(options)
    except ValueError as error:
        note(f"error: {error}")
        raise SystemExit(2) from None
    raise SystemExit(launch(options, command))


if __name__ == "__main__":
    main()
