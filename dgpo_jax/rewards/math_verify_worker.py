"""A process that judges responses as Math-Verify does: `python -m dgpo_jax.rewards.math_verify_worker MEMORY_MB PARENT_PID`.

A request is [answer, text], the reply one of math_verify.RESULTS. See `workers` for the rest.
"""

import functools
import itertools
import sys

from math_verify import parse, verify
from math_verify.errors import TimeoutException  # a BaseException, which passes every `except Exception`

from dgpo_jax.rewards.math_verify import CORRECT, NOTHING, WRONG
from dgpo_jax.rewards.workers import LATE, serve


def judge(answer, text):
    """One of RESULTS. Math-Verify's defaults, but that a time limit is told from a wrong answer."""
    try:
        gold, prediction = _read_gold(answer), _read(text)
        if not gold or not prediction:
            return NOTHING
    except TimeoutException:
        return LATE
    late = False
    for pair in itertools.product(gold, prediction):  # as `verify` itself goes through two lists
        try:
            if verify(*pair, raise_on_error=True):
                return CORRECT
        except TimeoutException:
            late = True
        except Exception:  # its default is to call this a difference
            continue
    return LATE if late else WRONG


def _read(text):
    """What Math-Verify finds in the text, [] where it fails, as it does by default."""
    try:
        return parse(text, raise_on_error=True)
    except Exception:
        return []


@functools.lru_cache(maxsize=1024)
def _read_gold(answer):
    """Bare LaTeX would be searched for plain numbers only; Math-Verify asks for golds in a LaTeX environment."""
    return _read(answer if "\\boxed" in answer else f"\\boxed{{{answer}}}")


if __name__ == "__main__":
    serve(judge, int(sys.argv[1]), int(sys.argv[2]), warm_up=lambda: judge("\\frac{1}{2}", "\\boxed{\\sqrt{2}}"))
