"""Starts the processes of one run on this machine, and says which of them died.

    python -m dgpo_jax.launch --processes=2 -- dgpo_jax.train --config=configs/qwen_7b.py            # GPUs of one machine
    python -m dgpo_jax.launch --machines=2 --machine=0 --coordinator=10.0.0.1:8476 -- dgpo_jax.train --config=...

The second form is given on every machine, with its own number. A TPU pod, Slurm, Kubernetes or Open MPI start and count processes
themselves: there `--config.hosts.cluster=auto` is enough, and this command not needed.

When a process dies the others cannot go on: JAX ends them once the dead one's heartbeat is missed (hosts.heartbeat_s). Here
it is known at once: a line says which process died and of what, and the others on this machine are ended. With
--restarts all of them are started again, and go on from the last checkpoint.

SIGTERM and Ctrl-C are passed on: the run saves and stops, and this ends with exit code 75; a second Ctrl-C ends it at once.
Killed, it takes its processes along.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

from dgpo_jax.processes import ADDRESS, COUNT, INDEX, NOTHING_MOVED, STOPPED_EARLY, describe_code, tied

POLL_S = 0.05
READ_S = 5.0  # for what an ended process said last; a process that it left behind may hold the pipe open for ever
FOLLOW_S = 10.0  # that the others have to end by themselves when one has ended with an error of its own


@dataclass(frozen=True)
class Options:
    """How many processes, and where."""

    processes: int = 1  # on this machine
    machines: int = 1  # each of which gives this command with its own number
    machine: int = 0  # the number of this one
    coordinator: str = ""  # HOST:PORT of machine 0, a free port; '' = this machine, any port
    gpus: int = 0  # of this machine, shared evenly among its processes; 0 = every process sees all of them
    restarts: int = 0  # starts after the first, for when a process was killed or aborted; not for bad input
    grace_seconds: float = 90.0  # from SIGTERM to SIGKILL; more than the run's own grace_seconds

    def __post_init__(self):
        if self.processes < 1 or self.machines < 1:
            raise ValueError(f"--processes={self.processes} --machines={self.machines}: both count something; give at least 1.")
        if not 0 <= self.machine < self.machines:
            raise ValueError(f"--machine={self.machine}: there are {self.machines}; give 0 to {self.machines - 1}.")
        if self.machines > 1 and ":" not in self.coordinator:
            raise ValueError(f"--coordinator={self.coordinator!r}: the machines need a place to meet; give HOST:PORT of machine 0.")
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
        The exit code: 0, or that of the first process that failed (128 + N for signal N).
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
        environment = {**os.environ, ADDRESS: address, COUNT: str(options.machines * options.processes), INDEX: str(index)}
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
    running, codes, deadline = list(children), [], float("inf")
    while running:
        time.sleep(POLL_S)
        if told and deadline == float("inf"):
            deadline = time.monotonic() + options.grace_seconds
        if told.count(signal.SIGINT) > 1:
            deadline = 0.0
        for child in take_ended(running):
            code = child.process.returncode
            codes.append(code)
            if code not in (0, STOPPED_EARLY) and all(earlier in (0, STOPPED_EARLY) for earlier in codes[:-1]):
                what = f"process {child.index} (pid {child.process.pid}) on {socket.gethostname()}: {describe_code(code)}"
                note(f"{what}; ending the other {len(children) - len(codes)}" if len(codes) < len(children) else what)
                deadline = min(deadline, time.monotonic() + (0.0 if code < 0 else FOLLOW_S))
        if time.monotonic() > deadline:
            for child in running:
                child.process.kill()
    return codes


def take_ended(running: list[Child]) -> list[Child]:
    """Takes those that have ended out of `running`: killed ones first, since others may have ended because of them."""
    if all(child.process.poll() is None for child in running):
        return []
    # Once more: one that was asked before it ended must not be found later than one that ended because of it.
    ended = [child for child in running if child.process.poll() is not None]
    running[:] = [child for child in running if child not in ended]
    return sorted(ended, key=lambda child: child.process.returncode >= 0)


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
