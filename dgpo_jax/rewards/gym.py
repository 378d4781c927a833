"""Judges responses to reasoning-gym's puzzles with the puzzles' own scorers, in worker processes that can be killed.

    with GymPool(workers=2, deadline_s=5.0) as pool:
        verdicts = pool.gather([pool.submit(problem.tests, response) for ...])

Some of those scorers would run an answer as a program. `gym_worker` says how that is prevented.
"""

import importlib.util
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from dgpo_jax.rewards import extract as rules
from dgpo_jax.rewards.golds import quote
from dgpo_jax.rewards.pool import settled
from dgpo_jax.rewards.workers import DIED, LATE, Workers
from dgpo_jax.types import Problem, Verdict

ANSWER_CAP = 16 * 1024  # characters of an answer, which may be a whole board; a longer one is not looked at
UNREADABLE = "unparsable"  # the worker's reply where a scorer fails on an answer; otherwise it replies with the score
_OPEN, _CLOSE = "<answer>", "</answer>"


class GymPool:
    """A context manager around `workers` processes.

    Args:
        workers: processes, at least 1.
        deadline_s: seconds for one answer; a later one is "timed_out", its worker killed and replaced.
        extract: where the answer stands if it is not in <answer> tags, one of extract.RULES.
        memory_mb: address space of each worker, in MiB; an answer that needs more is "crashed". Linux only.
    Raises:
        ValueError: a setting out of range, or reasoning-gym is not installed.
    """

    def __init__(self, workers: int = 2, deadline_s: float = 5.0, extract: str = "boxed", memory_mb: int = 2048):
        if extract not in rules.RULES:
            raise ValueError(f"extract: {extract!r} is not a rule; use one of {', '.join(rules.RULES)}.")
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError("gym: needs reasoning-gym, which is not installed; pip install 'dgpo_jax[gym]'.")
        self.extract = extract
        self._workers = Workers(
            "dgpo_jax.rewards.gym_worker", count=workers, deadline_s=deadline_s, memory_mb=memory_mb, is_reply=_is_reply
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def submit(self, tests: str, response: str) -> Future:
        """Starts judging one response to the problem with these tests; a ticket whose result() is the Verdict.

        Its share is the scorer's score, 0 to 1, and only 1 is "correct". An answer that the scorer fails on is
        "unparsable".
        """
        answer = find_gym_answer(response, self.extract)
        if answer is None:
            return settled(Verdict("no_answer", None))
        return self._score(tests, answer)

    def _score(self, tests, answer):
        shown = answer[: rules.BOX_CAP]
        if len(answer) > ANSWER_CAP:
            return settled(Verdict(UNREADABLE, shown))
        return self._workers.submit([tests, answer], lambda reply: _read(reply, shown))

    def gather(self, tickets: Sequence[Future]) -> list[Verdict]:
        """Waits for tickets; returns their Verdicts in the same order."""
        return [ticket.result() for ticket in tickets]

    def check_golds(self, problems: Iterable[Problem]) -> dict[str, str]:
        """{id: reason} of reference answers that their own scorer does not find wholly right; a puzzle without one has no flaw."""
        problems = [problem for problem in problems if problem.answer]
        verdicts = self.gather([self._score(problem.tests, problem.answer) for problem in problems])
        return {
            problem.id: f"its answer is {verdict.status} to its own scorer: {quote(problem.answer)}"
            for problem, verdict in zip(problems, verdicts, strict=True)
            if not verdict.correct
        }

    def wait_started(self, seconds: float) -> bool:
        """Waits until every worker is ready or has failed to start; False if that took longer. Nobody has to."""
        return self._workers.wait_started(seconds)

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now, for monitoring."""
        return self._workers.pids()

    def close(self) -> None:
        """Kills the workers and waits for them. Tickets still pending raise RuntimeError. May be called twice."""
        self._workers.close()


def find_gym_answer(response: str, rule: str) -> str | None:
    """What stands in the last <answer>...</answer> after the thinking, else what the rule finds, or None."""
    text = rules.after_thinking(response)
    if text is None:
        return None
    close = text.rfind(_CLOSE)
    start = text.rfind(_OPEN, 0, close) if close >= 0 else -1
    if start >= 0:
        return text[start + len(_OPEN) : close].strip() or None
    return rules.find_answer(response, rule)


def _is_reply(reply):
    return reply in (UNREADABLE, DIED) or (isinstance(reply, float) and 0 <= reply <= 1)


def _read(reply, shown):
    if reply in (UNREADABLE, LATE, DIED):
        return Verdict(reply, shown)
    return Verdict("correct" if reply == 1 else "wrong", shown, reply)
