"""The benchmarks that `eval.sets` and `prepare.against` may name. Imports nothing that takes time."""

import difflib
import re
from typing import NamedTuple

# All test sets that data/problem_sets.py knows; the first six are those of the DGPO paper.
BENCHMARKS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench", "gsm8k", "hmmt25")
ALL = "all"
HELD_OUT = "held_out"  # what data.held_out is called where sets are listed


class NamedSet(NamedTuple):
    """One set to evaluate on."""

    name: str  # in metrics, tables and file names
    source: str  # as in data.train


def parse_sets(text: str) -> list[NamedSet]:
    """Reads a list of benchmarks such as 'aime24,math500' or 'gsm8k=gsm8k_test.jsonl,mine=my_problems.jsonl'.

    Args:
        text: names of BENCHMARKS, ALL for all of these, NAME=SOURCE with a source as in data.train; commas between.
            A comma within parentheses is one of the source, as in gym:chain_sum(min_terms=2,max_terms=3)/test.
    Returns:
        The sets in the order given; none for "".
    Raises:
        ValueError: a name that is not known (with the nearest one), given twice or unfit for a file; an empty source.
    """
    sets: list[NamedSet] = []
    for entry in (entry.strip() for entry in _split(text)):
        if entry:
            sets += [NamedSet(name, _source(name)) for name in BENCHMARKS] if entry == ALL else [_parse(entry, text)]
    names = [name for name, _ in sets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"sets {text!r} name {twice!r} twice; name it once, or the other one differently.")
    return sets


def _split(text: str) -> list[str]:
    """At the commas that stand in no parentheses."""
    entries, depth = [""], 0
    for letter in text:
        depth = max(0, depth + (letter == "(") - (letter == ")"))
        if letter == "," and not depth:
            entries.append("")
        else:
            entries[-1] += letter
    return entries


def _parse(entry: str, text: str) -> NamedSet:
    name, equals, source = (part.strip() for part in entry.partition("="))
    if not equals:
        return NamedSet(name, _source(name))
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"sets {text!r}: {name!r} becomes a file name; use letters, digits, _ and - in NAME=SOURCE.")
    if name == HELD_OUT:
        raise ValueError(f"sets {text!r}: {HELD_OUT!r} is what data.held_out is called; give NAME=SOURCE another name.")
    if not source:
        raise ValueError(f"sets {text!r}: {name!r} has no source behind its '='; give NAME=SOURCE, as in data.train.")
    return NamedSet(name, source)


def _source(name: str) -> str:
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, [*BENCHMARKS, ALL], n=1)
        raise ValueError(
            f"there is no benchmark {name!r}{f', perhaps {near[0]!r}' if near else ''}; choose among"
            f" {', '.join(BENCHMARKS)}, {ALL}, or give NAME=SOURCE."
        )
    return f"tfds:{name}/test"
