"""Math-Verify, the grader of Hugging Face, on the same responses: where two whole graders disagree, one of them is wrong.

    with MathVerifyPool(workers=2) as pool:
        tickets = [pool.submit(answer, response) for ...]      # Futures of "correct", "wrong", ...

It needs the package math-verify (`pip install "dgpo_jax[peers]"`) and decides no reward. It gets what comes after the last
</think>, whole, and finds the answer by its own rules with its own default settings: handed our extraction, it could not
show what our extraction missed. Processes, since its time limits are alarms, which only a main thread may set.
"""

import importlib.util

from dgpo_jax.rewards.workers import DIED, LATE, Workers

CORRECT, WRONG, NOTHING = "correct", "wrong", "nothing found"
RESULTS = (CORRECT, WRONG, NOTHING, LATE, DIED)


def installed():
    """True where math-verify can be imported."""
    return importlib.util.find_spec("math_verify") is not None


class MathVerifyPool:
    """A context manager around `workers` processes, each with a Math-Verify of its own.

    Args:
        workers: processes, at least 1.
        deadline_s: seconds for one response. Its own limits are 5 s for each side and 5 s for each comparison.
        memory_mb: address space of each worker, in MiB. Linux only.
    Raises:
        ModuleNotFoundError: math-verify is not installed.
        ValueError: a setting out of range.
    """

    def __init__(self, workers=2, deadline_s=15.0, memory_mb=4096):
        if not installed():
            raise ModuleNotFoundError(
                'math-verify is not installed; run pip install "dgpo_jax[peers]".', name="math_verify"
            )
        self._workers = Workers(
            "dgpo_jax.rewards.math_verify_worker", count=workers, deadline_s=deadline_s, memory_mb=memory_mb,
            is_reply=RESULTS.__contains__,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def submit(self, answer, response):
        """Starts judging one response; returns a Future.

        Its result is one of RESULTS: "nothing found" where it reads no answer in the response, or none in the reference
        answer, "timed_out" where a limit of its own or `deadline_s` passed, "crashed" where the process died of it.
        """
        return self._workers.submit([answer, response.rpartition("</think>")[2]], _as_it_is)

    def close(self):
        """Kills the workers and waits for them. May be called twice."""
        self._workers.close()


def _as_it_is(reply):
    return reply
