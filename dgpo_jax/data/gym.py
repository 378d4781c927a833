"""Problems of reasoning-gym (PyPI; the extra `gym`): a hundred sets of puzzles, made by formula, each with a scorer.

    gym_problems("chain_sum(min_terms=2,max_terms=3),gcd", "train", size=1000, seed=0)

An item is made when it is asked for, and is the same every time. `rewards.gym` judges responses to it.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from dgpo_jax.types import Problem

TEST_SHARE = 8  # one in so many questions belongs to the held-out split
TRIES = {"train": 16, "test": 160}  # items looked at for one problem; one in 10 ** 9 fails by chance
PROBED = 8  # problems made twice, before the run starts, to see that they stay the same
ELSEWHERE_S = 300  # for another process to make a few items, imports included
NONSENSE = "no answer"
OURS = {"seed": "seed", "size": "data.size"}  # settings that every set has, and the run's settings that they come from
TYPE = "python type"  # marks, in JSON, what JSON itself does not know; see `pack`
_SET = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*", re.DOTALL)
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


def gym_problems(name: str, split: str, size: int, seed: int) -> Sequence[Problem]:
    """Problems of one set, or of several in turn.

    Args:
        name: a set such as "chain_sum", perhaps with settings as above; several joined by ",".
        split: "train" or "test". A question belongs to one of the two by its text, whatever the seed.
        size: number of problems, all sets together.
        seed: 0 or more.
    Raises:
        ValueError: reasoning-gym is not installed; no such set, setting, value or split; a set whose items JSON cannot
            hold, that differ from one time to the next, or that have no question for the split; a scorer that takes
            anything.
    """
    if split not in TRIES:
        raise ValueError(f"gym:{name}/{split}: the split must be train or test; choose one.")
    if size < 1 or seed < 0:
        raise ValueError(f"gym:{name}/{split}: size {size} must be 1 or more, and seed {seed} 0 or more; raise it.")
    return GymProblems([Puzzles(*parse_set(text), split, size, seed) for text in _split_commas(name)], size)


class GymProblems(Sequence):
    """Problem i is number i // n of set i % n."""

    def __init__(self, sets: Sequence["Puzzles"], size: int):
        self.sets, self.size = sets, size
        for puzzles in sets:
            puzzles.check()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        place = range(self.size)[index]
        number, which = divmod(place, len(self.sets))
        return self.sets[which].problem(number, place)


class Puzzles:
    """Those items of one set that belong to one split."""

    def __init__(self, name: str, config: dict, split: str, size: int, seed: int):
        self.name, self.config, self.split, self.size, self.seed = name, config, split, size, seed
        digest = hashlib.sha256(f"{seed}/{split}".encode()).digest()
        # Most sets seed an item with this plus its number. The sum stays below 2 ** 32, so that any generator takes it.
        first = int.from_bytes(digest[:4], "big") >> 1
        self.dataset = _make_dataset(name, config, seed=first, size=size * TRIES[split])

    def item(self, number: int) -> dict:
        """The first of this number's items, out of TRIES, whose question belongs to the split."""
        for attempt in range(TRIES[self.split]):
            entry = self.dataset[number + attempt * self.size]
            is_test = hashlib.sha256(entry["question"].encode()).digest()[0] % TEST_SHARE == 0
            if is_test == (self.split == "test"):
                return entry
        raise ValueError(
            f"gym:{self.name}/{self.split}: none of {TRIES[self.split]} items is a question of this split, so there are"
            f" too few different ones; widen the set's settings or use another set."
        )

    def problem(self, number: int, place: int) -> Problem:
        """This set's `number`, which is `place` in the whole source."""
        entry = self.item(number)
        tests = {"dataset": self.name, "config": self.config, "entry": pack(entry, f"gym:{self.name}")}
        answer = entry["answer"]
        return Problem(
            id=f"gym-{self.name}-{self.split}-{place:06d}",
            problem=entry["question"],
            answer="" if answer is None else str(answer),  # some sets name none, because many are right
            source=f"gym:{self.name}/{self.split}",
            checker="gym",
            tests=json.dumps(tests, ensure_ascii=False),
        )

    def fingerprint(self) -> str:
        """Of the first problems, all that there is to them."""
        problems = [self.problem(number, number) for number in range(min(PROBED, self.size))]
        return hashlib.sha256(repr(problems).encode()).hexdigest()

    def check(self) -> None:
        """Refuses a set whose items cannot be kept, or change from one time to the next, or whose scorer is no judge."""
        here = self.fingerprint()
        if here != self.fingerprint():
            raise ValueError(f"gym:{self.name}: its items differ each time they are made; use another set.")
        for number in range(min(PROBED, self.size)):
            if self._takes_nonsense(self.item(number)):
                raise ValueError(f"gym:{self.name}: its scorer gives {NONSENSE!r} full marks; use another set.")
        # Texts in a Python set come in an order of their own in each process, unless the hash seed is fixed.
        if os.environ.get("PYTHONHASHSEED", "random") == "random" and here != self._fingerprint_elsewhere():
            raise ValueError(
                f"gym:{self.name}: its items depend on Python's hash seed, and a resumed run would see others; start"
                f" with PYTHONHASHSEED=0 in the environment, or use another set."
            )

    def _takes_nonsense(self, entry):
        try:
            return self.dataset.score_answer(NONSENSE, entry) >= 1
        except Exception:  # some scorers fail on a text that is no answer, which is no harm
            return False

    def _fingerprint_elsewhere(self):
        script = "import json, sys; from dgpo_jax.data.gym import Puzzles as P; print(P(*json.loads(sys.argv[1])).fingerprint())"
        arguments = json.dumps([self.name, self.config, self.split, self.size, self.seed])
        paths = [_PACKAGE_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-c", script, arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=ELSEWHERE_S)
        except subprocess.TimeoutExpired:
            raise ValueError(f"gym:{self.name}: making a few items took more than {ELSEWHERE_S} s; use another set.") from None
        if done.returncode:
            last = (done.stderr.split("\n")[-2:-1] or ["no word"])[0]
            raise ValueError(f"gym:{self.name}: another process cannot make its items ({last}); use another set.")
        return done.stdout.split()[-1]  # some sets print while they work


def pack(value, where: str):
    """The value as JSON can hold it, for `rewards.gym_worker.unpack`, which gives back the same types.

    Raises:
        ValueError: something that is neither JSON's nor a tuple, a Fraction, or a dict whose keys are no texts.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [pack(item, where) for item in value]
    if isinstance(value, tuple):
        return {TYPE: "tuple", "of": [pack(item, where) for item in value]}
    if isinstance(value, Fraction):
        return {TYPE: "fraction", "of": str(value)}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value) and TYPE not in value:
        return {key: pack(item, where) for key, item in value.items()}
    if isinstance(value, dict):
        return {TYPE: "dict", "of": [[pack(key, where), pack(item, where)] for key, item in value.items()]}
    kind = type(value).__name__
    raise ValueError(f"{where}: its items hold a {kind}, which JSON cannot keep for the scorer; use another set.")


def parse_set(text: str) -> tuple[str, dict]:
    """("chain_sum", {"min_terms": 2}) of "chain_sum(min_terms=2)". Raises ValueError with the closest names."""
    match = _SET.fullmatch(text)
    if match is None:
        raise ValueError(f"gym:{text}: this is not NAME or NAME(setting=value, ...); mind the brackets.")
    name, settings = match[1], match[2] or ""
    datasets = _library().factory.DATASETS
    if name == "composite" or name not in datasets:
        reason = "join the sets themselves with ','" if name == "composite" else _closest(name, datasets)
        raise ValueError(f"gym:{name}: reasoning-gym has no set {name!r} that can be used here; {reason}.")
    fields = [field.name for field in dataclasses.fields(datasets[name][1]) if field.name not in OURS]
    config = {}
    for part in _split_commas(settings) if settings.strip() else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key in OURS:
            raise ValueError(f"gym:{name}: {key} is not set here; set {OURS[key]}.")
        if not equals or key not in fields:
            raise ValueError(f"gym:{name}: {part.strip()!r} sets nothing that it has; {_closest(key, fields)}.")
        config[key] = _parse_value(value)
    return name, config


def _make_dataset(name, config, seed, size):
    try:
        return _library().create_dataset(name, seed=seed, size=size, **config)
    except (AssertionError, TypeError, ValueError, AttributeError, KeyError) as error:  # it has no one way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"gym:{name}: reasoning-gym refuses {config}: {reason}; change the settings.") from error


def _library():
    try:
        import reasoning_gym  # a second of import that other sources need not pay
        import reasoning_gym.factory
    except ImportError as error:
        raise ValueError(f"gym: needs reasoning-gym ({error}); pip install 'dgpo_jax[gym]'.") from error
    return reasoning_gym


def _closest(name, names):
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"perhaps {' or '.join(near)}" if near else f"there are {', '.join(sorted(names))}"


def _split_commas(text):
    """Splits at commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _parse_value(text):
    """An int, a float, a bool, or else a text, with or without quotation marks."""
    if text in ("True", "true", "False", "false"):
        return text in ("True", "true")
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
