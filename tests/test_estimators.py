"""Figures of n responses to each problem: by hand, and against counting every choice there is."""

import itertools
import math

import numpy as np
import pytest

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

RIGHT_OF_4 = np.array([[True, False, False, False], [True, True, True, False], [False] * 4, [True] * 4])
VOTES = [  # of six responses; letters in the comments are wrong answers
    [RIGHT, RIGHT, 1, 1, 2, NO_VOTE],  # right and A tie, B has one, one is silent
    [RIGHT, 1, 1, 1, 2, 2],
    [1, 2, 3, 4, RIGHT, 5],  # six that all tie
    [NO_VOTE] * 5 + [RIGHT],  # a single vote, and it is right
    [NO_VOTE] * 6,
    [RIGHT] * 6,
    [1] * 6,
    [RIGHT, RIGHT, RIGHT, 1, 1, 1],
    [RIGHT, RIGHT, 1, 1, 2, 2],  # three that tie
]


def test_a_mean_has_the_standard_error_of_its_problems():
    # Mean 1/4 of 0, 0, 0, 1; squared distances 3/16 + 9/16 = 3/4 over P - 1 = 3: sd is 1/2, the error 1/2 / sqrt(4).
    assert estimate([0, 0, 0, 1]) == Estimate(0.25, 0.25)
    assert estimate([0.5]) == Estimate(0.5, None)  # one problem says nothing of others
    assert estimate([1, 1, 1]) == Estimate(1.0, 0.0)
    with pytest.raises(ValueError, match="no problems"):
        estimate([])


@pytest.mark.parametrize("n, expected", [
    (0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (32, [1, 2, 4, 8, 16, 32]),
    (48, [1, 2, 4, 8, 16, 32, 48]),  # not a power of two: n itself is reported all the same
])  # fmt: skip
def test_k_runs_over_powers_of_two_up_to_n(n, expected):
    assert powers_of_two(n) == expected


def test_the_average_is_over_samples_and_then_over_problems():
    scores = np.array([[1.0, 0.5], [0.0, 0.0]])  # means 3/4 and 0
    assert average(scores) == Estimate(0.375, pytest.approx(0.375))  # sd of 3/4 and 0 is 3/4 / sqrt(2), over sqrt(2)


@pytest.mark.parametrize("k, expected", [
    (1, (1 / 4 + 3 / 4 + 0 + 1) / 4),
    (2, (1 / 2 + 1 + 0 + 1) / 4),  # 1 - C(3,2)/C(4,2) = 1 - 3/6; with 3 of 4 right no two are wrong
    (4, 3 / 4),  # one right of four is enough
])  # fmt: skip
def test_pass_at_k_by_hand(k, expected):
    assert pass_at(RIGHT_OF_4, k).value == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(k):
    correct = np.random.default_rng(0).random((8, 6)) < 0.3
    counted = [np.mean([any(chosen) for chosen in itertools.combinations(row, k)]) for row in correct]
    assert pass_at(correct, k) == pytest.approx(estimate(counted), abs=1e-12)


def test_pass_at_k_stays_exact_where_floats_would_overflow():
    correct = np.zeros((1, 4096), bool)
    correct[0, 7] = True
    assert pass_at(correct, 2048).value == 0.5  # the right one is among a random half; C(4096, 2048) has 1232 digits


@pytest.mark.parametrize("k", range(1, 5))
def test_best_at_k_is_the_mean_over_draws_with_replacement(k):
    scores = np.array([[0.0, 0.25, 0.25, 1.0], [0.5, 0.0, 0.0, 0.0]])
    counted = [np.mean([max(drawn) for drawn in itertools.product(row, repeat=k)]) for row in scores]
    assert best_at(scores, k) == pytest.approx(estimate(counted), abs=1e-12)


def test_best_at_k_of_right_and_wrong_lies_below_pass_at_k():
    scores = np.zeros((1, 32))
    scores[0, 0] = 1.0
    assert best_at(scores, 32).value == pytest.approx(1 - (31 / 32) ** 32, abs=1e-12)  # 0.638
    assert pass_at(scores > 0, 32).value == 1.0


def test_best_at_k_is_what_verls_bootstrap_approximates():
    # verl/trainer/ppo/metric_utils.py, bootstrap_metric: 1000 draws with replacement, numpy's generator seeded with 42.
    scores = np.random.default_rng(1).random(16) * (np.random.default_rng(2).random(16) < 0.5)
    state = np.random.RandomState(42)  # what np.random.seed(42) sets up
    drawn = np.max(scores[state.choice(16, size=(1000, 8), replace=True)], axis=1)
    assert best_at(scores[None], 8).value == pytest.approx(drawn.mean(), abs=4 * drawn.std() / math.sqrt(1000))
    assert drawn.std() > 0.01  # so the bound above is one


@pytest.mark.parametrize("row", VOTES)
@pytest.mark.parametrize("k", range(1, 7))
def test_the_majority_is_counted_over_every_choice(row, k):
    counted = np.mean([winning_chance(chosen) for chosen in itertools.combinations(row, k)])
    assert majority_at(np.array([row]), k).value == pytest.approx(counted, abs=1e-12)


def winning_chance(votes):
    """1 over the number of answers that share first place, if the right one is among them."""
    counts = [votes.count(answer) for answer in set(votes) - {NO_VOTE}]
    right = votes.count(RIGHT)
    return 1 / counts.count(max(counts)) if right and right == max(counts) else 0.0


@pytest.mark.parametrize("right, wrong, expected", [
    (700, 700, 0.5),  # nothing tells the two answers apart
    (1, 1399, 0.0),
    (1399, 1, 1.0),
])  # fmt: skip
def test_the_majority_of_more_votes_than_a_float_can_count_choices_of(right, wrong, expected):
    row = np.array([[RIGHT] * right + [1] * wrong])  # C(1400, 700) has 420 digits, a float ends at 308
    assert majority_at(row, 700).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("row, k, expected", [
    ([RIGHT, RIGHT, 1, 1, 2, NO_VOTE], 6, 1 / 2),  # two answers with two votes each
    ([RIGHT, RIGHT, 1, 1, 2, 2], 6, 1 / 3),
    ([RIGHT, 1, 1, 1, 2, 2], 1, 1 / 6),  # of one vote: the chance that it is the right one
    ([RIGHT, 1, 1, 1, 2, 2], 6, 0),
    ([NO_VOTE] * 5 + [RIGHT], 6, 1),  # the silent do not outvote it
    ([NO_VOTE] * 5 + [RIGHT], 3, 1 / 2),  # C(5,2) / C(6,3) of the choices contain it
])  # fmt: skip
def test_the_majority_by_hand(row, k, expected):
    assert majority_at(np.array([row]), k).value == pytest.approx(expected, abs=1e-12)


def test_the_majority_of_one_is_a_single_sample():
    votes = np.array(VOTES)
    assert majority_at(votes, 1) == pytest.approx(pass_at(votes == RIGHT, 1), abs=1e-12)


def test_large_groups_of_votes_are_counted_exactly_and_soon():
    # 64 responses: 20 right, the others all different. Any 32 with two right ones or more have the right majority; a
    # single right one ties with 31 others, of which one is drawn.
    votes = np.array([[RIGHT] * 20 + list(range(1, 45))])
    none, one = math.comb(44, 32), 20 * math.comb(44, 31)
    expected = 1 - (none + one * 31 / 32) / math.comb(64, 32)
    assert majority_at(votes, 32).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("figure", [pass_at, best_at, majority_at])
@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_1_to_n_is_refused(figure, k):
    with pytest.raises(ValueError, match=f"k is {k}, but there are 4 responses"):
        figure(np.zeros((2, 4), int), k)
