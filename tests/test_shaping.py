"""Rewards for length and form, by hand."""

import numpy as np
import pytest

from dgpo_jax.rewards.shaping import format_reward, overlong_penalty


@pytest.mark.parametrize("length, expected", [
    (0, 0.0),
    (79, 0.0),
    (80, 0.0),  # 100 - 20: the last without a penalty
    (81, -0.025),  # 1 / 20 of a half
    (90, -0.25),
    (100, -0.5),  # the whole factor
])  # fmt: skip
def test_the_penalty_grows_over_the_buffer(length, expected):
    penalty = overlong_penalty([length], max_response=100, buffer=20, factor=0.5)
    assert penalty.dtype == np.float32
    assert penalty[0] == np.float32(expected)
    assert not (expected == 0 and np.signbit(penalty[0]))  # no -0.0 in tables of rewards


def test_the_ends_are_exact_at_the_lengths_of_dapo():
    penalty = overlong_penalty([16_384, 18_432, 20_480], max_response=20_480, buffer=4096, factor=0.3)
    np.testing.assert_array_equal(penalty, np.array([0, -0.15, -0.3], np.float32))


def test_no_buffer_is_no_penalty():
    np.testing.assert_array_equal(overlong_penalty([0, 99, 100], max_response=100, buffer=0, factor=1.0), 0)


def test_a_buffer_of_the_whole_response_starts_at_its_first_token():
    penalty = overlong_penalty([0, 1, 4], max_response=4, buffer=4, factor=1.0)
    np.testing.assert_array_equal(penalty, [0, -0.25, -1])


@pytest.mark.parametrize("buffer", [-1, 101])
def test_a_buffer_that_does_not_fit_is_refused(buffer):
    with pytest.raises(ValueError, match=f"the buffer is {buffer} tokens; it must be from 0 to max_response, 100"):
        overlong_penalty([1], max_response=100, buffer=buffer, factor=1.0)


PLAIN = "<|User|>2 + 2?<|Assistant|>"  # the template leaves it to the model to open <think>
OPENED = PLAIN + "<think>\n"  # R1-Distill's opens it


@pytest.mark.parametrize("prompt_end, response, expected", [
    (PLAIN, "<think>\n2 + 2</think>\\boxed{4}", None),
    (OPENED, "2 + 2</think>\\boxed{4}", None),
    (PLAIN + "<think>", "</think>\\boxed{4}", None),  # no blank after it
    (OPENED, "<think>2 + 2</think>\\boxed{4}", None),  # opened twice
    (OPENED, "2 + 2 and 2 + 2 and", -0.5),  # cut off
    (PLAIN, "<think>\n2 + 2 and", -0.5),
    (PLAIN, "\\boxed{4}", -0.5),  # lacks both: </think> is looked at first
    (PLAIN, "2 + 2</think>\\boxed{4}", -2.0),
    (OPENED, "", -0.5),
    (PLAIN, "</think>\\boxed{4}<think>", None),  # in the wrong order: only presence is checked, as in Klear's code
    (OPENED, "</think><think>again", None),  # opened again: the answer decides, and the extractor finds none
    ("<|User|>What does <think> do?<|Assistant|>", "It opens.</think>\\boxed{4}", -2.0),  # not the model's
    ("<|User|>What does </think> do?<|Assistant|><think>\n", "It closes \\boxed{4}", -0.5),
    ("<think></think>", "2 + 2</think>\\boxed{4}", -2.0),  # opened and closed again by the prompt
    (PLAIN, "<THINK>2 + 2</THINK>\\boxed{4}", -0.5),  # not the tags
])  # fmt: skip
def test_a_response_that_lacks_a_tag_gets_the_reward_of_that(prompt_end, response, expected):
    assert format_reward(prompt_end, response, no_think_end=-0.5, no_think_start=-2.0) == expected


@pytest.mark.parametrize("response, no_think_end, no_think_start, expected", [
    ("\\boxed{4}", None, -2.0, -2.0),  # the end is not checked, so the start is
    ("<think>\\boxed{4}", None, -2.0, None),
    ("2 + 2</think>\\boxed{4}", -0.5, None, None),
    ("\\boxed{4}", None, None, None),
    ("\\boxed{4}", 0.0, None, 0.0),  # a reward of 0 is one
])  # fmt: skip
def test_a_check_without_a_reward_is_off(response, no_think_end, no_think_start, expected):
    assert format_reward(PLAIN, response, no_think_end=no_think_end, no_think_start=no_think_start) == expected
