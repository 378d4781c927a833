"""Who judges a response: mathematics, programs and reasoning-gym's puzzles, each by its own pool, behind one name.

    with Checkers(MathSettings(), CodeSettings(), kinds={"math"}) as checkers:
        verdicts = checkers.score([(problem, response), ...])          # in order
        ticket = checkers.submit(problem, response)                    # or streaming; ticket.result() is the Verdict

A pool is started only for the kinds of problems that there are.
"""

import collections
import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from typing import NamedTuple

from dgpo_jax import activity
from dgpo_jax.rewards.code_tests import parse_tests
from dgpo_jax.rewards.pool import VerifierPool, settled
from dgpo_jax.types import CHECKERS, Problem, Verdict

LOOK_S = 0.5  # how often whoever waits for verdicts may do something else


class MathSettings(NamedTuple):
    """As in config.RewardConfig."""

    extract: str = "boxed"
    workers: int = 2
    deadline_s: float = 5.0
    memory_mb: int = 2048


class CodeSettings(NamedTuple):
    """As in config.CodeConfig."""

    sandbox: str = "bubblewrap"
    workers: int = 2
    test_s: float = 4.0
    wall_s: float = 60.0
    memory_mb: int = 512
    max_tests: int = 0


class Checkers:
    """A context manager around the pools.

    Args:
        math: settings of the mathematical checker; extract and the workers' limits serve reasoning-gym too.
        code: settings of the sandbox.
        kinds: the problems' `checker`s, of types.CHECKERS.
    Raises:
        ValueError: a setting out of range, a kind that does not exist, or one whose tools are not installed.
    """

    def __init__(self, math: MathSettings, code: CodeSettings, kinds: Iterable[str]):
        with contextlib.ExitStack() as stack:
            self._pools = {kind: stack.enter_context(_make_pool(kind, math, code)) for kind in sorted(set(kinds))}
            self._stack = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def submit(self, problem: Problem, response: str) -> Future:
        """Starts judging one response; returns a ticket, a Future whose result() is the Verdict.

        Where a problem's tests are malformed every response is "unparsable": `check_golds` has warned of it, and one problem of
        thousands does not end a run in the middle.
        """
        if problem.checker == "math":
            return self._pools["math"].submit(problem.answer, response, problem.tolerance)
        try:
            return self._pools[problem.checker].submit(problem.tests, response)
        except ValueError:
            return settled(Verdict("unparsable", None, 0.0))

    def gather(self, tickets: Sequence[Future], between: Callable[[], object] = lambda: None) -> list[Verdict]:
        """Waits for tickets; returns their Verdicts in the same order.

        Args:
            between: called now and then meanwhile; what it raises ends the wait.
        """
        verdicts = []
        with activity.doing("checking answers", lambda: f"{sum(not ticket.done() for ticket in tickets)} of {len(tickets)} outstanding"):
            for ticket in tickets:
                while not wait([ticket], timeout=LOOK_S).done:
                    between()
                verdicts.append(ticket.result())
                activity.beat()
        return verdicts

    def score(self, pairs: Iterable[tuple[Problem, str]]) -> list[Verdict]:
        """Judges (problem, response) pairs; returns their Verdicts in order."""
        return self.gather([self.submit(problem, response) for problem, response in pairs])

    def compare(self, answer: str, other: str, tolerance: float) -> Future:
        """A ticket for whether two mathematical answers are the same; `math` must be among the kinds."""
        return self._pools["math"].compare(answer, other, tolerance)

    def check_golds(self, problems: Iterable[Problem], advance: Callable[[int], object] = lambda count: None) -> dict[str, str]:
        """{id: reason} of the problems that no response could be right about. Programs are not run.

        Args:
            advance: told how many problems were looked at, for a progress bar.
        """
        kinds = collections.defaultdict(list)
        for problem in problems:
            kinds[problem.checker].append(problem)
        flaws = self._pools["math"].check_golds(kinds["math"], advance) if kinds["math"] else {}
        puzzles = [problem for problem in kinds["gym"] if problem.answer]
        flaws |= self._pools["gym"].check_golds(puzzles) if puzzles else {}
        for problem in kinds["code"]:
            try:
                parse_tests(problem.tests)
            except ValueError as error:
                flaws[problem.id] = f"its {error}"
        advance(len(kinds["gym"]) + len(kinds["code"]))
        return flaws

    def close(self) -> None:
        """Ends every pool's processes."""
        self._stack.close()


def _make_pool(kind, math, code):
    if kind not in CHECKERS:
        raise ValueError(f"a problem's checker is {kind!r}; it must be one of {', '.join(CHECKERS)}.")
    if kind == "math":
        return VerifierPool(math.workers, math.deadline_s, math.extract, math.memory_mb)
    if kind == "code":
        from dgpo_jax.rewards.code import CodePool  # most runs need neither of these two

        return CodePool(**code._asdict())
    from dgpo_jax.rewards.gym import GymPool

    return GymPool(math.workers, math.deadline_s, math.extract, math.memory_mb)
