"""Word problems made by a formula: nothing to download, as many as wanted, and a held-out set that never overlaps.

Two kinds. `arithmetic` has a closed lower-case vocabulary that a model of a few million parameters learns from
scratch in a minute (`builtin:words` is its tokenizer). `words` is ordinary English for a small pretrained model.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from dgpo_jax.data.rows import LazyProblems
from dgpo_jax.types import Problem

TEST_SHARE = 8  # one in so many (template, numbers) pairs belongs to the held-out split
SPLITS = ("train", "test")
TRIES = 10_000  # draws for one problem; where the split has any at all, one is found long before


class Operation(NamedTuple):
    """One arithmetic operation: the sign of its worked solution and how two drawn numbers become a question."""

    sign: str
    arrange: object  # (int, int) -> (first, second, answer), all integers


OPERATIONS = {
    "add": Operation("+", lambda x, y: (x, y, x + y)),
    "subtract": Operation("-", lambda x, y: (max(x, y), min(x, y), abs(x - y))),
    "multiply": Operation("*", lambda x, y: (x, y, x * y)),
    "share": Operation("/", lambda x, y: (x * y, y, x)),
}

# What a careless pupil does instead, on the two numbers as they stand in the question: sign, result.
SLIPS = {
    "add": ("+", lambda first, second: first + second),
    "subtract": ("-", lambda first, second: first - second),
    "multiply": ("*", lambda first, second: first * second),
}


class Kind(NamedTuple):
    """The raw material of one kind of problem."""

    names: tuple[str, ...]
    things: tuple[str, ...]
    templates: dict[str, tuple[str, ...]]  # operation -> texts with {name} {other} {thing} {a} {b}
    solution: str  # with {a} {sign} {b} {answer}; marks its answer as the grader wants it
    unmarked: str  # the same without the mark
    low: int  # smallest number drawn, by default
    high: int  # largest number drawn, by default


ARITHMETIC = Kind(
    names=("tom", "anna", "sam", "mia", "leo", "eva"),
    things=("apples", "pens", "books", "coins", "eggs", "cards"),
    templates={
        "add": (
            "{name} has {a} {thing} and buys {b} more. how many {thing} does {name} have now?",
            "{name} has {a} {thing}. {other} gives {name} {b} more. how many {thing} does {name} have now?",
            "there are {a} {thing} in a box. {name} adds {b} more. how many {thing} are in the box?",
        ),
        "subtract": (
            "{name} has {a} {thing} and loses {b}. how many {thing} does {name} have now?",
            "{name} has {a} {thing} and gives {b} to {other}. how many {thing} does {name} have now?",
            "there are {a} {thing} in a box. {name} takes {b}. how many {thing} are in the box?",
        ),
    },
    solution="{a} {sign} {b} = \\boxed{{{answer}}}",
    unmarked="{a} {sign} {b} = {answer}",
    low=0,
    high=20,
)

WORDS = Kind(
    names=(
        "Tom", "Anna", "Sam", "Mia", "Leo", "Eva", "Ravi", "Chen", "Omar", "Lucy", "Ben", "Nora", "Kofi",
        "Elena", "Jack", "Aisha", "Hugo", "Grace", "Ivan", "Maya", "Paul", "Sofia", "Yuki", "Carlos",
    ),
    things=(
        "apples", "pencils", "books", "coins", "eggs", "cards", "stickers", "marbles", "cookies", "flowers",
        "stamps", "shells", "balloons", "oranges", "buttons", "toys", "candles", "photos", "stones", "muffins",
    ),
    templates={
        "add": (
            "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
            "{name} had {a} {thing}. Then {other} gave {name} {b} more. How many {thing} does {name} have now?",
            "There are {a} {thing} in a box. {name} puts {b} more into it. How many {thing} are in the box now?",
            "{name} found {a} {thing} on Monday and {b} on Tuesday. How many {thing} did {name} find in all?",
            "{name} has {a} {thing} and {other} has {b}. How many {thing} do they have together?",
            "A shop sold {a} {thing} in the morning and {b} in the afternoon. How many {thing} did it sell that day?",
            "{name} made {a} {thing}, and {other} made {b}. How many {thing} did they make altogether?",
            "{name} collected {a} {thing} last week and {b} {thing} this week. What is the total number of {thing}?",
            "On the table are {a} {thing}. {name} adds another {b}. How many {thing} are on the table?",
            "{name} packed {a} {thing}, then packed {b} more. How many {thing} did {name} pack?",
            "{other} owns {a} {thing}. {name} owns {b} more {thing} than {other}. How many {thing} does {name} own?",
            "A bag holds {a} {thing} and another bag holds {b}. How many {thing} are in both bags?",
        ),
        "subtract": (
            "{name} has {a} {thing} and gives {b} to {other}. How many {thing} does {name} have left?",
            "{name} had {a} {thing} but lost {b} of them. How many {thing} are left?",
            "There were {a} {thing} in a box. {name} took out {b}. How many {thing} remain in the box?",
            "{name} bought {a} {thing} and sold {b}. How many {thing} does {name} still have?",
            "{name} has {a} {thing}. {other} has {b} fewer. How many {thing} does {other} have?",
            "A shop had {a} {thing} and sold {b} of them. How many {thing} does the shop have now?",
            "{name} needs {a} {thing} and already has {b}. How many more {thing} does {name} need?",
            "Of {a} {thing}, {b} are red and the rest are blue. How many {thing} are blue?",
            "{name} carried {a} {thing} and dropped {b}. How many {thing} is {name} still carrying?",
            "{name} made {a} {thing}, and {other} made {b}. How many more {thing} did {name} make than {other}?",
            "{a} {thing} were on the shelf. {name} moved {b} to the floor. How many {thing} stayed on the shelf?",
            "{name} started the day with {a} {thing} and used {b}. How many {thing} did {name} have at the end?",
        ),
        "multiply": (
            "{name} has {a} boxes with {b} {thing} in each. How many {thing} does {name} have?",
            "{name} buys {a} bags of {thing}. Each bag holds {b}. How many {thing} does {name} buy?",
            "There are {a} rows of {b} {thing}. How many {thing} are there?",
            "Each of {a} children brings {b} {thing}. How many {thing} do they bring in total?",
            "{name} makes {a} {thing} every day. How many {thing} does {name} make in {b} days?",
            "A pack holds {a} {thing}. How many {thing} are in {b} packs?",
            "{name} gives {a} {thing} to each of {b} friends. How many {thing} does {name} give away?",
            "A shop sells {a} {thing} an hour. How many {thing} does it sell in {b} hours?",
            "{name} fills {a} jars with {b} {thing} each. How many {thing} are in the jars?",
            "{a} shelves carry {b} {thing} each. How many {thing} are on the shelves?",
            "{other} has {a} {thing}. {name} has {b} times as many. How many {thing} does {name} have?",
            "{name} found {a} {thing} on each of {b} walks. How many {thing} did {name} find?",
        ),
        "share": (
            "{name} shares {a} {thing} equally among {b} friends. How many {thing} does each friend get?",
            "{name} puts {a} {thing} into {b} bags, the same number in each. How many {thing} are in each bag?",
            "{a} {thing} are arranged in {b} equal rows. How many {thing} are in each row?",
            "{b} children split {a} {thing} evenly. How many {thing} does each child get?",
            "{name} has {a} {thing} and packs {b} in every box. How many boxes does {name} fill?",
            "It took {name} {b} days to make {a} {thing}, the same number each day. How many {thing} a day is that?",
            "A shop puts {a} {thing} on {b} shelves equally. How many {thing} are on each shelf?",
            "{name} sorts {a} {thing} into {b} equal piles. How many {thing} are in each pile?",
            "{a} {thing} fill {b} jars equally. How many {thing} does one jar hold?",
            "{name} gives away {a} {thing}, {b} to each visitor. How many visitors get {thing}?",
            "A teacher divides {a} {thing} equally between {b} groups. How many {thing} does each group receive?",
            "{name} sold {a} {thing} in {b} hours, equally many each hour. How many {thing} were sold an hour?",
        ),
    },
    solution="{a} {sign} {b} = {answer}. The answer is {answer}.",
    unmarked="{a} {sign} {b} = {answer}.",
    low=2,
    high=20,
)

KINDS = {"arithmetic": ARITHMETIC, "words": WORDS}


class GeneratedProblems(LazyProblems):
    """`size` problems of one kind; item i is a pure function of (kind, split, seed, i) and the settings below.

    The splits share no (template, numbers) pair, whatever the seeds, so a held-out problem is never a training
    problem, nor one with only the names changed.

    Args:
        kind: a key of KINDS.
        size: number of problems; repeats are possible once size nears the number of distinct problems.
        seed: any non-negative int.
        split: "train" or "test".
        low, high: the two numbers of a question are drawn from low..high, both included (for "share": the
            divisor and the answer); None means the kind's own range.
        operations: comma-separated keys of OPERATIONS; "" means all that the kind has.
        slips: share of the worked solutions that use a wrong operation, done right.
        unmarked: share of the worked solutions that do not mark their answer. Such a careless teacher makes a warm
            start that can calculate and leaves something to learn from rewards; `answer` is true all the same.
    Raises:
        ValueError: a setting outside these rules.
    """

    def __init__(self, kind, size, seed=0, *, split="train", low=None, high=None, operations="", slips=0.0, unmarked=0.0):
        check_choice("generated problems", kind, KINDS)
        check_choice("split", split, SPLITS)
        self.kind, self.size, self.seed, self.split = kind, size, seed, split
        self.material = KINDS[kind]
        self.low = self.material.low if low is None else low
        self.high = self.material.high if high is None else high
        self.operations = [name.strip() for name in operations.split(",")] if operations else [*self.material.templates]
        for name in self.operations:
            check_choice("operations", name, self.material.templates)
        self.slips, self.unmarked = slips, unmarked
        self._check_numbers()

    def _check_numbers(self):
        if self.size < 1:
            raise ValueError(f"size {self.size} of generated problems is below 1; ask for at least one.")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is negative; use 0 or more.")
        for name in ("slips", "unmarked"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is a share of the solutions; use 0 to 1.")
        if not 0 <= self.low <= self.high:
            raise ValueError(f"numbers {self.low}..{self.high}: need 0 <= low <= high; change low or high.")
        if self.low == 0 and "share" in self.operations:
            raise ValueError("numbers from 0 with operation 'share' would divide by zero; set low to 1 or more.")
        if self.high - self.low < 4:
            raise ValueError(f"numbers {self.low}..{self.high} are too few to hold some out; make high >= low + 4.")

    def __len__(self):
        return self.size

    def read(self, index):
        """Problem number `index`."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(
            [self.seed, SPLITS.index(self.split), index])))
        for _ in range(TRIES):  # one in TEST_SHARE succeeds for the held-out split
            operation, number, x, y = self._draw_question(random)
            if split_of(f"{self.kind}/{operation}/{number}/{x}/{y}") == self.split:
                return self._write(index, operation, number, x, y, random)
        raise ValueError(
            f"numbers {self.low}..{self.high} of {', '.join(self.operations)} leave no problem for the {self.split} split;"
            " make high larger."
        )

    def _draw_question(self, random):
        operation = self.operations[random.integers(len(self.operations))]
        number = int(random.integers(len(self.material.templates[operation])))
        x, y = (int(value) for value in random.integers(self.low, self.high + 1, size=2))
        if operation == "subtract":
            x, y = max(x, y), min(x, y)  # one key per question, or 9 - 4 and 4 - 9 could fall on both sides
        return operation, number, x, y

    def _write(self, index, operation, number, x, y, random):
        material = self.material
        name, other = (material.names[i] for i in random.choice(len(material.names), size=2, replace=False))
        thing = material.things[random.integers(len(material.things))]
        sign, arrange = OPERATIONS[operation]
        first, second, answer = arrange(x, y)
        template = material.templates[operation][number]
        worked = answer
        # Drawn last, so that carelessness changes nothing else of the problem.
        if random.random() < self.slips:
            sign, worked = self._slip(operation, first, second, random)
        solution = material.unmarked if random.random() < self.unmarked else material.solution
        return Problem(
            id=f"{self.kind}-{self.split}-{self.seed}-{index}",
            problem=template.format(name=name, other=other, thing=thing, a=first, b=second),
            answer=str(answer),
            source=f"generated:{self.kind}",
            solution=solution.format(a=first, sign=sign, b=second, answer=worked),
        )

    def _slip(self, operation, first, second, random):
        others = [name for name in SLIPS if name in self.operations and name != operation] or [*SLIPS]
        sign, calculate = SLIPS[others[random.integers(len(others))]]
        return sign, calculate(first, second)


def split_of(key):
    """Train or test by a hash of the text, the same on every machine and Python (the built-in hash is not)."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") % TEST_SHARE == 0 else "train"


def check_choice(what, value, choices):
    """Raises ValueError, naming the choices, if `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{what}: {value!r} is not one of {', '.join(choices)}; choose one of these.")
