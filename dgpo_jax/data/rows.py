"""One row of a file to one Problem: where its fields are, what they may hold, and what is refused."""

import difflib
import json
import math
import re
from collections.abc import Sequence

from dgpo_jax.types import CHECKERS, Problem

LONGEST_ID = 300  # characters
LISTED = 20  # names of fields in an error
OPTIONAL = ("id", "source", "solution", "checker", "tests", "tolerance")  # read where a row has them


def to_problem(
    where: str,
    row: dict,
    number: int,
    *,
    stem: str,
    source: str,
    problem_field: str = "problem",
    answer_field: str = "answer",
    tolerance: float = Problem._field_defaults["tolerance"],
) -> Problem:
    """Reads one row.

    Args:
        where: file and line, for errors.
        row: from names to values; `problem_field` and `answer_field` may reach into nested ones, as `prompt.0.content`.
        number: of the row in its file; with `stem`, the id of a row that has none.
        source, tolerance: of a row that has none.
    Raises:
        ValueError: with `where`, for anything that would otherwise surface as a wrong reward.
    """
    try:
        checker = take_text(row, "checker", "math")
        if checker not in CHECKERS:
            raise ValueError(f"checker is {shorten(checker)}; it must be one of {', '.join(CHECKERS)}.")
        return Problem(
            id=_take_id(row, f"{stem}-{number}"),
            problem=take_text(row, problem_field),
            answer=take_text(row, answer_field, None if checker == "math" else ""),
            source=take_text(row, "source", source),
            solution=take_text(row, "solution", ""),
            checker=checker,
            tests=_take_tests(row, checker),
            tolerance=_take_tolerance(row, tolerance),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _take_id(row, default):
    """Ids stand in tables, messages and file names of people's own scripts: one short line each."""
    text = take_text(row, "id", default)
    if len(text) > LONGEST_ID or not text.isprintable():
        raise ValueError(f"id is {shorten(text)}; it must be one line of at most {LONGEST_ID} printable characters, change it.")
    return text


def find(row: dict, field: str):
    """The value of a field; dots reach into objects by name and into lists by number, unless a name has the dots itself."""
    if field in row:
        return row[field]
    value, walked = row, []
    for part in field.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif walked:
            has = _list_names(value) if isinstance(value, dict) else shorten(value)
            raise ValueError(f"no {part!r} in field {'.'.join(walked)!r}, which holds {has or 'nothing'}; set the field's name.")
        else:
            raise ValueError(_no_field(row, part))
        walked.append(part)
    return value


def _no_field(row, field):
    near = difflib.get_close_matches(field, row, n=1)
    hint = f"perhaps it is {near[0]!r}: set the field's name" if near else "add it or set the field's name"
    return f"no field {field!r} among {_list_names(row) or 'none'}; {hint}."


def _list_names(row):
    """The names of a row's fields, the first few of many."""
    names = [repr(name[:60]) for name in list(row)[:LISTED]]
    return ", ".join(names) + (f" and {len(row) - LISTED} more" if len(row) > LISTED else "")


def take_text(row: dict, field: str, default: str | None = None) -> str:
    """The field as text; without a default it must be there and not blank. Numbers count as text, as 18 for "18"."""
    if default is not None and field.partition(".")[0] not in row and field not in row:
        return default
    value = find(row, field)
    if value is None and default is not None:
        return default
    not_finite = isinstance(value, float) and not math.isfinite(value)  # Python's JSON takes NaN for a number
    if isinstance(value, bool) or not_finite or not isinstance(value, (str, int, float)):
        raise ValueError(f"{field} is {shorten(value)}; it must be text or a number{_hint_inside(field, value)}.")
    text = str(value)
    if default is None and not text.strip():
        raise ValueError(f"{field} is {shorten(value)}; it must not be empty, fill it in or delete the line.")
    if not text.isascii():
        _refuse_half_characters(field, text)
    return text


def _hint_inside(field, value):
    """Which dotted name the user may have meant, for the shapes that published sets have."""
    if not isinstance(value, list) or not value:
        return ""
    if all(isinstance(message, dict) and "content" in message for message in value):
        users = [i for i, message in enumerate(value) if message.get("role") == "user"]
        return f": these are chat messages, name the text of one, {field}.{users[-1] if users else 0}.content"
    return f": name one element, such as {field}.0" if isinstance(value[0], (str, int, float)) else ""


def _refuse_half_characters(field, text):
    """JSON can spell half a surrogate pair, which no file, tokenizer or checker process could be given."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x} at character {error.start}"
        raise ValueError(f"{field} holds {half}, half of a surrogate pair; write the whole character.") from None


def _take_tests(row, checker):
    value = row.get("tests")
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False)
    text = take_text({"tests": value}, "tests", "")
    if text.strip():
        try:
            json.loads(text)
        except ValueError as error:
            raise ValueError(f"tests is {shorten(text)}, which is not JSON ({error}).") from None
    elif checker != "math":
        raise ValueError(f"checker is {checker!r} but tests is empty; {checker!r} judges by tests, add them.")
    return text


def _take_tolerance(row, default):
    value = row.get("tolerance")
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"tolerance is {shorten(value)}; it is a relative distance, at least 0 and less than 1.")
    return float(value)


def shorten(value) -> str:
    """A value as JSON on one line, for errors."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return re.sub(r"\s+", " ", text[:60]) + ("..." if len(text) > 60 else "")


class LazyProblems(Sequence):
    """Problems read when they are asked for; subclasses give `__len__` and `read(index)`."""

    def read(self, index: int) -> Problem:
        """The problem at 0 <= index < len(self)."""
        raise NotImplementedError

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        return self.read(index % len(self))
