"""What a response is worth: a weighted sum of reward functions, named in the config.

    reward.functions = "answer + 0.1 * think - 0.2 * my_rewards:longwinded"

A name alone is one of BUILT_IN, or `answer`, which is the checker's verdict in the config's terms. MODULE:FUNCTION is
yours: a function of one `Sample` that returns a finite number. It is called in the trainer, once for every response, and must
depend on nothing else, or a run that is killed and goes on will not repeat itself:

    def longwinded(sample):
        return sample.tokens / 1000
"""

import difflib
import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dgpo_jax.types import Problem, Verdict

LARGEST = float(np.finfo(np.float32).max)
NGRAM = 20  # words: so many in a row, seen before in the same response, count as repeated


class Sample(NamedTuple):
    """A judged response, as a reward function sees it."""

    problem: Problem
    response: str  # the text, special tokens left out
    opening: str  # what the prompt began of it: "<think>" or nothing
    verdict: Verdict  # .status, .extracted, .correct, .score
    tokens: int  # its length, the stop token included
    truncated: bool  # it was cut off at the longest length allowed


RewardFunction = Callable[[Sample], float]


class Term(NamedTuple):
    """One summand."""

    name: str
    weight: float


def found(sample: Sample) -> float:
    """1 where there is an answer to be judged, right or wrong."""
    return float(sample.verdict.extracted is not None)


def think(sample: Sample) -> float:
    """1 for exactly one <think>, closed once, with something but blanks inside and after it."""
    text = sample.opening + sample.response
    if text.count("<think>") != 1 or text.count("</think>") != 1:
        return 0.0
    before, _, rest = text.partition("<think>")
    thought, _, after = rest.partition("</think>")
    return float(not before.strip() and bool(thought.strip()) and bool(after.strip()))


def repetition(sample: Sample) -> float:
    """Share of the response's runs of NGRAM words that it has said before, 0 to 1; give it a negative weight."""
    words = sample.response.split()
    runs = Counter(tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1))
    return 1 - len(runs) / runs.total() if runs else 0.0


BUILT_IN: dict[str, RewardFunction] = {"found": found, "think": think, "repetition": repetition}
ANSWER = "answer"

_TERM = re.compile(r"\s*(?:(?P<weight>\d+\.?\d*(?:[eE]-?\d+)?|\.\d+)\s*\*)?\s*(?P<name>[A-Za-z_][\w.]*(?::[A-Za-z_]\w*)?)\s*")


def parse_formula(text: str) -> list[Term]:
    """Reads "answer + 0.1 * think - my_rewards:longwinded".

    Raises:
        ValueError: it is no such sum, or names a function twice.
    """
    terms, sign, rest = [], 1.0, text.strip()
    if rest.startswith("-"):
        sign, rest = -1.0, rest[1:]
    while True:
        match = _TERM.match(rest)
        if match is None:
            raise ValueError(
                f"reward.functions is {text!r}, but {rest[:40]!r} is no term; write 'answer + 0.1 * think - my_rewards:length'."
            )
        weight = float(match["weight"] or 1)
        if weight > LARGEST:
            raise ValueError(f"reward.functions is {text!r}, but the weight {match['weight']} is beyond float32; lower it.")
        terms.append(Term(match["name"], sign * weight))
        rest = rest[match.end() :]
        if not rest:
            break
        if rest[0] not in "+-":
            raise ValueError(f"reward.functions is {text!r}, but before {rest[:40]!r} there must be + or -; put one there.")
        sign, rest = (1.0 if rest[0] == "+" else -1.0), rest[1:]
    twice = [name for name, count in Counter(term.name for term in terms).items() if count > 1]
    if twice:
        raise ValueError(f"reward.functions is {text!r}, but {twice[0]!r} is there twice; add the weights up.")
    return terms


def load_functions(terms: Iterable[Term], answer: RewardFunction) -> dict[str, RewardFunction]:
    """The function of every term.

    Args:
        answer: what the name "answer" means.
    Raises:
        ValueError: a name that is not built in, a module that cannot be imported, or no function in it.
    """
    return {term.name: answer if term.name == ANSWER else _load(term.name) for term in terms}


def _load(name):
    if ":" not in name:
        if name not in BUILT_IN:
            names = [ANSWER, *BUILT_IN]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"perhaps {near[0]!r}; " if near else ""
            raise ValueError(f"reward.functions: {name!r} is not one of {', '.join(names)}; {hint}or give MODULE:FUNCTION.")
        return BUILT_IN[name]
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # it is the user's own Python, so anything can come out of it
        raise ValueError(f"reward.functions: module {module_name!r} cannot be imported ({type(error).__name__}: {error}).") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"reward.functions: {module_name} ({getattr(module, '__file__', '?')}) has no function {function_name!r}.")
    return function


def values_of(functions: dict[str, RewardFunction], samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """f32[B] of every function.

    Raises:
        ValueError: one returned something that is not a finite number, or raised.
    """
    return {name: np.array([_call(name, function, sample) for sample in samples], np.float32) for name, function in functions.items()}


def _call(name, function, sample):
    about = f"reward function {name} on a response to problem {sample.problem.id}"
    try:
        value = function(sample)
    except Exception as error:
        raise ValueError(f"{about} raised {type(error).__name__}: {error}; mend it, the same command goes on.") from error
    if isinstance(value, (bool, int, float, np.integer, np.floating, np.bool_)) and abs(value) <= LARGEST:  # NaN is not
        return float(value)
    raise ValueError(f"{about} returned {value!r}; it must return a finite number.")


def total(terms: Iterable[Term], values: dict[str, np.ndarray]) -> np.ndarray:
    """f32[B]: the weighted sum."""
    return np.sum([np.float32(term.weight) * values[term.name] for term in terms], axis=0, dtype=np.float32)
