"""The file that keeps judged responses: generations/SET.jsonl, a line per problem. Never imports JAX.

A line is written when all of a problem's responses are judged, and is on the disk before the next one begins: a kill at
any moment leaves whole lines and at most one torn one, which is dropped. Lines are in the order of the problems.

    {"problem_id": ..., "problem": ..., "answer": ..., "responses": [
        {"sample": 0, "text": ..., "extracted": ..., "status": "wrong", "share": null, "vote": 1,
         "tokens": 57, "truncated": false}, ...]}

What the fields mean is in `judging.Judged`.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from dgpo_jax.evaluation.estimators import NO_VOTE
from dgpo_jax.evaluation.judging import Answered, Judged
from dgpo_jax.metrics import encode_line, write_lines
from dgpo_jax.types import STATUSES, Problem, Verdict

_NUMBER = (int, float)
# What a response must be; a bool is no number here.
FIELDS = {
    "text": ("text", lambda value: isinstance(value, str)),
    "extracted": ("text or null", lambda value: value is None or isinstance(value, str)),
    "status": (f"one of {', '.join(STATUSES)}", lambda value: isinstance(value, str) and value in STATUSES),
    "share": ("a number from 0 to 1, or null", lambda value: value is None or (_is(value, _NUMBER) and 0 <= value <= 1)),
    "vote": (f"an answer's number, or {NO_VOTE}", lambda value: _is(value, int) and value >= NO_VOTE),
    "tokens": ("a number of tokens", lambda value: _is(value, int) and value >= 0),
    "truncated": ("true or false", lambda value: isinstance(value, bool)),
}


class Generations:
    """The file of one set. Use as a context manager.

    Args:
        path: created if need be, as are its folders.
        problems: those of the set, in order.
    Raises:
        ValueError: the file holds other problems, another number of responses, or a damaged line.
    """

    def __init__(self, path: Path, problems: Sequence[Problem], samples: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done = read_generations(path, problems) if path.exists() else []  # grows with every append
        for answered in self.done:
            if len(answered.responses) != samples:
                raise ValueError(
                    f"{path}: {answered.problem.id} has {len(answered.responses)} responses, not {samples};"
                    " delete the file, or use another --workdir."
                )
        self._file = open(path, "ab")  # noqa: SIM115 (closed in __exit__)
        if _whole_bytes(path) < path.stat().st_size:  # else its time of change stays as it is
            self._file.truncate(_whole_bytes(path))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def append(self, answered: Answered) -> None:
        """Adds one problem; on the disk when this returns."""
        self._file.write(encode_line(to_row(answered)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.append(answered)


def read_generations(path: Path, problems: Sequence[Problem]) -> list[Answered]:
    """The problems that were done, a torn last line left out.

    Args:
        problems: those of the set, in order; the file holds the first so many of them.
    Raises:
        ValueError: the file holds other problems, or a damaged line.
    """
    lines = path.read_bytes()[: _whole_bytes(path)].split(b"\n")[:-1]
    if len(lines) > len(problems):
        raise ValueError(f"{path} holds {len(lines)} problems, but the set has {len(problems)}; use another --workdir.")
    return [
        _read_line(f"{path}:{number}", line, problem)
        for number, (line, problem) in enumerate(zip(lines, problems, strict=False), start=1)
    ]


def count_done(path: Path) -> int:
    """How many problems the file holds."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _whole_bytes(path: Path) -> int:
    """Length of the file without a last line that has no end."""
    return path.read_bytes().rfind(b"\n") + 1


def _read_line(where: str, line: bytes, problem: Problem) -> Answered:
    try:
        row = json.loads(line)
        asked = (row["problem_id"], row["problem"], row["answer"])
        responses = [_from_row(response) for response in row["responses"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{where} is damaged ({type(error).__name__}: {error}); delete the file, or mend that line."
        ) from None
    if asked != (problem.id, problem.problem, problem.answer):
        raise ValueError(
            f"{where} answers {row['problem_id']!r}, where the set has {problem.id!r}; use another --workdir."
        )
    return Answered(problem, responses)


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    """isinstance, but that no bool is an int."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _from_row(row: dict) -> Judged:
    for name, (rule, fits) in FIELDS.items():
        if not fits(row[name]):
            raise ValueError(f"{name} is {repr(row[name])[:60]}, but it is {rule}")
    verdict = Verdict(row["status"], row["extracted"], row["share"])
    return Judged(row["text"], verdict, row["vote"], row["tokens"], row["truncated"])


def to_row(answered: Answered) -> dict:
    """What is written of a problem."""
    problem, responses = answered
    return {
        "problem_id": problem.id,
        "problem": problem.problem,
        "answer": problem.answer,
        "responses": [
            {
                "sample": sample, "text": text, "extracted": verdict.extracted, "status": verdict.status,
                "share": verdict.share, "vote": vote, "tokens": tokens, "truncated": truncated,
            }
            for sample, (text, verdict, vote, tokens, truncated) in enumerate(responses)
        ],
    }  # fmt: skip


def rewrite(path: Path, done: Sequence[Answered]) -> None:
    """Replaces the file by these problems, whole or not at all."""
    write_lines(path, [to_row(answered) for answered in done])
