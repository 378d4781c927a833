"""Checks many mathematical answers at once in worker processes that can be killed, while the trainer goes on sampling.

    with VerifierPool(workers=2, deadline_s=2.0) as pool:
        verdicts = pool.score([("1/2", "... \\boxed{0.5}"), ...])          # in order
        tickets = [pool.submit(answer, response) for ...]                 # or streaming
        verdicts = pool.gather(tickets)

Answers that strings or exact numbers settle never leave this process.
"""

import collections
import threading
from concurrent.futures import Future

from dgpo_jax.rewards import golds
from dgpo_jax.rewards.exact import TOLERANCE
from dgpo_jax.rewards.extract import BOX_CAP, RULES, find_answer
from dgpo_jax.rewards.math import quick_status
from dgpo_jax.rewards.workers import Workers
from dgpo_jax.types import STATUSES, Verdict

CACHE_SIZE = 16_384  # (answer, extracted) pairs that went to a worker, at about 2 kB
UNJUDGED = ("timed_out", "crashed")  # may have had nothing to do with the answer


class VerifierPool:
    """A context manager around `workers` checker processes.

    Args:
        workers: processes, at least 1.
        deadline_s: seconds for one answer; a later one is "timed_out", its worker killed and replaced.
        extract: where the answer stands, one of extract.RULES.
        memory_mb: address space of each worker, in MiB; an answer that needs more is "crashed". Linux only.
    Raises:
        ValueError: a setting out of range.
    """

    def __init__(self, workers=2, deadline_s=2.0, extract="boxed", memory_mb=2048):
        if extract not in RULES:
            raise ValueError(f"extract: {extract!r} is not a rule; use one of {', '.join(RULES)}.")
        self.extract = extract
        self._lock = threading.Lock()  # over `_cache`
        self._cache = collections.OrderedDict()  # (answer, extracted, tolerance) -> its ticket, pending ones included
        self._workers = Workers(
            "dgpo_jax.rewards.worker", count=workers, deadline_s=deadline_s, memory_mb=memory_mb,
            is_reply=STATUSES.__contains__,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def submit(self, answer, response, tolerance=float(TOLERANCE)):
        """Starts checking one response; returns a ticket, a Future whose result() is the Verdict."""
        self._workers.require_open()
        extracted = find_answer(response, self.extract)
        if extracted is None:
            return settled(Verdict("no_answer", None))
        return self.compare(answer, extracted, tolerance)

    def compare(self, answer, extracted, tolerance=float(TOLERANCE)):
        """Starts comparing two answers; a ticket like `submit`'s."""
        status = quick_status(answer, extracted, tolerance)
        if status is not None:
            return settled(Verdict(status, extracted[:BOX_CAP]))
        key = (answer, extracted, tolerance)
        with self._lock:
            ticket = self._cache.get(key)
            if ticket is None or _has_failed(ticket):
                ticket = self._cache[key] = self._workers.submit(key, lambda status: Verdict(status, extracted[:BOX_CAP]))
            self._cache.move_to_end(key)
            if len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        return ticket

    def gather(self, tickets):
        """Waits for tickets; returns their Verdicts in the same order."""
        return [ticket.result() for ticket in tickets]

    def score(self, pairs):
        """Checks (answer, response) pairs; returns their Verdicts in order."""
        return self.gather([self.submit(answer, response) for answer, response in pairs])

    def check_golds(self, problems, advance=lambda count: None):
        """Finds reference answers that no response could match but to the letter.

        A number or a few plain words will do; anything else must be found equal to itself as mathematics: to be the same
        string is not enough.

        Args:
            advance: told how many problems were looked at, for a progress bar.
        Returns:
            {id: reason}.
        """
        flaws, waiting = {}, []
        for problem in problems:
            flaw = golds.look(problem.answer)
            if flaw is None:
                waiting.append((problem, self._compare_with_itself(problem)))
                continue
            if flaw:
                flaws[problem.id] = flaw
            advance(1)
        for problem, ticket in waiting:
            status = ticket.result()
            if status in UNJUDGED:  # which may have been the machine's fault
                status = self._compare_with_itself(problem).result()
            if status != "correct":
                flaws[problem.id] = golds.explain(problem.answer, status)
            advance(1)
        return flaws

    def _compare_with_itself(self, problem):
        return self._workers.submit((problem.answer, problem.answer, problem.tolerance), read=str)

    def wait_started(self, seconds):
        """Waits until every worker is ready or has failed to start; False if that took longer. Nobody has to."""
        return self._workers.wait_started(seconds)

    def worker_pids(self):
        """Process ids of the workers that run now, for monitoring."""
        return self._workers.pids()

    def close(self):
        """Kills the workers and waits for them. Tickets still pending raise RuntimeError. May be called twice."""
        self._workers.close()


def settled(verdict):
    """A ticket whose result is known."""
    ticket = Future()
    ticket.set_result(verdict)
    return ticket


def _has_failed(ticket):
    """True for a ticket whose answer was not judged: it is tried again."""
    return ticket.done() and (ticket.exception() is not None or ticket.result().status in UNJUDGED)
