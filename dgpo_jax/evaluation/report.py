"""What an evaluation came to, as a table and as files, with the protocol that it holds for.

    WORKDIR/results.json       every figure with its standard error, and the protocol
    WORKDIR/results.md         the same to read

Never imports JAX.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dgpo_jax.evaluation.estimators import Estimate, powers_of_two
from dgpo_jax.evaluation.judging import GREEDY, SAMPLES, Answered, figures, share
from dgpo_jax.types import STATUSES, Verdict

MEANINGS = {
    "greedy": "share of problems solved by the one response at temperature 0",
    "avg@n": "mean score of a response, over n samples of each problem",
    "pass@k": "chance that one of k samples or more is right; unbiased, 1 - C(n-c, k) / C(n, k) (arXiv:2107.03374)",
    "best@k": (
        "expected best score of k samples drawn from the n *with* replacement: what verl reports as best@k/mean, and"
        " below pass@k. The P@32 of the DGPO paper looks like this one: its values on the 30 problems of AIME are no"
        " multiples of 1/30"
    ),
    "maj@k": (
        "chance that the most frequent answer of k samples is right; equal answers vote together, ties are drawn"
        " (arXiv:2203.11171)"
    ),
}


class Scored(NamedTuple):
    """One set with the figures of its rounds."""

    name: str
    problems: int  # those that could not be asked included
    unasked: int  # of these; they count as wrong
    rounds: dict[str, dict[str, Estimate]]  # GREEDY, SAMPLES -> figures, see judging.figures
    whole: int  # problems of the whole set, of which these are the first

    @property
    def size(self) -> str:
        """Such as 500, or "128 of 500" where the figures are not those of the whole set."""
        return count_of(self.problems, self.whole)

    @property
    def scores(self) -> dict[str, Estimate]:
        """The figures of a score, the greedy one under that name."""
        greedy = {"greedy": self.rounds[GREEDY]["pass@1"]} if GREEDY in self.rounds else {}
        return greedy | {key: value for key, value in self.rounds.get(SAMPLES, {}).items() if "@" in key}

    @property
    def samples(self) -> int:
        """n; 0 without samples."""
        return max((int(key.partition("@")[2]) for key in self.rounds.get(SAMPLES, {}) if "@" in key), default=0)

    def headline(self) -> dict[str, Estimate]:
        """One score of each kind: greedy, avg@n, and the others at k = n."""
        n = self.samples
        return {key: value for key, value in self.scores.items() if key == "greedy" or int(key.partition("@")[2]) == n}


def score_set(
    name: str, rounds: dict[str, Sequence[Answered]], unasked: int, whole: int = 0,
    grade: Callable[[Verdict], float] = share,
) -> Scored:  # fmt: skip
    """The figures of one set.

    Args:
        rounds: GREEDY, SAMPLES -> all problems that were asked.
        unasked: problems that count as wrong.
        whole: problems of the whole set; 0 = no more than these.
        grade: what a verdict is worth, 0 to 1.
    """
    problems = unasked + max(len(done) for done in rounds.values())
    found = {way: figures(done, unasked, grade) for way, done in rounds.items()}
    return Scored(name, problems, unasked, found, whole or problems)


def count_of(part: int, whole: int) -> str:
    """Such as 128 of 500; 500 alone where that is all."""
    return f"{part} of {whole}" if part < whole else str(part)


def percent(estimate: Estimate | None) -> str:
    """Such as 12.0 ± 3.3, in percent and one standard error."""
    if estimate is None:
        return "-"
    return f"{100 * estimate.value:.1f}" + (f" ± {100 * estimate.error:.1f}" if estimate.error is not None else "")


def mean_over_sets(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """The plain mean, each set weighing the same; None unless all are there."""
    if not estimates or any(estimate is None for estimate in estimates):
        return None
    errors = [estimate.error for estimate in estimates]
    error = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(errors)
    return Estimate(sum(estimate.value for estimate in estimates) / len(estimates), error)


def table(rows: Sequence[Sequence], left: int = 1) -> str:
    """A Markdown table, aligned for those who read it as text.

    Args:
        rows: of cells; the first row is the header.
        left: columns of text, from the left; the others are numbers.
    """
    rows = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells):
        padded = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + ("-" if place < left else ":") for place, width in enumerate(widths))
    return "\n".join([line(rows[0]), f"|{rule}|", *map(line, rows[1:])]) + "\n"


def score_table(scored: Sequence[Scored]) -> str:
    """A row per set, the main scores in percent; a last row with their mean if there are several sets."""
    keys = list(dict.fromkeys(key for one in scored for key in one.headline()))
    rows = [["set", "problems", *keys]]
    for one in scored:
        star = "*" if one.unasked else ""
        rows.append([one.name + star, one.size, *(percent(one.headline().get(key)) for key in keys)])
    if len(scored) > 1:
        means = (mean_over_sets([one.headline().get(key) for one in scored]) for key in keys)
        rows.append(["mean of sets", sum(one.problems for one in scored), *map(percent, means)])
    return table(rows)


def score_line(one: Scored, seconds: float | None = None) -> str:
    """For the console, as a set finishes."""
    scores = ", ".join(f"{key} {percent(value)}" for key, value in one.headline().items())
    return f"{one.name:<14}{one.size} problems: {scores}" + (f"  ({seconds:.0f} s)" if seconds is not None else "")


def to_json(scored: Sequence[Scored], protocol: dict, unmatched: Sequence[str]) -> str:
    """results.json."""

    def plain(found: dict[str, Estimate]) -> dict:
        return {key: {"value": value, "standard_error": error} for key, (value, error) in found.items()}

    sets = {
        one.name: {"problems": one.problems, "of": one.whole, "too_long": one.unasked, "scores": plain(one.scores)}
        | {
            way: plain({key: value for key, value in found.items() if "@" not in key})
            for way, found in one.rounds.items()
        }
        for one in scored
    }
    results = {"sets": sets, "answers_that_do_not_equal_themselves": list(unmatched), "protocol": protocol}
    return json.dumps(results, indent=2, ensure_ascii=False) + "\n"


def to_markdown(name: str, scored: Sequence[Scored], protocol: dict, unmatched: Sequence[str]) -> str:
    """results.md."""
    shown = {key.partition("@")[0] for one in scored for key in one.headline()}
    meanings = [f"- **{key}**: {text}." for key, text in MEANINGS.items() if key.partition("@")[0] in shown]
    limit = protocol["asking"]["max_prompt"]
    notes = [
        f"*{one.name}: {one.unasked} of {one.problems} problems do not fit into {limit} tokens. They were not asked and"
        " count as wrong."
        for one in scored
        if one.unasked
    ]
    notes += [
        f"{one.name}: the first {one.problems} of {one.whole} problems (eval.problems), no score of the whole set."
        for one in scored
        if one.problems < one.whole
    ]
    if unmatched:
        notes.append(
            f"{len(unmatched)} reference answers do not equal themselves by this grader, so nobody can be right:"
            f" {', '.join(unmatched)}."
        )
    parts = [
        f"# {name}\n\nWeights: {protocol['weights']}. Scores in percent ± one standard error over problems.\n",
        score_table(scored),
        *(f"{note}\n" for note in notes),
        "\n".join(meanings) + "\n",
    ]
    if any(one.samples > 1 for one in scored):
        parts += ["## Scores by k\n", _table_by_k(scored)]
    parts += ["## Responses\n", _table_of_responses(scored), "## Protocol\n", _table_of_protocol(protocol)]
    parts += ["The prompt of the first problem, to the letter:\n", fenced(protocol["asking"]["example_prompt"])]
    return "\n".join(parts)


def _table_by_k(scored: Sequence[Scored]) -> str:
    ks = list(dict.fromkeys(k for one in scored for k in powers_of_two(one.samples)))
    rows = [["set", "score", *(f"k = {k}" for k in ks)]]
    for one in scored:
        for kind in ("pass", "best", "maj"):
            found = [one.scores.get(f"{kind}@{k}") for k in ks]
            if any(found):
                rows.append([one.name, f"{kind}@k", *map(percent, found)])
    return table(rows, left=2)


def _table_of_responses(scored: Sequence[Scored]) -> str:
    kinds = [status for status in STATUSES if status != "correct"]
    rows = [["set", "round", "tokens", "truncated %", *(f"{kind.replace('_', ' ')} %" for kind in kinds)]]
    for one in scored:
        for way, found in one.rounds.items():
            tokens, error = found["tokens"]
            spread = f" ± {error:.0f}" if error is not None else ""
            shares = [percent(found[key]) for key in ("truncated", *kinds)]
            rows.append([one.name, way, f"{tokens:.0f}{spread}", *shares])
    return table(rows, left=2)


def _table_of_protocol(protocol: dict) -> str:
    asking, grading = protocol["asking"], protocol["grading"]
    rows = [["setting", "value"], ["weights", f"{protocol['weights']} (fingerprint {asking['weights']})"]]
    rows += [
        [key, json.dumps(value, ensure_ascii=False) if key in ("template", "system", "instruction") else value]
        for key, value in (asking | grading).items() if key not in ("weights", "sets", "model", "example_prompt")
    ]  # fmt: skip
    rows.append(["model", ", ".join(f"{key} {value}" for key, value in asking["model"].items())])
    rows += [
        [f"set {name}", f"{one['source']}, {count_of(one['problems'], one['of'])} problems, fingerprint {one['fingerprint']}"]
        for name, one in asking["sets"].items()
    ]
    for session in protocol["sessions"]:
        rows.append(["made", ", ".join(f"{key} {value}" for key, value in session.items())])
    return table(rows, left=2)


def fenced(text: str) -> str:
    """A block of code, whatever backticks are in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}\n"


def inline(text: str) -> str:
    """Code within a line, whatever backticks are in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    ticks = "`" * (longest + 1)
    return f"{ticks} {text} {ticks}" if longest else f"`{text}`"
