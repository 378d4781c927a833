"""What n responses to each problem say of a model: avg@n, pass@k, best@k and maj@k, with standard errors. Numpy only.

Every figure is a mean over problems of something computed from one problem's n responses. Its standard error is that of
such a mean: it tells what other problems of the same kind would have given, and contains the luck of the sampling.

Letters: P problems, n responses to each, k of them looked at.
"""

from collections.abc import Iterable
from math import comb, sqrt
from typing import NamedTuple

import numpy as np

NO_VOTE = -1  # of a response without an answer
RIGHT = 0  # the vote of every right answer; wrong ones have 1, 2, ...


class Estimate(NamedTuple):
    """A mean over problems."""

    value: float
    error: float | None  # standard error; None with fewer than two problems


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and standard error sd / sqrt(P), with sd over P - 1, of one value for each problem.

    Raises:
        ValueError: no values.
    """
    values = np.asarray(list(values), np.float64)
    if not values.size:
        raise ValueError("a mean over no problems was asked for; give at least one.")
    error = float(np.std(values, ddof=1) / sqrt(values.size)) if values.size > 1 else None
    return Estimate(float(np.mean(values)), error)


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... below n, and n itself: the k that are reported. Empty for n = 0."""
    return [k for k in (2**exponent for exponent in range(n.bit_length())) if k < n] + [n] * (n > 0)


def average(scores: np.ndarray) -> Estimate:
    """avg@n: the mean score of a response.

    Args:
        scores: f64[P, n], 0 to 1.
    """
    return estimate(np.mean(scores, axis=1))


def pass_at(correct: np.ndarray, k: int) -> Estimate:
    """pass@k: the chance that of k responses at least one is right, 1 - C(n - c, k) / C(n, k) with c of n right.

    Unbiased: it is the mean over all choices of k different responses among the n. Exact, by integers.

    Args:
        correct: bool[P, n].
    Source: Chen et al. 2021, arXiv:2107.03374, equation 1.
    """
    n = _samples(correct, k)
    return estimate(1 - comb(n - int(right), k) / comb(n, k) for right in np.sum(correct, axis=1))


def best_at(scores: np.ndarray, k: int) -> Estimate:
    """best@k: the expected best score of k responses drawn from the n *with replacement*: verl's best@k/mean.

    With the scores in ascending order s_1 ... s_n it is the sum of s_i ((i/n)^k - ((i-1)/n)^k); of right and wrong,
    1 - (1 - c/n)^k. verl approximates this number by 1000 draws. A response may be drawn twice, so it is below pass@k,
    the more the nearer k is to n: with c = 1 of n = k = 32 it is 0.64 where pass@32 is 1.

    Args:
        scores: f64[P, n].
    Source: verl (commit b178a3cd), verl/trainer/ppo/metric_utils.py: bootstrap_metric, process_validation_metrics.
    """
    n = _samples(scores, k)
    below = np.arange(n + 1) / n
    return estimate(np.sort(scores, axis=1) @ np.diff(below**k))


def majority_at(votes: np.ndarray, k: int) -> Estimate:
    """maj@k: the chance that the most frequent answer of k different responses is the right one.

    The mean over all choices of k responses among the n, computed exactly; where answers tie for first place, one of
    them is drawn with equal chances. Responses without an answer do not vote; if none votes, the outcome is wrong.

    Args:
        votes: i64[P, n]; equal numbers are equal answers, RIGHT is the right one, NO_VOTE is none.
    Source: self-consistency, Wang et al. 2022, arXiv:2203.11171; maj1@k of Lewkowycz et al. 2022, arXiv:2206.14858.
    """
    _samples(votes, k)

    def chance(row):
        others = np.unique(row[(row != NO_VOTE) & (row != RIGHT)], return_counts=True)[1]
        return _majority(int(np.sum(row == RIGHT)), others.tolist(), int(np.sum(row == NO_VOTE)), k)

    return estimate(chance(row) for row in votes)


def _majority(right: int, others: list[int], silent: int, k: int) -> float:
    """The share of the choices of k votes in which the right answer wins; a tie of t + 1 answers counts 1 / (t + 1).

    For each number `wins` of right votes among the chosen: every other answer has fewer, or ties with as many.
    `ways[t, z]` weighs the choices of z votes among the other answers so far that tie t times. A weight is a number of
    choices times (k / n)^votes (1 - k / n)^(the rest): the numbers alone overflow from about a thousand votes on, and
    the factor is the same for every choice of k votes, so that it cancels at the end.
    """
    n = right + sum(others) + silent
    weights = {count: _binomial(count, k, n) for count in {right, *others, silent}}
    total = 0.0
    for wins in range(1, min(right, k) + 1):
        room = k - wins  # votes that are not right
        ways = np.zeros((min(room // wins, len(others)) + 1, room + 1))
        ways[0, 0] = 1.0
        for count in others:
            weight = weights[count]
            fewer = sum(weight[votes] * _shifted(ways, votes) for votes in range(min(count, wins - 1, room) + 1))
            if count >= wins:
                tied = weight[wins] * _shifted(ways, wins)
                fewer[1:] += tied[:-1]  # a tie more; the last row ties no further: no votes are left, or no answers
            ways = fewer
        ways = sum(weights[silent][votes] * _shifted(ways, votes) for votes in range(min(silent, room) + 1))
        shares = 1 / np.arange(1, len(ways) + 1)
        total += weights[right][wins] * float(shares @ ways[:, room])
    return total / _binomial(n, k, n)[k]


def _binomial(count: int, k: int, n: int) -> list[float]:
    """The chances of 0, 1, ..., count successes in as many trials of chance k / n; each correctly rounded."""
    return [comb(count, wins) * k**wins * (n - k) ** (count - wins) / n**count for wins in range(count + 1)]


def _shifted(ways: np.ndarray, votes: int) -> np.ndarray:
    """The same with so many votes more; those beyond the room are dropped."""
    moved = np.zeros_like(ways)
    if votes < ways.shape[1]:
        moved[:, votes:] = ways[:, : ways.shape[1] - votes]
    return moved


def _samples(rows: np.ndarray, k: int) -> int:
    """n, once k is seen to lie in 1 to n."""
    n = rows.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, but there are {n} responses to a problem; give 1 to {n}.")
    return n
