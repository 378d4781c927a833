"""A small set of coding problems, for trying a run out: nothing to download, and a held-out set that never overlaps.

Each of TEMPLATES has a reference solution with a number `k` in it. A problem is one template with one k, asked for in one
of two forms: a program that reads its input and prints, or a function. Its tests are what the reference returns for drawn
arguments, so they are right by construction, and its worked solution is the reference as a response.
"""

import json
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dgpo_jax.data.generated import SPLITS, TRIES, check_choice, split_of
from dgpo_jax.data.rows import LazyProblems
from dgpo_jax.types import Problem

SOURCE = "builtin:coding"
NUMBERS = range(2, 10)  # what k may be
FORMS = ("stdin", "call")
TESTS = (6, 10)  # test cases of a problem, fewest and most
_LETTERS = "abcde"


class Template(NamedTuple):
    """One kind of problem."""

    name: str  # of the function
    takes: str  # a key of _ARGUMENTS
    what: str  # the value asked for, after "returns" or "Print"; with {k}
    body: str  # of the reference, which has the argument's name for its own; K stands for the number


_ARGUMENTS = {  # kind: (name, as a function's argument, as a line of input, how a program reads it)
    "numbers": ("numbers", "a list of integers", "a line of integers separated by blanks", "[int(word) for word in input().split()]"),
    "n": ("n", "a positive integer", "a line with a positive integer n", "int(input())"),
    "word": ("word", "a string of lower-case letters", "a line with a word of lower-case letters", "input().strip()"),
}

TEMPLATES = (
    Template("sum_scaled", "numbers", "the sum of the numbers, times {k}", "return sum(numbers) * K"),
    Template("sum_of_multiples", "numbers", "the sum of those numbers that are divisible by {k}", "return sum(x for x in numbers if x % K == 0)"),
    Template("count_above", "numbers", "how many of the numbers are greater than {k}", "return sum(1 for x in numbers if x > K)"),
    Template("add_to_each", "numbers", "the numbers in their order, {k} added to each", "return [x + K for x in numbers]"),
    Template("times_each", "numbers", "the numbers in their order, each times {k}", "return [x * K for x in numbers]"),
    Template("remainders", "numbers", "the remainder of each number divided by {k}, in order", "return [x % K for x in numbers]"),
    Template("keep_below", "numbers", "those numbers that are less than {k}, in their order", "return [x for x in numbers if x < K]"),
    Template("drop_multiples", "numbers", "those numbers that are not divisible by {k}, in their order", "return [x for x in numbers if x % K]"),
    Template("every_other", "numbers", "every {k}th number, starting with the first", "return numbers[::K]"),
    Template("first_few", "numbers", "the first {k} numbers, or all if there are fewer", "return numbers[:K]"),
    Template("last_few", "numbers", "the last {k} numbers, or all if there are fewer", "return numbers[-K:]"),
    Template("rotate", "numbers", "the numbers with the first one moved to the end, {k} times over", "shift = K % len(numbers)\nreturn numbers[shift:] + numbers[:shift]"),
    Template("largest_few", "numbers", "the {k} largest numbers, largest first, or all if there are fewer", "return sorted(numbers, reverse=True)[:K]"),
    Template("smallest_few", "numbers", "the {k} smallest numbers, smallest first, or all if there are fewer", "return sorted(numbers)[:K]"),
    Template("clip", "numbers", "the numbers in their order, each greater than {k} replaced by {k}", "return [min(x, K) for x in numbers]"),
    Template("contains", "numbers", "yes if {k} is one of the numbers, else no", 'return "yes" if K in numbers else "no"'),
    Template("any_multiple", "numbers", "yes if one of the numbers is divisible by {k}, else no", 'return "yes" if any(x % K == 0 for x in numbers) else "no"'),
    Template("spread", "numbers", "{k} times the difference between the largest and the smallest number", "return K * (max(numbers) - min(numbers))"),
    Template("near_pairs", "numbers", "how many pairs of neighbours differ by less than {k}", "return sum(1 for x, y in zip(numbers, numbers[1:]) if abs(x - y) < K)"),
    Template("running_sums", "numbers", "the sum of the first number, of the first two, and so on up to all, {k} added to each", "sums = []\ntotal = K\nfor x in numbers:\n    total += x\n    sums.append(total)\nreturn sums"),
    Template("power", "n", "n to the power of {k}", "return n ** K"),
    Template("linear", "n", "{k} times n, plus 1", "return K * n + 1"),
    Template("remainder", "n", "the remainder of n divided by {k}", "return n % K"),
    Template("quotient", "n", "how often {k} goes into n", "return n // K"),
    Template("is_multiple", "n", "yes if n is divisible by {k}, else no", 'return "yes" if n % K == 0 else "no"'),
    Template("multiples_up_to", "n", "how many of the numbers from 1 to n are divisible by {k}", "return sum(1 for x in range(1, n + 1) if x % K == 0)"),
    Template("sum_up_to", "n", "the sum of the numbers from 1 to n, times {k}", "return K * n * (n + 1) // 2"),
    Template("table", "n", "the first {k} multiples of n, starting with n", "return [n * i for i in range(1, K + 1)]"),
    Template("count_down", "n", "the numbers n, n - {k}, n - {k} - {k} and so on, as long as they are positive", "return list(range(n, 0, -K))"),
    Template("count_digit", "n", "how often the digit {k} occurs in n", "return str(n).count(str(K))"),
    Template("to_base", "n", "the sum of the digits of n written in base {base}", "total = 0\nwhile n:\n    total += n % (K + 1)\n    n //= K + 1\nreturn total"),
    Template("halve", "n", "how often n can be divided by {k} without a remainder", "times = 0\nwhile n % K == 0:\n    n //= K\n    times += 1\nreturn times"),
    Template("repeat", "word", "the word written {k} times without gaps", "return word * K"),
    Template("first_letters", "word", "the first {k} letters of the word, or all if there are fewer", "return word[:K]"),
    Template("skip_letters", "word", "every {k}th letter of the word, starting with the first", "return word[::K]"),
    Template("longer_than", "word", "yes if the word has more than {k} letters, else no", 'return "yes" if len(word) > K else "no"'),
    Template("length_scaled", "word", "{k} times the number of letters of the word", "return K * len(word)"),
    Template("pad", "word", "the word followed by as many stars as make it {k} characters long, or unchanged if it is as long already", 'return word + "*" * (K - len(word))'),
    Template("frequent", "word", "the number of different letters that occur at least {few} times in the word", "few = K % 3 + 1\nreturn sum(1 for letter in set(word) if word.count(letter) >= few)"),
    Template("backwards", "word", "the word backwards, written {k} times with a dash between", 'return "-".join([word[::-1]] * K)'),
)  # fmt: skip


class CodingProblems(LazyProblems):
    """`size` problems of a split; item i is a pure function of (split, seed, i).

    The splits share no (template, k) pair, whatever the seeds; repeats are possible once size nears the number of pairs,
    285 for train and 35 for test, in two forms each.

    Args:
        kinds: names of TEMPLATES with commas between them; "" = all.
        slips: share of the worked solutions that are right for another number.
        unmarked: share of the worked solutions whose program is in no fenced block. Such a careless teacher makes a warm
            start that leaves something to learn.

    Raises:
        ValueError: a setting outside these rules.
    """

    def __init__(self, split, size, seed=0, kinds="", slips=0.0, unmarked=0.0):
        check_choice("split", split, SPLITS)
        chosen = [name.strip() for name in kinds.split(",")] if kinds else [template.name for template in TEMPLATES]
        for name in chosen:
            check_choice("kinds of coding problems", name, [template.name for template in TEMPLATES])
        if size < 1:
            raise ValueError(f"size {size} of {SOURCE} is below 1; ask for at least one problem.")
        if seed < 0:
            raise ValueError(f"seed {seed} is negative; use 0 or more.")
        for name, share in (("slips", slips), ("unmarked", unmarked)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} {share} of {SOURCE} is a share; give 0 to 1.")
        self.split, self.size, self.seed, self.slips, self.unmarked = split, size, seed, slips, unmarked
        pairs = [(template, k) for template in TEMPLATES if template.name in chosen for k in NUMBERS]
        self.pairs = [(template, k) for template, k in pairs if split_of(f"coding/{template.name}/{k}") == split]
        if not self.pairs:
            raise ValueError(f"{SOURCE}/{split} has no problem of the kinds {kinds!r}; name more of them.")

    def __len__(self):
        return self.size

    def read(self, index):
        """Problem number `index`."""
        # Goes through all pairs, in another order each time, before one comes again.
        epoch, place = divmod(index, len(self.pairs))
        order = _generator(self.seed, SPLITS.index(self.split), epoch).permutation(len(self.pairs))
        random = _generator(self.seed, SPLITS.index(self.split), epoch, place)
        template, k = self.pairs[order[place]]
        form, identity = FORMS[random.integers(len(FORMS))], f"coding-{self.split}-{self.seed}-{index}"
        return make_problem(template, k, form, identity, random, self.slips, self.unmarked)


def coding_problems(
    split: str, size: int, seed: int = 0, kinds: str = "", slips: float = 0.0, unmarked: float = 0.0
) -> Sequence[Problem]:
    """The built-in set; see CodingProblems."""
    return CodingProblems(split, size, seed, kinds, slips, unmarked)


def make_problem(template, k, form, identity, random, slips=0.0, unmarked=0.0):
    """One Problem. `random` is a numpy Generator, which draws the arguments of the tests."""
    name, as_argument, as_line, read = _ARGUMENTS[template.takes]
    source = reference(template, k)
    function = load(source, template.name)
    drawn, values = draw_tests(template, function, random)
    taught = source
    if random.random() < slips:
        taught = reference(template, random.choice([other for other in NUMBERS if other != k]))
    what = template.what.format(k=k, base=k + 1, few=k % 3 + 1)
    if form == "call":
        tests = {"fn_name": template.name, "inputs": [[argument] for argument in drawn], "outputs": values}
        text = f"Write a Python function {template.name}({name}). Its argument is {as_argument}. It returns {what}."
        example = f"{template.name}({drawn[0]!r}) returns {values[0]!r}."
        program = taught
    else:
        tests = {"inputs": [f"{as_text(argument)}\n" for argument in drawn], "outputs": [f"{as_text(value)}\n" for value in values]}
        text = f"Write a Python program. Its input is {as_line}. Print {what}{', separated by blanks' if isinstance(values[0], list) else ''}."
        example = f"For the input\n{as_text(drawn[0])}\nit prints\n{as_text(values[0])}"
        print_it = "print(*result)" if isinstance(values[0], list) else "print(result)"
        program = f"{taught}\n\n{name} = {read}\nresult = {template.name}({name})\n{print_it}\n"
    return Problem(
        id=identity, problem=f"{text}\nExample: {example}", answer="", source=SOURCE, checker="code", tests=json.dumps(tests),
        solution=program.strip() if random.random() < unmarked else f"```python\n{program.strip()}\n```",
    )  # fmt: skip


def draw_tests(template, function, random):
    """Arguments and values of the test cases; at least two values differ, or a program that prints one word would do."""
    count = random.integers(TESTS[0], TESTS[1] + 1)
    for _ in range(TRIES):
        drawn = [draw(template.takes, random) for _ in range(count)]
        values = [function(argument) for argument in drawn]
        if any(value != values[0] for value in values):
            return drawn, values
    raise ValueError(f"template {template.name!r} gave one and the same value {TRIES} times over; let its numbers vary more.")


def reference(template, k):
    """Source of the reference solution, a function of one argument."""
    body = textwrap.indent(template.body.replace("K", str(k)), "    ")
    return f"def {template.name}({_ARGUMENTS[template.takes][0]}):\n{body}\n"


def load(source, name):
    """The function of a reference solution. Only this file's own text comes here."""
    namespace = {}
    exec(source, namespace)
    return namespace[name]


def draw(takes, random):
    """An argument of this kind, such that short and long ones, hits and misses of k all occur."""
    if takes == "numbers":
        return [int(x) for x in random.integers(0, 21, size=random.integers(1, 9))]
    if takes == "n":
        return int(random.integers(1, (10, 100, 1000)[random.integers(3)]))
    return "".join(_LETTERS[i] for i in random.integers(len(_LETTERS), size=random.integers(1, 13)))


def as_text(value):
    """A value as a line of input or output."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _generator(*numbers):
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))
