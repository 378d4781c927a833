"""Test cases of coding problems: the JSON they come as, and when an output is the expected one. No program runs here.

Two forms, as in APPS, LiveCodeBench, TACO, and the data of Klear and PRIME:

    {"inputs": ["3 4\\n"], "outputs": ["7\\n"]}                            text on standard input, text on standard output
    {"fn_name": "add", "inputs": [[3, 4]], "outputs": [7]}               lists of arguments, values returned
"""

import functools
import json
import keyword
import math
import re
from typing import Any, NamedTuple

from dgpo_jax.rewards.sandbox import OUTPUT_CAP

TOLERANCE = 1e-6  # between decimals: absolute up to 1, relative beyond
SHORT_REPORT = 2**16  # bytes of JSON that are read in no time, whatever they hold
LONGEST_SPELLING = 32  # times as long as the expected one at most: a float, such as -1.2345678901234567e-07, for a digit
PARSED_KEPT = 64  # a group's responses share their tests, which may be megabytes of JSON
KEYS = ("inputs", "outputs", "fn_name", "time_limit")
# Longer ones are compared as text.
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][-+]?[0-9]{1,4})?")


class Tests(NamedTuple):
    """The test cases of one problem."""

    __test__ = False  # for pytest, which takes any class of this name for tests of its own

    inputs: list[Any]  # str, or a list of arguments
    outputs: list[Any]  # str, or the value returned
    fn_name: str | None  # None = stdin/stdout form
    time_limit: float | None  # CPU seconds per test case; None = the pool's


@functools.lru_cache(maxsize=PARSED_KEPT)
def parse_tests(text, where="tests"):
    """Tests of their JSON. `where` is what an error calls them: the problem's id.

    Raises:
        ValueError: malformed; gives the value, the rule and the fix.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {_short(text)} is not JSON ({error}); give an object with inputs and outputs.") from error
    _require(isinstance(data, dict), where, data, "test cases are a JSON object", 'give {"inputs": [...], "outputs": [...]}')
    data = {key: value for key, value in data.items() if value is not None}
    unknown = sorted(set(data) - set(KEYS))
    _require(not unknown, where, unknown, f"the keys are {', '.join(KEYS)}", "rename or remove the others")
    for key in ("inputs", "outputs"):
        value = data.get(key)
        rule = "there is a list with an entry per test case"
        _require(isinstance(value, list) and value, f"{where}: {key}", value, rule, "give at least one")
    inputs, outputs = data["inputs"], data["outputs"]
    sizes = (len(inputs), len(outputs))
    _require(sizes[0] == sizes[1], where, sizes, "there are as many inputs as outputs", "drop or add what is odd")
    name, limit = data.get("fn_name"), data.get("time_limit")
    is_name = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
    _require(name is None or is_name, f"{where}: fn_name", name, "it names a Python function", "correct it, or leave it out")
    is_limit = isinstance(limit, int | float) and not isinstance(limit, bool) and 0 < limit < float("inf")
    is_limit = limit is None or is_limit
    _require(is_limit, f"{where}: time_limit", limit, "it is CPU seconds per test case", "give a number above 0")
    read = _read_texts if name is None else _read_call
    pairs = [read(f"{where}: test case {i}", *pair) for i, pair in enumerate(zip(inputs, outputs, strict=True))]
    return Tests([pair[0] for pair in pairs], [pair[1] for pair in pairs], name, limit)


def _read_texts(where, given, expected):
    """A text each; a list of lines will do."""
    texts = ["\n".join(v) if isinstance(v, list) and all(isinstance(line, str) for line in v) else v for v in (given, expected)]
    for text in texts:
        rule = "input and output of the stdin/stdout form are texts"
        _require(isinstance(text, str), where, text, rule, "quote them, or give fn_name")
    size = len(texts[1].encode(errors="replace"))
    _require(size <= OUTPUT_CAP, where, f"{size} bytes", f"programs may write {OUTPUT_CAP} bytes", "drop this test case")
    return texts


def _read_call(where, given, expected):
    """Arguments and value; LiveCodeBench has both as text, with a line of JSON for each argument."""
    if isinstance(given, str):
        try:
            given = [json.loads(line) for line in given.split("\n") if line.strip()]
            expected = json.loads(expected) if isinstance(expected, str) else expected
        except (ValueError, RecursionError) as error:
            pair = _short([given, expected])
            raise ValueError(f"{where}: {pair} is not a line of JSON per argument ({error}); give a list.") from error
    rule = "input of the function-call form is a list of arguments"
    _require(isinstance(given, list), where, given, rule, "put it in brackets")
    return given, expected


def _require(condition, name, value, rule, fix):
    if not condition:
        raise ValueError(f"{name} is {_short(value)}, but {rule}; {fix}.")


def _short(value):
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def is_right(tests, number, output):
    """True if `output`, the bytes that the sandbox reported, is what test case `number` expects."""
    expected = tests.outputs[number]
    if tests.fn_name is None:
        return same_text(output.decode(errors="replace"), expected)
    if len(output) > SHORT_REPORT and len(output) > LONGEST_SPELLING * len(json.dumps(expected)):
        return False  # it cannot be equal, and to read it would take the trainer's time
    try:
        value = json.loads(output)
    except (ValueError, RecursionError):  # never from a program that returns; hostile ones may write what they like
        return False
    wrapped = isinstance(expected, list) and len(expected) == 1  # APPS writes the value 7 as [7]
    try:
        return same_value(value, expected) or (wrapped and same_value(value, expected[0]))
    except RecursionError:  # a value nested as deep as the program pleased
        return False


def same_value(value, expected):
    """Equality as Python's, except that a float is compared within TOLERANCE, and tuples are lists (JSON has no others)."""
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(same_value(value[key], expected[key]) for key in expected)
    numbers = isinstance(value, int | float) and isinstance(expected, int | float)
    if numbers and (isinstance(value, float) or isinstance(expected, float)):
        return _is_close(value, expected)
    return value == expected


def same_text(text, expected):
    """True if the texts are equal token by token, which they are where their lines are equal.

    Tokens are what blanks and line ends separate. Two are equal if they are the same characters, or if the expected one
    is a decimal (with a point or an exponent) and the other is a number within TOLERANCE of it.
    """
    if text.strip() == expected.strip():
        return True
    wanted = expected.split()
    tokens = text.split(maxsplit=len(wanted))  # of a text with more than that, the rest is one piece: a program's megabytes are the trainer's time
    return len(tokens) == len(wanted) and all(one == other or _same_decimal(one, other) for one, other in zip(tokens, wanted, strict=True))


def _same_decimal(token, expected):
    is_decimal = any(mark in expected for mark in ".eE") and _NUMBER.fullmatch(expected)
    return bool(is_decimal and _NUMBER.fullmatch(token)) and _is_close(float(token), float(expected))


def _is_close(value, expected):
    try:
        finite = math.isfinite(value) and math.isfinite(expected)
        return value == expected or (finite and abs(value - expected) <= TOLERANCE * max(1.0, abs(expected)))
    except OverflowError:  # an integer beyond any float
        return False
