"""A process that checks mathematical answers: `python -m dgpo_jax.rewards.worker MEMORY_MB PARENT_PID`.

A request is [answer, extracted, tolerance], the reply a status. See `workers` for the rest.
"""

import sys

from sympy.core import exprtools

from dgpo_jax.rewards.math import slow_status
from dgpo_jax.rewards.workers import serve


def without_guessed_signs() -> None:
    """Keeps SymPy from guessing the sign of a sum by the roots of its derivative, which it expands for that.

    For a tower such as (((x^9+1)^9+1)^9+1)^9 that is minutes of work. Without the guess it asks the sum's parts alone. Here and not
    where expressions are made: this process is ours, while others may want SymPy as it is.
    """
    exprtools._monotonic_sign = lambda expression: None


if __name__ == "__main__":
    without_guessed_signs()
    serve(slow_status, int(sys.argv[1]), int(sys.argv[2]), warm_up=lambda: slow_status("x", "\\sqrt{x^2 + 1}"))
