"""What the runs of a comparison came to: read from their files, averaged over seeds, as a table. Never imports JAX.

Only finished runs count in means; the others are named with their reason.
"""

import csv
import io
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from dgpo_jax.metrics import read_metrics

FAILURE = "failure.txt"  # in the folder of a run: why its last attempt failed; absent unless it did
GREEDY = "eval/*greedy"
AVERAGE = "eval/*avg@*[0-9]"
ENTROPY = "rollout/entropy|policy/entropy"
GRAD_NORM = "optim/grad_norm_max|optim/grad_norm"


class Result(NamedTuple):
    """One run, finished or not."""

    label: str
    seed: int
    rows: list[dict]  # of its metrics.jsonl
    finished: bool
    failure: str = ""  # why it ended early, if it did

    @property
    def iteration(self) -> int:
        """The last that is recorded; 0 if none is."""
        return self.rows[-1]["iteration"] if self.rows else 0


class Measure(NamedTuple):
    """One figure of a run, and its column in the table."""

    key: str  # in results.csv
    header: str  # {avg} stands for avg@8, or whatever k the run had
    format: str
    scale: float = 1.0


MEASURES = (
    Measure("greedy", "greedy %", ".1f", 100.0),
    Measure("avg", "{avg} %", ".1f", 100.0),
    Measure("mean_avg", "mean {avg} %", ".1f", 100.0),
    Measure("best_avg", "best {avg} %", ".1f", 100.0),
    Measure("drop", "drop", ".1f", 100.0),
    Measure("entropy", "entropy", ".3f"),
    Measure("ratio_max", "max ratio", ".3g"),
    Measure("grad_norm_max", "max grad norm", ".3g"),
    Measure("responses", "responses", ".0f"),
    Measure("seconds", "seconds", ".0f"),
)
DIFFERENCES = (  # of these measures to the first method's, seed by seed
    Measure("avg", "{avg} - {first}", "+.1f", 100.0),
    Measure("mean_avg", "mean - {first}", "+.1f", 100.0),
)


def read_result(label: str, seed: int, workdir: Path, finished: bool) -> Result:
    """What is in the workdir of a run, which may not exist yet."""
    metrics, failure = workdir / "metrics.jsonl", workdir / FAILURE
    rows = read_metrics(metrics, "iteration") if metrics.exists() else []
    why = failure.read_text().strip() if failure.exists() and not finished else ""
    return Result(label, seed, rows, finished, why)


def series(rows: Sequence[dict], keys: str) -> list[tuple[int, float]]:
    """(iteration, value) wherever the value is there and finite.

    Args:
        keys: a pattern, or several with "|" between them: the first that the run has anywhere. Where it matches
            several metrics, as with several held-out sets, their mean.
    """
    for pattern in keys.split("|"):
        points = []
        for row in rows:
            values = [
                value for key, value in row.items() if fnmatchcase(key, pattern) and isinstance(value, int | float)
            ]
            if values and math.isfinite(mean := sum(values) / len(values)):
                points.append((row["iteration"], mean))
        if points:
            return points
    return []


def summarise(rows: Sequence[dict]) -> dict[str, float | None]:
    """The measures of one run by their keys, accuracies from 0 to 1; None where nothing was recorded."""

    def values(keys: str) -> list[float]:
        return [value for _, value in series(rows, keys)]

    def last(found: list[float]) -> float | None:
        return found[-1] if found else None

    average, trained = values(AVERAGE), [value for iteration, value in series(rows, AVERAGE) if iteration]
    return {
        "greedy": last(values(GREEDY)),
        "avg": last(average),
        "mean_avg": sum(trained) / len(trained) if trained else None,
        "best_avg": max(trained, default=None),
        "drop": max(trained) - trained[-1] if trained else None,
        "entropy": last(values(ENTROPY)),
        "ratio_max": max(values("policy/ratio_max"), default=None),
        "grad_norm_max": max(values(GRAD_NORM), default=None),
        "responses": sum(values("rollout/responses")) or None,
        "seconds": sum(values("time/iteration")) or None,
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, the standard deviation (n - 1) over the root of n; None for a single value."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def paired_differences(values: dict[int, float], baseline: dict[int, float]) -> list[float]:
    """values - baseline for each seed that has both."""
    return [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]


def make_table(results: Sequence[Result], title: str = "", differences: Sequence[str] = ()) -> str:
    """Markdown, its columns aligned so that it can be read as it is: the table, what the words mean, who failed.

    One row per label, in the order of `results`; the first is what the others are compared with.

    Args:
        differences: settings in which the labels are not the same, a line each.
    """
    labels = list(dict.fromkeys(result.label for result in results))
    by_label = {label: [result for result in results if result.label == label] for label in labels}
    summaries = {
        label: {result.seed: summarise(result.rows) for result in by_label[label] if result.finished} for label in labels
    }
    average = average_name(results)
    headers = [measure.header.format(avg=average, first=labels[0]) for measure in (*MEASURES, *DIFFERENCES)]
    body = []
    for label in labels:
        finished = summaries[label]
        cells = [_cell(measure, [summary[measure.key] for summary in finished.values()]) for measure in MEASURES]
        for measure in DIFFERENCES:
            own, first = (_by_seed(summaries[which], measure.key) for which in (label, labels[0]))
            cells.append(_cell(measure, [] if label == labels[0] else paired_differences(own, first)))
        body.append([label, f"{len(finished)} of {len(by_label[label])}", *cells])
    parts = [f"# {title}\n"] if title else []
    parts += [_align([["method", "finished", *headers], *body]), definitions(average, labels[0])]
    if differences:
        parts.append("The methods' settings are the same but for:\n\n" + "".join(f"- {line}\n" for line in differences))
    missing = [_excuse(result) for result in results if not result.finished]
    if missing:
        parts.append("Not in the means, which therefore flatter a method whose runs break down:\n\n" + "\n".join(missing) + "\n")
    return "\n".join(parts)


def definitions(average: str, first: str) -> str:
    """What the columns mean, in words."""
    samples = average.removeprefix("avg@")
    return (
        f"Mean ± standard error over the seeds that finished. greedy, {average}: held-out accuracy after the last iteration,"
        f" of one answer at temperature 0 and as the mean of {samples} sampled ones. mean, best: of {average} over the run's"
        " evaluations after its start; drop: best minus last, in points. entropy: of the sampled tokens in the last iteration, nats. max"
        " ratio, max grad norm: the largest of the whole run, the norm before clipping. responses: sampled to learn from."
        " seconds: of all iterations, without start, evaluation and checkpoints."
        f" {average} - {first}, mean - {first}: points more than {first} with the same seed, which began with the same"
        " weights and problems; mean over the seeds that both finished.\n"
    )


def average_name(results: Sequence[Result]) -> str:
    """`avg@8`, by the key in the metrics."""
    keys = (key for result in results for row in result.rows for key in row if fnmatchcase(key, AVERAGE))
    return next(keys, "avg@k").rpartition("/")[2]


def to_csv(results: Sequence[Result]) -> str:
    """One line per run with all its digits, failed ones too; an empty cell is a figure that was not recorded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = [measure.key for measure in MEASURES]
    writer.writerow(["method", "seed", "status", "iteration", *keys, "failure"])
    for result in results:
        summary = summarise(result.rows)
        writer.writerow(
            [
                result.label,
                result.seed,
                _status(result),
                result.iteration,
                *[summary[key] for key in keys],
                result.failure,
            ]
        )
    return text.getvalue()


def _status(result: Result) -> str:
    if result.finished:
        return "finished"
    return "failed" if result.failure else "unfinished"


def _by_seed(summaries: dict[int, dict], key: str) -> dict[int, float]:
    """One measure of the runs that have it."""
    return {seed: summary[key] for seed, summary in summaries.items() if summary[key] is not None}


def _cell(measure: Measure, values: Sequence[float | None]) -> str:
    """`93.1 ± 0.4`; one value has no error, none at all is a dash."""
    present = [value * measure.scale for value in values if value is not None]
    if not present:
        return "-"
    mean, error = mean_and_error(present)
    return format(mean, measure.format) + ("" if error is None else f" ± {format(error, measure.format.lstrip('+'))}")


def _align(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]

    def draw(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [f"{first[0]:<{first[1]}}", *[f"{cell:>{width}}" for cell, width in others]]
        return f"| {' | '.join(padded)} |\n"

    return "".join(draw(cells) for cells in (lines[0], rule, *lines[1:]))


def _excuse(result: Result) -> str:
    reached = f"after iteration {result.iteration}" if result.rows else "before the first iteration"
    what = f"failed {reached}: {result.failure}" if result.failure else f"is not finished, it is {reached}"
    return f"- {result.label} seed {result.seed} {what}"
