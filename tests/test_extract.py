"""Which string of a response counts as its answer."""

import time

import pytest

from dgpo_jax.rewards.extract import TEXT_CAP, find_answer


@pytest.mark.parametrize("response, expected", [
    (r"so \boxed{4}", "4"),
    (r"maybe \boxed{41}, no: \boxed{42}.", "42"),  # the last one wins, and the two are never joined into a set
    (r"\boxed{42} or perhaps \boxed{", "42"),  # the last *balanced* one: the response was cut off inside the next
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),  # inner braces belong to the answer
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),  # escaped braces do not count as nesting
    (r"\boxed{\boxed{7}}", r"\boxed{7}"),  # the outer one closes last
    (r"\fbox{7}", "7"),
    (r"\boxed {5}", "5"),
    (r"put it in \boxed at the end: \boxed{3}", "3"),  # the bare command is no answer
    ("} stray { braces } \\boxed{6} }}}", "6"),
    (r"\boxed{5", None),  # never closes
    (r"\boxed{}", None),
    (r"\boxed{  }", None),
    (r"\boxed", None),
    ("the answer is 5", None),  # this rule reads boxes only
    ("", None),
])
def test_the_last_balanced_box_is_the_answer(response, expected):
    assert find_answer(response) == expected


@pytest.mark.parametrize("response, expected", [
    (r"<think>\boxed{1}</think>\boxed{2}", "2"),
    (r"\boxed{1}</think>\boxed{2}", "2"),  # the prompt opened <think>
    (r"<think>\boxed{1}</think> so it is one", None),  # an answer that was only thought was not given
    (r"<think>\boxed{1}", None),  # still thinking when the tokens ran out
    (r"<think>a</think>\boxed{1}<think>wait, \boxed{2}", None),  # opened again, never closed
    (r"<think>a</think>b</think>\boxed{3}", "3"),  # after the last closing tag
    (r"\boxed{4}", "4"),  # a model that does not think aloud
])
def test_only_text_after_thinking_counts(response, expected):
    assert find_answer(response) == expected


@pytest.mark.parametrize("response, rule, expected", [
    ("6 * 12 = 72\n#### 72", "marked", "72"),
    ("#### 1\n#### 2", "marked", "2"),
    (r"#### 1 but \boxed{2}", "marked", "2"),  # a box beats every other mark
    ("The answer is 42. I hope it is correct.", "marked", "42"),
    ("Final Answer: The final answer is $14$. Good.", "marked", "14"),  # the innermost mark, between its dollar signs
    ("Answer: 41 is wrong.\nAnswer: 3.5", "marked", "3.5"),  # a decimal point does not end the sentence
    ("**Final answer:**\n\n12", "marked", "12"),
    ("that makes 72", "marked", None),
    ("we saw 10, then 1,200 apples", "last", "1,200"),
    ("half: 1/2 of them", "last", "1/2"),
    ("answer is 3, not 4", "last", "3, not 4"),  # marks come first, even where they lead to nonsense
    ("no numbers", "last", None),
])
def test_weaker_rules_take_over_only_where_stronger_ones_find_nothing(response, rule, expected):
    assert find_answer(response, rule) == expected


def test_an_unknown_rule_is_refused_with_the_rules_there_are():
    with pytest.raises(ValueError, match="'box' is not a rule; use one of boxed, marked, last"):
        find_answer("x", "box")


@pytest.mark.parametrize("response", [
    r"\boxed{" * 100_000,
    r"\boxed{1} " * 100_000,
    "{" * 1_000_000,
    "\\boxed" + " " * 1_000_000,
    "answer " * 100_000,
    "1 " * 300_000,
    r"\boxed{" + "9" * 1_000_000 + "}",
    "<think>" * 100_000,
])
@pytest.mark.parametrize("rule", ["boxed", "last"])
def test_hostile_text_is_scanned_in_linear_time(response, rule):
    started = time.perf_counter()
    find_answer(response, rule)
    assert time.perf_counter() - started < 1.0


def test_a_box_before_a_long_tail_is_still_found():
    assert find_answer(r"\boxed{5" + "}" * (2 * TEXT_CAP)) == "5"
