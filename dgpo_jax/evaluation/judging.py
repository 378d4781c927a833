"""Verdicts and votes of the responses to a problem, and the figures of a set of problems. Never imports JAX."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dgpo_jax.evaluation.estimators import (
    NO_VOTE,
    RIGHT,
    Estimate,
    average,
    best_at,
    estimate,
    majority_at,
    pass_at,
    powers_of_two,
)
from dgpo_jax.types import STATUSES, Problem, Verdict

GREEDY, SAMPLES = "greedy", "samples"  # the rounds of an evaluation: one response at temperature 0, and n samples


class Judged(NamedTuple):
    """One response and what the checker says of it."""

    text: str  # what the prompt began of it ("<think>") included, special tokens left out
    verdict: Verdict
    vote: int  # which answer it votes for, see estimators.majority_at
    tokens: int  # the stop token included
    truncated: bool  # True = ran out of tokens before it ended


class Answered(NamedTuple):
    """One problem with all its responses, sample 0 first."""

    problem: Problem
    responses: Sequence[Judged]


def judge(checkers, problem: Problem, tickets: Sequence) -> tuple[list[Verdict], list[int]]:
    """Verdicts and votes of the responses to one problem.

    Args:
        checkers: a `rewards.checkers.Checkers`.
        tickets: from `checkers.submit`, one for each response.
    """
    verdicts = checkers.gather(tickets)
    return verdicts, count_votes(checkers, problem, verdicts)


def count_votes(checkers, problem: Problem, verdicts: Sequence[Verdict]) -> list[int]:
    """Which answer each response votes for: RIGHT, 1, 2, ... in the order of appearance, or NO_VOTE.

    A wrong answer joins the first one before it that the checker finds equal; one that could not be judged votes with
    those of the same letters only. Programs and puzzles do not vote.
    """
    if problem.checker != "math":
        return [NO_VOTE] * len(verdicts)
    votes: dict[str, int] = {}  # of wrong answers
    judged: list[str] = []  # those that a later one may equal

    def vote(verdict: Verdict) -> int:
        answer = verdict.extracted
        if verdict.correct:
            return RIGHT
        if answer is None:
            return NO_VOTE
        if answer not in votes:
            equal = None
            if verdict.status == "wrong":
                equal = find_equal(checkers, judged, answer, problem.tolerance)
                judged.append(answer)
            votes[answer] = votes[equal] if equal is not None else 1 + max(votes.values(), default=RIGHT)
        return votes[answer]

    return [vote(verdict) for verdict in verdicts]


def find_equal(checkers, answers: Sequence[str], answer: str, tolerance: float) -> str | None:
    """The first of the answers that is the same as this one; None if none is."""
    verdicts = checkers.gather([checkers.compare(other, answer, tolerance) for other in answers])
    return next((other for other, verdict in zip(answers, verdicts, strict=True) if verdict.correct), None)


def share(verdict: Verdict) -> float:
    """The grade of code.grade=soft, 0 to 1; see `rewarding.graded`."""
    return verdict.score


def figures(
    done: Sequence[Answered], wrong_unasked: int = 0, grade: Callable[[Verdict], float] = share
) -> dict[str, Estimate]:
    """avg@n, pass@k, best@k and maj@k of n responses to each problem, and what kind of responses they are.

    Graded answers (programs, puzzles) count by their grade in avg and best; pass and maj count those that are wholly
    right. maj@k is there only if every problem is mathematics, best@k from 2 responses on.

    Args:
        wrong_unasked: problems that could not be asked and count as wrong in scores; they have no responses.
        grade: what a verdict is worth, 0 to 1.
    """
    responses = [answered.responses for answered in done]
    n = len(responses[0]) if responses else 0
    if not n:
        return {}

    def table(value, unasked):
        return np.array([[value(one) for one in row] for row in responses] + [[unasked] * n] * wrong_unasked)

    scores, correct = table(lambda one: grade(one.verdict), 0.0), table(lambda one: one.verdict.correct, False)
    found = {f"avg@{n}": average(scores)}
    found |= {f"pass@{k}": pass_at(correct, k) for k in powers_of_two(n)}
    found |= {f"best@{k}": best_at(scores, k) for k in powers_of_two(n) if k > 1}
    if all(answered.problem.checker == "math" for answered in done):
        votes = table(lambda one: one.vote, NO_VOTE)
        found |= {f"maj@{k}": majority_at(votes, k) for k in powers_of_two(n)}
    return found | _describe(responses)


def _describe(responses: Sequence[Sequence[Judged]]) -> dict[str, Estimate]:
    """Length, truncation, and the share of each status."""
    counts = [Counter(one.verdict.status for one in row) for row in responses]
    return {
        "tokens": estimate(np.mean([one.tokens for one in row]) for row in responses),
        "truncated": estimate(np.mean([one.truncated for one in row]) for row in responses),
        **{
            status: estimate(count[status] / len(row) for count, row in zip(counts, responses, strict=True))
            for status in STATUSES
        },
    }
