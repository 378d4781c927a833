"""Judges one response to a mathematics problem: find the answer, compare it with the reference answer."""

import functools

from dgpo_jax.rewards import exact
from dgpo_jax.rewards.exact import TOLERANCE
from dgpo_jax.rewards.extract import BOX_CAP, NESTING_CAP, find_answer, nesting
from dgpo_jax.rewards.normalise import is_words, normalise, same_choice, same_label, text_key
from dgpo_jax.rewards.units import clash
from dgpo_jax.types import Verdict

GOLD_CAP = 4096  # characters of a reference answer; a longer one is only compared as a string


def check(answer, response, extract="boxed", tolerance=TOLERANCE):
    """Checks a response in this process. Bounded work; `pool.VerifierPool` adds a deadline and a memory limit.

    Args:
        answer: the reference answer, LaTeX or plain.
        response: the whole text that was sampled. It is hostile: it is never evaluated, only parsed.
        extract: where the answer stands, one of extract.RULES.
        tolerance: relative, 0 <= tolerance < 1. The default is for decimals only, which must agree in their last place too;
            a larger one, for a set whose golds are rounded, holds for any two numbers, also within tuples and lists.
    Returns:
        Verdict; status "no_answer" if nothing was found, "unparsable" if what was found is not an answer that can be
        compared within the bounds.
    Raises:
        ValueError: an unknown rule, or a tolerance out of range.
    """
    extracted = find_answer(response, extract)
    if extracted is None:
        return Verdict("no_answer", None)
    status = quick_status(answer, extracted, tolerance) or slow_status(answer, extracted, tolerance)
    return Verdict(status, extracted[:BOX_CAP])


def quick_status(answer, extracted, tolerance=TOLERANCE):
    """The status where strings and exact numbers settle it, in microseconds; None where the parser is needed."""
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: {tolerance} must be at least 0 and below 1; it is relative, 0.01 is one percent.")
    if len(extracted) > BOX_CAP or nesting(extracted) > NESTING_CAP:
        return "unparsable"
    gold = _prepare_gold(answer)
    prediction = normalise(extracted)
    if not prediction:
        return "unparsable"
    if text_key(prediction) == gold.key:
        return "correct"
    if len(gold.text) > GOLD_CAP:
        return "unparsable"
    if same_choice(gold.text, prediction) or same_label(gold.text, prediction):
        return "correct"
    number = exact.read_number(prediction)
    if gold.number is not None and number is not None:
        same = exact.numbers_equal(gold.number, number, tolerance) and not clash(([], answer), ([], extracted))
        return "correct" if same else "wrong"
    if exact.differ_by_comma(prediction, gold.text):  # in a reference answer a comma makes a list
        return "correct"
    if is_words(gold.text) and is_words(prediction):
        return "wrong"
    return None


def slow_status(answer, extracted, tolerance=TOLERANCE):
    """The status by parsing both sides and comparing the trees."""
    import mpmath

    from dgpo_jax.rewards.equivalence import DIGITS, equivalent
    from dgpo_jax.rewards.parser import parse
    from dgpo_jax.rewards.tokens import UnparsableError, tokenize

    gold, prediction = _prepare_gold(answer).text, normalise(extracted)
    try:
        tree = parse(prediction)
        with mpmath.workdps(DIGITS):
            same = equivalent(parse(gold), tree, "\n".join(sorted((gold, prediction))), tolerance)
            same = same and not clash((tokenize(gold), answer), (tokenize(prediction), extracted))
    except UnparsableError:
        return "unparsable"
    return "correct" if same else "wrong"


class _Gold:
    """A reference answer, normalised once for the many responses that are compared with it."""

    def __init__(self, answer):
        boxed = find_answer(answer) if "\\boxed" in answer else None
        self.text = normalise(boxed or answer)
        self.key = text_key(self.text)
        self.number = exact.read_number(self.text)


_prepare_gold = functools.lru_cache(maxsize=4096)(_Gold)
