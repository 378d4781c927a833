"""What settings may be, and how a broken rule is worded: the setting, its value, the rule, the fix. Standard library only.

Types are checked although the command line has checked its own: most settings come from a config file, which is Python, and
there a wrong word or kind of number would be found deep inside a run, or never.
"""

import functools
import types
import typing
from collections.abc import Collection
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

SMALLEST, LARGEST = 2.0**-126, 2.0**127  # of numbers that float32 holds, 0 apart
LONGEST = 200  # characters of a value in a message

# Of a field's type: what it is in words, and what to write.
KINDS = {
    bool: ("it is yes or no", "give True or False"),
    int: ("it is a whole number", "write it without a point, such as 8; of a variable give int(...)"),
    float: ("it is a number of Python's own", "write it as it is, such as 0.5; of a variable give float(...)"),
    str: ("it is a text", "write it in quotes; of a variable give str(...)"),
}


class Kind(NamedTuple):
    """What a field may hold."""

    name: str
    types: tuple[type, ...]
    words: tuple[str, ...]  # of a Literal; () = any
    optional: bool  # None too


def require(condition: bool, name: str, value, rule: str, fix: str) -> None:
    """Raises ValueError with the setting, its value, the rule it breaks, and what to do."""
    if not condition:
        raise ValueError(f"{name} is {shown(value)}, but {rule}; {fix}.")


def require_in_32_bits(name: str, value: Any) -> None:
    """Raises ValueError for a number that is not finite, or that devices would round to 0 or infinity."""
    if isinstance(value, (int, float)):
        largest = 2**31 if isinstance(value, int) else LARGEST
        require(value == 0 or SMALLEST < abs(value) < largest, name, value, "numbers are kept in 32 bits", "give a usual one")


def require_kinds(settings: Any, group: str = "") -> None:
    """Raises ValueError for the first field of a dataclass that holds something else than its annotation says, or too large an int.

    An int will do for a float, a bool for neither. numpy's numbers will not: config.json could not hold them.

    Args:
        group: what the fields are called by, such as "model"; "" = their own names.
    """
    for kind in kinds_of(type(settings)):
        name, value = f"{group}.{kind.name}" if group else kind.name, getattr(settings, kind.name)
        if not _fits(kind, value):
            require(False, name, value, *_rule_of(kind, value))
        if isinstance(value, int) and abs(value) >= 2**63:  # Python cannot print one of 5000 digits, and a message of another rule may have it
            require_in_32_bits(name, value)


@functools.cache  # configs are made by the thousand, and reading annotations takes a hundred times as long as comparing with them
def kinds_of(settings: type) -> tuple[Kind, ...]:
    """What each field of a dataclass may hold, by its annotation: a type, a Literal of words, either of them or None."""
    return tuple(_kind_of(name, hint) for name, hint in typing.get_type_hints(settings).items())


def _kind_of(name: str, hint: Any) -> Kind:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kept = [part for part in parts if part is not type(None)]
    words = tuple(word for part in kept if typing.get_origin(part) is Literal for word in typing.get_args(part))
    allowed = (str,) if words else tuple(kept)
    return Kind(name, (*allowed, int) if float in allowed else allowed, words, len(kept) < len(parts))


def _fits(kind: Kind, value: Any) -> bool:
    if value is None:
        return kind.optional
    if not isinstance(value, kind.types) or (isinstance(value, bool) and bool not in kind.types):
        return False
    return not kind.words or value in kind.words


def _rule_of(kind: Kind, value: Any) -> tuple[str, str]:
    """(the rule, the fix) for a value that does not fit."""
    if kind.words:
        near = closest(value, kind.words) if isinstance(value, str) else None
        listed = ", ".join(map(repr, kind.words)) + (" or None" if kind.optional else "")
        return f"it is one of {listed}", f"did you mean {near!r}" if near else "choose one of them"
    first = kind.types[0]
    if is_dataclass(first):
        return "it is a group of settings", f"give a {first.__name__}"
    rule, fix = KINDS[first]
    return rule + (" or None" if kind.optional else ""), fix


def closest(word: str, words: Collection[str]) -> str | None:
    """The one that was probably meant; None if none is near."""
    return next(iter(get_close_matches(word[:LONGEST], words, n=1)), None)


def shown(value: Any) -> str:
    """A value in one line of readable length, whatever a config file made of it."""
    try:
        text = " ".join(repr(value).split("\n"))
    except Exception as error:  # any class's own __repr__; and Python has none for an int of more than 4300 digits
        return f"something of type {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
