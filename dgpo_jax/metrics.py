"""What a run leaves to look at: metrics.jsonl, TensorBoard, the generated texts, a line on the console. Never imports JAX.

`metrics.jsonl` is the record and everything else can be made from it again: one JSON object per iteration, floats
written so that they read back to the same bits, NaN and infinities as null (JSON has neither; `read_metrics` gives NaN).
A resumed run first drops what lies at or after its first iteration (`rewind`), then goes on as if never interrupted.
TensorBoard's files are then written anew from metrics.jsonl, so it shows no point twice.

One key is added to each line: `time/clock`, seconds since 1970, which TensorBoard's wall-time axis needs.
"""

import contextlib
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from dgpo_jax.files import read_regular


class Column(NamedTuple):
    """One column of the console table."""

    key: str  # metric, or patterns with "|" between them: the mean of those that match the first that has any
    header: str
    format: str  # of format()
    scale: float = 1.0  # the value is multiplied by it


CONSOLE_COLUMNS = (
    Column("reward/mean", "reward", ".3f"),
    Column("verdict/correct", "correct%", ".1f", 100.0),
    Column("eval/greedy|eval/*greedy", "greedy%", ".1f", 100.0),
    Column("eval/avg@*[0-9]|eval/*avg@*[0-9]", "avg@k%", ".1f", 100.0),
    Column("rollout/response_length", "length", ".1f"),
    Column("rollout/truncated", "trunc%", ".1f", 100.0),
    Column("policy/entropy", "entropy", ".3f"),
    Column("policy/ratio_max", "ratio max", ".3f"),
    Column("policy/clipped", "clip%", ".2f", 100.0),
    Column("optim/grad_norm", "grad norm", ".3g"),
    Column("time/iteration", "seconds", ".1f"),
    Column("speed/rollout_tokens_per_second_per_device", "tokens/s", ".0f"),
)
WARM_START_COLUMNS = (
    Column("sft/loss", "loss", ".4f"),
    Column("sft/entropy", "entropy", ".4f"),
    Column("optim/grad_norm", "grad norm", ".3g"),
    Column("optim/learning_rate", "rate", ".2g"),
    Column("time/update", "seconds", ".2f"),
    Column("speed/update_tokens_per_second_per_device", "tokens/s", ".0f"),
)
HEADER_EVERY = 20  # lines
TEXTS = re.compile(r"iteration_(\d+)\.jsonl")  # in rollouts/, eval/ and nonfinite/


class MetricsWriter:
    """Writes the metrics and texts of one run. Use as a context manager.

    Args:
        workdir: created if need be.
        resume_iteration: the first iteration that this process will run: what is recorded from there on is dropped.
            None keeps all there is.
        sampled: of the iterations before this number, keep the responses learned from, even where the line is written again; None =
            `resume_iteration`. Of an iteration whose evaluation alone is done again.
        console: print a line per iteration.
        console_columns: what is in that line.
        unit: what a line is about; the name of its number. "update" for a warm start.
    """

    def __init__(
        self,
        workdir: str | Path,
        resume_iteration: int | None = None,
        console: bool = True,
        console_columns: tuple[Column, ...] = CONSOLE_COLUMNS,
        unit: str = "iteration",
        sampled: int | None = None,
    ):
        self.unit = unit
        self.workdir = Path(workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.path = self.workdir / "metrics.jsonl"
        self._console = ConsoleTable(console_columns, unit) if console else None
        self._file = self._tensorboard = None
        self.rewind(math.inf if resume_iteration is None else resume_iteration, sampled)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def rewind(self, iteration: float, sampled: float | None = None) -> None:
        """Drops every line, point and text of iterations >= `iteration`, and a last line that was torn by a kill.

        Args:
            sampled: responses learned from are dropped from this iteration on; None = as everything else.
        """
        self.close()
        rows = [row for row in read_metrics(self.path, self.unit) if row[self.unit] < iteration] if self.path.exists() else []
        write_lines(self.path, rows)
        for folder, first in (("rollouts", sampled), ("nonfinite", sampled), ("eval", None)):
            for path in self.workdir.glob(f"{folder}/*"):
                match = TEXTS.fullmatch(path.name)
                if match and int(match[1]) >= (iteration if first is None else first):
                    path.unlink()
        self._last = rows[-1][self.unit] if rows else -1
        self._file = open(self.path, "ab")  # noqa: SIM115 (closed in close)
        self._tensorboard = _rewrite_tensorboard(self.workdir / "tensorboard", rows, self.unit)

    def write(self, iteration: int, metrics: dict[str, Any]) -> None:
        """Appends one iteration; on the disk when this returns.

        Args:
            metrics: numbers, Python's or numpy's scalars; None is left out.
        Raises:
            ValueError: `iteration` is not later than the last one written.
        """
        if iteration <= self._last:
            raise ValueError(
                f"metrics of {self.unit} {iteration} after those of {self._last}: one line each, in order;"
                f" give all its metrics at once, or rewind({iteration}) first."
            )
        given = {key: value for key, value in metrics.items() if value is not None}
        row = _plain({self.unit: iteration, "time/clock": time.time(), **given})
        self._file.write(encode_line(row))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._last = iteration
        _add_points(self._tensorboard, row, self.unit)
        if self._console:
            self._console.show(iteration, row)

    def write_rollouts(self, iteration: int, rows: list[dict]) -> None:
        """Writes rollouts/iteration_000123.jsonl, whole or not at all; one row per response."""
        write_lines(self.workdir / "rollouts" / f"iteration_{iteration:06d}.jsonl", rows)

    def write_eval(self, iteration: int, rows: list[dict]) -> None:
        """Writes eval/iteration_000123.jsonl, whole or not at all; one row per evaluation response."""
        write_lines(self.workdir / "eval" / f"iteration_{iteration:06d}.jsonl", rows)

    def close(self) -> None:
        """Flushes and closes the files; rewind() opens them again."""
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()
            self._file = self._tensorboard = None


class NoMetrics:
    """A writer that writes nothing, for processes other than the first."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def write(self, iteration: int, metrics: dict[str, Any]) -> None:
        """As MetricsWriter's, and so are the others."""

    def write_rollouts(self, iteration: int, rows: list[dict]) -> None:
        """Nothing."""

    def write_eval(self, iteration: int, rows: list[dict]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing to close."""


def read_metrics(path: str | Path, unit: str = "") -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, null read as NaN. A last line without its line end was torn by a kill: left out.

    Args:
        unit: what every line must have the number of; "" = not looked at.
    Raises:
        ValueError: with the line that is none of a run.
    """
    # A kill can also tear a character apart; that is in the torn line, so it need not be readable.
    lines = read_regular(Path(path), errors="replace").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); mend or delete that line.") from error
        if not _is_row(row, unit):
            raise ValueError(f"{path}, line {number} is {line[:60]!r}, which no run has written; mend or delete that line.")
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def _is_row(row: Any, unit: str) -> bool:
    """Whether it is an object with numbers that fit, where TensorBoard wants them too."""
    if not isinstance(row, dict) or any(isinstance(value, int) and abs(value) >= 2**63 for value in row.values()):
        return False
    return not unit or (isinstance(row.get(unit), int) and isinstance(row.get("time/clock", 0), (int, float)))


def write_lines(path: Path, rows: list[dict]) -> None:
    """Writes a JSONL file whole or not at all: a kill leaves the file that was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        file.writelines(encode_line(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def encode_line(row: dict) -> bytes:
    """One line of JSON, valid for any text and number."""
    line = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"
    # A model can emit half a surrogate pair, which UTF-8 cannot hold; escaped, it is JSON's own spelling of it.
    return line.encode("utf-8", errors="backslashreplace")


def _plain(value: Any) -> Any:
    """Python's own types for numpy's; None for NaN and infinities."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rewrite_tensorboard(folder: Path, rows: list[dict], unit: str) -> Any:
    """Replaces the event files of `folder` with one that holds `rows`; returns its open writer."""
    from tensorboardX import FileWriter  # imports torch where that is installed: seconds that a reader need not wait

    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
    writer = FileWriter(str(folder), flush_secs=10)
    for row in rows:
        _add_points(writer, row, unit)
    return writer


def _add_points(writer: Any, row: dict[str, Any], unit: str) -> None:
    """One event for the whole row. (SummaryWriter.add_scalar renames "avg@4" and warns of every NaN.)"""
    from tensorboardX.proto.summary_pb2 import Summary

    numbers = {key: math.nan if value is None else value for key, value in row.items()}
    points = [
        Summary.Value(tag=key, simple_value=number)
        for key, number in numbers.items()
        if key not in (unit, "time/clock") and isinstance(number, int | float)
    ]
    writer.add_summary(Summary(value=points), row[unit], walltime=row.get("time/clock"))


class ConsoleTable:
    """One aligned line per iteration, a header every 20; in colour on a terminal, plain text elsewhere."""

    def __init__(self, columns: tuple[Column, ...] = CONSOLE_COLUMNS, unit: str = "iteration"):
        self.columns = columns
        self.unit = unit
        self.lines = 0

    def show(self, iteration: int, metrics: dict[str, Any]) -> None:
        """Prints the line of one iteration; "-" stands for a metric that is not there."""
        if self.lines % HEADER_EVERY == 0:
            headers = [f"{column.header:>{_width(column)}}" for column in self.columns]
            self._print("  ".join([f"{self.unit:>9}", *headers]), style="bold")
        cells = [f"{_cell(column, metrics):>{_width(column)}}" for column in self.columns]
        evaluated = any(key.startswith("eval/") for key in metrics)
        self._print("  ".join([f"{iteration:>9}", *cells]), style="green" if evaluated else "")
        self.lines += 1

    def _print(self, line: str, style: str) -> None:
        if sys.stdout.isatty():
            # Through rich, because a progress bar may be on the last line; cut off, because a wrapped table is unreadable.
            _terminal().print(line, style=style, markup=False, highlight=False, no_wrap=True, overflow="crop")
        else:
            print(line, flush=True)


def _width(column: Column) -> int:
    return max(len(column.header), 7)


def _cell(column: Column, metrics: dict[str, Any]) -> str:
    for pattern in column.key.split("|"):
        values = [value for key, value in metrics.items() if fnmatchcase(key, pattern)]
        if values:
            mean = sum(math.nan if value is None else value for value in values) / len(values)
            return format(mean * column.scale, column.format)
    return "-"


@contextlib.contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Shows a progress bar on a terminal and nothing elsewhere; gone when done.

        with progress("sampling", total=64) as advance:
            advance(4)
            advance(0, "checking")

    Args:
        total: how many advances make it complete; None for a spinner with the time spent, as for a compilation.
    """
    if not sys.stdout.isatty():
        yield lambda count=1, description=None: None
        return
    from rich import progress as bars

    counted = (bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn()) if total is not None else ()
    columns = (bars.SpinnerColumn(), bars.TextColumn("{task.description}"), *counted, bars.TimeElapsedColumn())
    with bars.Progress(*columns, console=_terminal(), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count=1, description=None: bar.update(task, advance=count, description=description)


@functools.cache
def _terminal() -> Any:
    """The one rich console: two would not know of each other's lines."""
    from rich.console import Console

    return Console()
