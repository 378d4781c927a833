"""How soon a run of several processes notices that one of them is gone.

    python benchmarks/dead_host.py [--kills=5] [--processes=2] [--heartbeats=10,20] [--config=tests/tiny_hosts.py]

Each kill starts the run, waits for its second iteration, ends one process (SIGKILL: it is gone; SIGSTOP: its machine
hangs, and its connections stay open), and measures the time until the last of the others has ended. Without the launcher they find
out by themselves, by the heartbeat or by a connection that closes; with it they are ended, but from a hang. Process 0, where the others meet, and the
last one take turns. Prints for each way the median, the worst, how the others ended (-6: aborted by JAX; 76: found a connection closed) or the
launcher (128 + signal), and how often its last line names the right process.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dgpo_jax.launch import free_port

ROOT = Path(__file__).parent.parent
START_S = 300  # for the second iteration to come
END_S = 180  # after which a survivor counts as hanging
WAYS = (("SIGKILL", False), ("SIGSTOP", False), ("SIGKILL", True), ("SIGSTOP", True))  # and whether there is a launcher


def environment(cache: Path, **more: str) -> dict[str, str]:
    """Of CPU processes with two fake devices each, which compile once."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "PYTHONPATH": str(ROOT),
    } | more  # fmt: skip


def start(command: list[str], processes: int, launcher: bool, cache: Path, log) -> tuple[list[subprocess.Popen], list[int]]:
    """The processes that this one has started, and the ids of those that train, by their numbers; launched ones are known later."""
    if launcher:
        arguments = [sys.executable, "-m", "dgpo_jax.launch", f"--processes={processes}", "--", *command]
        return [subprocess.Popen(arguments, cwd=ROOT, env=environment(cache), stdout=log, stderr=log)], []
    address = f"127.0.0.1:{free_port()}"
    started = []
    for index in range(processes):
        more = {"JAX_COORDINATOR_ADDRESS": address, "DGPO_JAX_PROCESSES": str(processes), "DGPO_JAX_PROCESS": str(index)}
        started.append(subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=environment(cache, **more), stdout=log, stderr=log))
    return started, [process.pid for process in started]


def children(pid: int) -> list[int]:
    """Ids of what a process has started, oldest first."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def gone(pid: int) -> bool:
    """Whether the process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition, seconds: float, what: str) -> float:
    """Seconds that it took.

    Raises:
        TimeoutError: longer than that.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"{what} took more than {seconds:g} s")
        time.sleep(0.01)
    return time.monotonic() - began


def one_kill(folder: Path, cache: Path, options, heartbeat: int, number: str, launcher: bool, victim: int) -> tuple[float, list[int], bool]:
    """Seconds from the signal to the end of the last survivor; the survivors' exit codes, or the launcher's; whether it named the victim."""
    folder.mkdir()
    command = [
        "dgpo_jax.train", f"--config={options.config}", f"--workdir={folder}/run", "--config.iterations=1000000",
        f"--config.hosts.heartbeat-s={heartbeat}",
    ]  # fmt: skip
    with open(folder / "log", "w") as log:
        started, pids = start(command, options.processes, launcher, cache, log)
        try:
            wait_until((folder / "run/rollouts/iteration_000002.jsonl").exists, START_S, "the second iteration")
            pids = pids or children(started[0].pid)
            survivors = [pid for pid in pids if pid != pids[victim]]
            os.kill(pids[victim], getattr(signal, number))
            seconds = wait_until(lambda: all(map(gone, survivors)), END_S, "the end of the others")
            codes = [process.wait(END_S) for process in started if launcher or process.pid in survivors]
            verdict = [line for line in (folder / "log").read_text().splitlines() if line.startswith("launch: ")][-1:]
            return seconds, codes, any(f"process {victim} (pid {pids[victim]})" in line for line in verdict)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it said last:\n{(folder / 'log').read_text()[-2000:]}") from None
        finally:
            for process in started:
                process.kill()
                process.wait()


def main() -> None:
    """Measures all ways and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="of each way")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--heartbeats", default="10,20", help="seconds, hosts.heartbeat_s")
    parser.add_argument("--config", default="tests/tiny_hosts.py")
    options = parser.parse_args()
    print("heartbeat  signal   launcher  kills  median s  worst s  named  exit codes", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for heartbeat in map(int, options.heartbeats.split(",")):
            for number, launcher in WAYS:
                kills = [
                    one_kill(
                        Path(scratch, f"{heartbeat}-{number}-{launcher}-{kill}"), Path(scratch, "compiled"), options, heartbeat, number,
                        launcher, victim=0 if kill % 2 else options.processes - 1,
                    )
                    for kill in range(options.kills)
                ]  # fmt: skip
                seconds, codes = [kill[0] for kill in kills], sorted({code for kill in kills for code in kill[1]})
                named = sum(kill[2] for kill in kills) if launcher else "-"
                row = f"{heartbeat:7d} s  {number}  {'yes' if launcher else 'no':8}  {len(kills):5d}"
                print(f"{row}  {statistics.median(seconds):8.2f}  {max(seconds):7.2f}  {named:>5}  {' '.join(map(str, codes))}", flush=True)


if __name__ == "__main__":
    main()
