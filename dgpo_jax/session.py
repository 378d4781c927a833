"""What every command does around its story: read the command line, claim the workdir, say what is going on."""

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from dgpo_jax.config import Config, NoOptions, default_workdir, fixed_settings, flatten, parse_command, to_json
from dgpo_jax.data.problems import fingerprint
from dgpo_jax.data.prompts import Template
from dgpo_jax.data.tokenizers import Tokenizer
from dgpo_jax.files import write_whole
from dgpo_jax.flags import set_flags
from dgpo_jax.types import Problem

CACHE = Path.home() / ".cache" / "dgpo_jax" / "xla"


def run_command(program: str, description: str, story: Callable[..., object], options: type = NoOptions) -> None:
    """Runs a story as a command: bad input is one line and exit code 1, never a traceback.

    DGPO_JAX_TRACEBACK=1 shows the traceback all the same.

    Args:
        story: called as story(config, workdir), the workdir found by the settings if none was given; with `options`
            as story(config, workdir or None, options).
        options: see `config.parse_command`.
    """
    config, workdir, chosen = parse_command(sys.argv[1:], program=program, description=description, options=options)
    set_flags()  # before anything starts JAX's backend, which reads them once
    use_compilation_cache()
    try:
        if options is NoOptions:
            story(config, workdir or default_workdir(config))
        else:
            story(config, workdir, chosen)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("DGPO_JAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, RuntimeError):  # not about the input: somebody may have to look at the code
            print("DGPO_JAX_TRACEBACK=1 shows where this came from", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is on the disk", file=sys.stderr)
        raise SystemExit(130) from None


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, under ~/.cache unless JAX_COMPILATION_CACHE_DIR names another place."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def claim_workdir(config: Config, workdir: Path) -> None:
    """Creates the workdir and its config.json.

    Raises:
        ValueError: it cannot be written, or holds a run with other settings.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        record = workdir / "config.json"
        if record.exists() and has_results(workdir):
            refuse_changes(config, record)
        write_whole(record, to_json(config))
    except OSError as error:
        raise ValueError(f"--workdir {workdir} cannot be written: {error.strerror}; choose another.") from None


def claim_problems(workdir: Path, **sets: Sequence[Problem]) -> None:
    """Records which problems the run is about, in problems.json.

    Raises:
        ValueError: the run in the workdir was started with others under the same names: a file was edited meanwhile.
    """
    record = workdir / "problems.json"
    prints = {name: {"problems": len(problems), "sha256": fingerprint(problems)} for name, problems in sets.items()}
    before = json.loads(record.read_text()) if record.exists() and has_results(workdir) else {}
    changed = [name for name in prints if before.get(name, prints[name]) != prints[name]]
    if changed:
        raise ValueError(
            f"{workdir} holds a run with other {changed[0]} problems: they were {before[changed[0]]['problems']} and are"
            f" {prints[changed[0]]['problems']}, or their texts have changed. Put them back, or use another --workdir."
        )
    write_whole(record, json.dumps(before | prints, indent=2) + "\n")


def has_results(workdir: Path) -> bool:
    """Whether anything was computed there: a run refused for its data or weights leaves a workdir that can be used."""
    records = [*workdir.glob("metrics.jsonl"), *workdir.glob("sft/metrics.jsonl")]
    return any(record.stat().st_size for record in records) or any(workdir.glob("**/checkpoints/iteration_*"))


def refuse_changes(config: Config, record: Path) -> None:
    """Raises ValueError if the run in the workdir was started with other settings than these."""
    before = flatten(json.loads(record.read_text()))
    changed = [
        f"{name} was {before.get(name)!r} and is {value!r}"
        for name, value in fixed_settings(config).items()
        if before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{record.parent} holds a run with other settings: {'; '.join(changed)}. Use another --workdir, or the"
            " settings it was started with."
        )


def say(text: str) -> None:
    """A line of the story, for the person watching."""
    print(text, flush=True)


def say_prompt(problem: Problem, template: Template, tokenizer: Tokenizer) -> None:
    """A problem as the model sees it, to the letter."""
    judged = f"answer {problem.answer!r}" if problem.checker == "math" else f"judged as {problem.checker}"
    say(f"first prompt, {judged}:")
    say("  | " + template.render(problem.problem, tokenizer).rstrip("\n").replace("\n", "\n  | "))


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
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """The seconds since the last call, as metrics; those of compilation are inside the other parts too."""
        seconds, self.seconds = self.seconds, {}
        compiling, self._compiling = self._compiling, 0.0
        return {f"time/{name}": value for name, value in seconds.items()} | {"time/compile": compiling}


def memory_metrics() -> dict[str, float]:
    """Peak memory so far, in GiB: of this process, and of its fullest device where devices have memory of their own."""
    metrics = {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if max(peaks):
        metrics["memory/device_peak_gib"] = max(peaks) / 2**30
    return metrics
