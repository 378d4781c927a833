"""Where judgements of the same response differ: between two gradings, and between our grader and Math-Verify.

    WORKDIR/regrade.md         what another grader or another rule changed
    WORKDIR/disagreements.md   responses that Math-Verify judges differently

Never imports JAX.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dgpo_jax.evaluation.judging import Judged
from dgpo_jax.evaluation.report import Scored, fenced, inline, percent, table
from dgpo_jax.types import Problem, Verdict

TAIL = 400  # characters of a response that are shown


class Change(NamedTuple):
    """A response that is judged differently than before."""

    set: str
    way: str  # GREEDY or SAMPLES
    sample: int
    problem: Problem
    before: Judged
    after: Verdict

    def kind(self) -> str:
        """Such as wrong -> correct."""
        return f"{self.before.verdict.status} -> {self.after.status}"


def regrade_report(
    changes: Sequence[Change], before: Sequence[Scored], after: Sequence[Scored], was: dict, now: dict
) -> str:
    """regrade.md.

    Args:
        was, now: how it was graded and is.
    """
    rows = [["set", "score", "before", "after"]]
    for old, new in zip(before, after, strict=True):
        rows += [[old.name, key, percent(value), percent(new.scores.get(key))] for key, value in old.headline().items()]
    parts = [
        "# The same responses, judged again\n",
        table([["grading", "before", "after"], *([key, was.get(key, "-"), now[key]] for key in now)], left=3),
        table(rows, left=2),
        f"{len(changes)} responses changed.\n",
    ]
    if changes:
        parts.append(_count_table("change", Counter((change.set, change.kind()) for change in changes)))
    for change in changes:
        parts += [
            f"## {change.set}, {change.problem.id}, {change.way}, sample {change.sample}: {change.kind()}\n",
            _judged_table(change.problem, [("before", change.before.verdict), ("after", change.after)]),
            fenced(_tail(change.before.text)),
        ]
    return "\n".join(parts)


class Disagreement(NamedTuple):
    """A response that Math-Verify judges differently."""

    set: str
    way: str
    sample: int
    problem: Problem
    judged: Judged
    theirs: str

    def kind(self) -> str:
        """Such as ours wrong, theirs correct."""
        return f"ours {self.judged.verdict.status.replace('_', ' ')}, theirs {self.theirs}"


def disagreement_report(found: Sequence[Disagreement], judged: int, unjudged: Counter) -> str:
    """disagreements.md.

    Args:
        judged: responses that both graders judged.
        unjudged: how many Math-Verify gave up, by its word for it.
    """
    words = {word.replace("_", " "): count for word, count in sorted(unjudged.items())}
    gave_up = "".join(f" It gave up {count} more ({word})." for word, count in words.items())
    parts = [
        "# Where Math-Verify judges differently\n",
        f"{len(found)} of {judged} responses.{gave_up} Math-Verify looks for the answer by its own rules, so a response"
        " whose answer stands where reward.extract does not look counts as a difference too. No score depends on it.\n",
    ]
    if found:
        parts.append(_count_table("verdicts", Counter((one.set, one.kind()) for one in found)))
    for one in found:
        parts += [
            f"## {one.set}, {one.problem.id}, {one.way}, sample {one.sample}: {one.kind()}\n",
            _judged_table(one.problem, [("ours", one.judged.verdict)]),
            fenced(_tail(one.judged.text)),
        ]
    return "\n".join(parts)


def _count_table(header: str, counts: Counter) -> str:
    rows = [[name, kind, count] for (name, kind), count in sorted(counts.items())]
    return table([["set", header, "responses"], *rows], left=2)


def _judged_table(problem: Problem, verdicts: Iterable[tuple[str, Verdict]]) -> str:
    rows = [["reference answer", problem.answer]]
    for who, (status, extracted, _) in verdicts:
        rows.append([f"{who}, {status.replace('_', ' ')}", "-" if extracted is None else extracted])
    return table([["", "answer"], *([name, inline(text)] for name, text in rows)], left=2)


def _tail(text: str) -> str:
    return f"[...]{text[-TAIL:]}" if len(text) > TAIL else text
