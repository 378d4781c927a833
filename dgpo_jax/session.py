"""What every command does around its story: read the command line, join the other processes, say what is going on."""

import contextlib
import errno
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from dgpo_jax import activity, hosts
from dgpo_jax.config import Config, NoOptions, default_workdir, parse_command
from dgpo_jax.data.prompts import Template
from dgpo_jax.data.tokenizers import Tokenizer
from dgpo_jax.flags import set_flags
from dgpo_jax.metrics import MetricsWriter, NoMetrics
from dgpo_jax.processes import NOTHING_MOVED
from dgpo_jax.stopping import Stop, Stopping
from dgpo_jax.types import Problem
from dgpo_jax.watchdog import Watchdog

SMALLER = "rollout.slots, eval.responses, rollout.max_response, eval.max_response, eval.samples or update.tokens_per_device"  # what takes a host's memory
REMEDIES = {
    errno.ENOENT: "put it there",
    errno.EACCES: "make it accessible",
    errno.EPERM: "make it accessible",
    errno.EROFS: "make it writable",
    errno.ENOSPC: "free some",
    errno.EDQUOT: "free some",
    errno.ENAMETOOLONG: "give a shorter name",
}  # of errors of the file system, by number; of any other: move it away
CACHE = Path.home() / ".cache" / "dgpo_jax" / "xla"


def run_command(
    program: str, description: str, story: Callable[..., object], options: type = NoOptions, several: bool = False
) -> None:
    """Runs a story as a command: bad input is one line and exit code 1, never a traceback. That is for faults of the program.

    DGPO_JAX_TRACEBACK=1 shows the traceback all the same. Other exit codes: 2 for a bad command line, STOPPED_EARLY,
    NOTHING_MOVED where another process was lost or the watchdog stopped or ended it, 130 for a second Ctrl-C.

    Args:
        story: called as story(config, workdir), the workdir found by the settings if none was given; with `options`
            as story(config, workdir or None, options).
        options: see `config.parse_command`.
        several: whether the story can be told by several processes.
    """
    with hosts.one_voice():
        config, workdir, chosen = parse_command(sys.argv[1:], program=program, description=description, options=options)
    set_flags(deterministic=config.deterministic)  # before anything starts JAX's backend, which reads them once
    use_compilation_cache()
    try:
        if several:
            hosts.join(config.hosts)
        elif hosts.launched() or config.hosts.cluster != "none":
            raise ValueError(f"{program} runs in one process; start it without dgpo_jax.launch and with hosts.cluster=none.")
        if options is NoOptions:
            story(config, workdir or default_workdir(config))
        else:
            story(config, workdir, chosen)
    except Stop as stop:  # said already
        if hosts.count() > 1:
            raise SystemExit(stop.code) from None
        sys.stdout.flush()
        os._exit(stop.code)  # all is closed; Python would wait for a compilation that was broken off
    except Exception as error:
        if isinstance(error, ValueError | OSError | RuntimeError | MemoryError) and not os.environ.get("DGPO_JAX_TRACEBACK"):
            report(error)
        elif hosts.count() == 1:
            raise
        else:  # raised, it would reach the farewell in which JAX waits for the others, which may wait for us, and then aborts
            print(f"{hosts.name()}:", file=sys.stderr)
            traceback.print_exc()
        hosts.leave(NOTHING_MOVED if hosts.lost_a_process(error) else 1)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is on the disk", file=sys.stderr)
        hosts.leave(130)


def report(error: Exception) -> None:
    """One line on stderr, from whom it is about."""
    if not hosts.says_it(error):
        return
    who = f"{hosts.name()}: " if hosts.count() > 1 else ""
    print(f"{who}error: {in_words(error)}", file=sys.stderr)
    if isinstance(error, RuntimeError):  # not about the input: somebody may have to look at the code
        print("DGPO_JAX_TRACEBACK=1 shows where this came from", file=sys.stderr)


def in_words(error: Exception, another: str = "another --workdir") -> str:
    """An error in a line; what only says that something went wrong says what to do about it too.

    Args:
        another: what else could be given instead of a file that is in the way.
    """
    if isinstance(error, MemoryError):
        what = " ".join(str(error).split())
        return f"out of memory{f' ({what})' if what else ''}; lower {SMALLER}, or free some."
    # An HTTPError is an OSError too, with an address for a filename and no number.
    if not (isinstance(error, OSError) and error.errno and error.strerror and isinstance(error.filename, str | os.PathLike)):
        return str(error)
    place = error.filename2 or error.filename  # of a renaming, what it was to become
    return f"{place}: {error.strerror}; {REMEDIES.get(error.errno, 'move it away')}, or use {another}."


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, under ~/.cache unless JAX_COMPILATION_CACHE_DIR names another place."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def say(text: str) -> None:
    """A line of the story, for the person watching; of several processes the first one tells it."""
    if hosts.is_first():
        print(text, flush=True)


def open_writer(workdir: Path, resume_iteration: int | None, **settings) -> MetricsWriter | NoMetrics:
    """A `metrics.MetricsWriter`; of several processes only the first one's writes."""
    return MetricsWriter(workdir, resume_iteration, **settings) if hosts.is_first() else NoMetrics()


def say_prompt(problem: Problem, template: Template, tokenizer: Tokenizer) -> None:
    """A problem as the model sees it, to the letter."""
    judged = f"answer {problem.answer!r}" if problem.checker == "math" else f"judged as {problem.checker}"
    say(f"first prompt, {judged}:")
    say("  | " + template.render(problem.problem, tokenizer).rstrip("\n").replace("\n", "\n  | "))


def watchdog(config: Config, workdir: Path, stopping: Stopping) -> Watchdog:
    """Which says what the run waits for when nothing moves."""
    stop = partial(stopping.request, code=NOTHING_MOVED) if config.guard.stop_when_silent else None
    return Watchdog(config.guard.silence_minutes * 60, workdir / "stacks", hosts.name(), stop, partial(hosts.exchange, "activity"))


class Stopwatch:
    """Seconds of the parts of an iteration: `with stopwatch("rollout"): ...` adds to time/rollout.

    As a context manager it counts the seconds of compilation too. A trace shows the parts by their names.

    Args:
        show: told the name of each part as it begins, for a progress bar.
    """

    def __init__(self, show: Callable[[str], object]):
        self.show = show
        self.seconds: dict[str, float] = {}
        self._compiling = 0.0

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *exception):
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, seconds: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self._compiling += seconds

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.show(name)
        began = time.perf_counter()
        try:
            with activity.doing(name), jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def take(self, earlier: Mapping[str, Any] = MappingProxyType({})) -> dict[str, float]:
        """The seconds since the last call, as metrics; those of compilation are inside the other parts too.

        Args:
            earlier: metrics of the same iteration from before it was interrupted; their times are added.
        """
        seconds, self.seconds = {f"time/{name}": value for name, value in self.seconds.items()}, {}
        compiling, self._compiling = self._compiling, 0.0
        earlier = {name: value for name, value in earlier.items() if name.startswith("time/")}
        seconds |= {"time/compile": compiling}
        return seconds | {name: seconds.get(name, 0.0) + value for name, value in earlier.items()}


def memory_metrics() -> dict[str, float]:
    """Peak memory so far, in GiB: of this process, and of its fullest device where devices have memory of their own."""
    metrics = {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if max(peaks):
        metrics["memory/device_peak_gib"] = max(peaks) / 2**30
    return metrics
